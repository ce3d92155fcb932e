# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST padded to 32x32, VE SDE, a small NCSN++. Debian's dataset-fashion-mnist has the files."""

from configs.default_configs import get_default_configs


def get_config():
    config = get_default_configs()
    config.training.update(sde="vesde", batch_size=64, n_iters=20_000, snapshot_freq=5_000)
    config.training.update(snapshot_freq_for_preemption=1_000, eval_freq=500)
    config.optim.warmup = 500
    config.data.update(dataset="FASHION_MNIST", num_channels=1, uniform_dequantization=True)
    config.model.update(nf=32, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(8,), dropout=0.0)
    config.model.update(sigma_max=30.0)
    config.eval.update(batch_size=100, num_repeats=1, num_samples=64, enable_metrics=False)
    return config
