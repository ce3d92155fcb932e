# SPDX-License-Identifier: Apache-2.0
"""NCSN++ on CIFAR-10, VE SDE."""

from ml_collections import ConfigDict

from configs.default_cifar10_configs import get_default_configs


def get_config() -> ConfigDict:
    config = get_default_configs()
    config.training.sde = "vesde"
    return config
