# SPDX-License-Identifier: Apache-2.0
"""The changes that the experiments of `python -m reproduce` make to the configs of their data sets."""

from ml_collections import ConfigDict


def toy(config: ConfigDict, n_iters: int, snapshots: int) -> ConfigDict:
    """Evaluates every snapshot. It draws no samples, because the density is known on a grid."""
    every = n_iters // snapshots
    config.training.update(n_iters=n_iters, snapshot_freq=every, snapshot_freq_for_preemption=every)
    config.eval.update(begin_ckpt=1, end_ckpt=snapshots, enable_sampling=False)
    config.eval.update(fisher_num_examples=200, fisher_num_times=50)
    return config


def images(config: ConfigDict, n_iters: int) -> ConfigDict:
    """Takes one snapshot at the end and 512 samples by the ODE. To the eye, tolerance 1e-3 looks like 1e-5."""
    config.training.update(n_iters=n_iters, snapshot_freq=n_iters, snapshot_freq_for_preemption=500)
    config.training.snapshot_sampling = False
    config.eval.num_samples = 512
    config.sampling.update(method="ode", rtol=1e-3, atol=1e-3)
    return config
