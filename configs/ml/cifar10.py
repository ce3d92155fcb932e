# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10, the DDPM++ of `configs/vp/cifar10_ddpmpp_continuous.py` by the recipe for bits/dim. Not trained here."""

from configs.default_ml_configs import use_levels, use_maximum_likelihood
from configs.vp import cifar10_ddpmpp_continuous


def get_config():
    config = cifar10_ddpmpp_continuous.get_config()
    use_maximum_likelihood(config)
    use_levels(config)
    return config
