# SPDX-License-Identifier: Apache-2.0
"""scikit-learn's 1,797 digits of 8x8 and 17 grey levels, with a network that two CPU cores train in minutes."""

from ml_collections import ConfigDict

from configs.default_configs import get_default_configs


def get_digits_configs() -> ConfigDict:
    config = get_default_configs()
    config.training.update(
        batch_size=128,
        n_iters=2_000,
        log_freq=50,
        eval_freq=200,
        snapshot_freq=1_000,
        snapshot_freq_for_preemption=500,
    )
    config.optim.update(lr=3e-3, warmup=100)
    config.data.update(dataset="DIGITS", image_size=8, num_channels=1, random_flip=False)
    config.data.uniform_dequantization = True
    config.model.update(nf=16, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), dropout=0.0, ema_rate=0.995)
    config.eval.update(batch_size=300, num_repeats=1, num_samples=64, gaussian_baseline=True)
    config.eval.enable_metrics = False  # Inception, trained on 299x299 photographs, says little about 8x8 digits
    config.eval.update(fisher_num_times=10, fisher_num_examples=16)  # some minutes on a CPU
    config.deq.update(n_iters=1_000, network="small")
    return config
