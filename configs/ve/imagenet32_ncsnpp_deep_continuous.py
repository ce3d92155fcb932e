# SPDX-License-Identifier: Apache-2.0
"""NCSN++ (deep) on ImageNet 32x32, VE SDE."""

from ml_collections import ConfigDict

from configs.ve import imagenet32_ncsnpp_continuous


def get_config() -> ConfigDict:
    config = imagenet32_ncsnpp_continuous.get_config()
    config.model.num_res_blocks = 8
    return config
