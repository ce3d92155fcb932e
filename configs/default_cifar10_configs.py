# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10: what every config on it changes of `default_configs.py`."""

from ml_collections import ConfigDict

from configs.default_configs import get_default_configs as get_base_configs


def get_default_configs() -> ConfigDict:
    config = get_base_configs()
    # The public code has 48 here: order 3 needed it on its GPUs. At order 3: --config.training.batch_size=48
    config.training.batch_size = 128
    config.training.n_iters = 4_000_001
    config.eval.batch_size = 2000
    config.eval.begin_ckpt = config.eval.end_ckpt = config.eval.ckpt_id = 26
    return config
