# SPDX-License-Identifier: Apache-2.0
"""Digits with a network that compiles in seconds; a config file for `main.py` too."""

from configs.default_digits_configs import get_digits_configs


def tiny_digits(**training):
    config = get_digits_configs()
    config.training.update(sde="vesde", batch_size=8, n_iters=6, log_freq=2, eval_freq=3, snapshot_freq=3)
    config.training.update(snapshot_freq_for_preemption=2, snapshot_sampling=False, **training)
    config.model.update(nf=8, ch_mult=(1,), attn_resolutions=(), dropout=0.1, sigma_max=5.0)
    config.eval.update(batch_size=8, num_examples=20, num_samples=4, rtol=1e-2, atol=1e-2, begin_ckpt=0, end_ckpt=0)
    config.sampling.update(rtol=1e-1, atol=1e-1)
    return config


def get_config():
    return tiny_digits()
