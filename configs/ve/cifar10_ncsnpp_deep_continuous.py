# SPDX-License-Identifier: Apache-2.0
"""NCSN++ (deep) on CIFAR-10, VE SDE."""

from ml_collections import ConfigDict

from configs.ve import cifar10_ncsnpp_continuous


def get_config() -> ConfigDict:
    config = cifar10_ncsnpp_continuous.get_config()
    config.model.num_res_blocks = 8
    config.sampling.method = "pc"
    return config
