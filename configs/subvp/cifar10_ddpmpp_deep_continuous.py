# SPDX-License-Identifier: Apache-2.0
"""DDPM++ (deep) on CIFAR-10, sub-VP SDE."""

from ml_collections import ConfigDict

from configs.subvp import cifar10_ddpmpp_continuous


def get_config() -> ConfigDict:
    config = cifar10_ddpmpp_continuous.get_config()
    config.training.n_iters = 950_001
    config.model.num_res_blocks = 8
    config.eval.begin_ckpt = config.eval.end_ckpt = config.eval.ckpt_id = 19
    return config
