# SPDX-License-Identifier: Apache-2.0
"""DDPM++ on CIFAR-10, sub-VP SDE."""

from ml_collections import ConfigDict

from configs.default_cifar10_configs import get_default_configs
from configs.default_configs import use_ddpmpp


def get_config() -> ConfigDict:
    config = get_default_configs()
    config.training.sde = "subvpsde"
    config.training.smallest_time = 1e-2
    config.sampling.smallest_time = 1e-2
    use_ddpmpp(config)
    config.model.ema_rate = 0.9999
    return config
