# SPDX-License-Identifier: Apache-2.0
"""Low-dimensional synthetic data: an MLP, exact traces and the paper's weights of the higher orders, 0.5 and 0.1."""

from ml_collections import ConfigDict

from configs.default_configs import get_default_configs


def get_toy_configs(sde: str, dataset: str) -> ConfigDict:
    config = get_default_configs()
    config.training.update(
        sde=sde,
        exact_jacobian=True,
        second_order_weight=0.5,
        third_order_weight=0.1,
        batch_size=512,
        n_iters=20_000,
        n_jitted_steps=100,
        log_freq=500,
        eval_freq=500,
        snapshot_freq=20_000,
        snapshot_freq_for_preemption=5_000,
        snapshot_sampling=False,
    )
    config.optim.update(lr=1e-3, warmup=0)
    config.data.update(dataset=dataset, random_flip=False)
    config.model.update(name="mlp", nf=64, num_layers=2, dropout=0.0)
    config.eval.update(batch_size=2000, hutchinson_type="exact", num_repeats=1, num_samples=10_000)
    config.eval.update(enable_metrics=False, fisher_num_examples=1000)
    return config
