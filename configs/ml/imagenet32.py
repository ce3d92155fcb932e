# SPDX-License-Identifier: Apache-2.0
"""ImageNet32, DDPM++ of `configs/vp/imagenet32_ddpmpp_continuous.py` by the recipe for bits/dim, not trained here."""

from configs.default_ml_configs import use_levels, use_maximum_likelihood
from configs.vp import imagenet32_ddpmpp_continuous


def get_config():
    config = imagenet32_ddpmpp_continuous.get_config()
    use_maximum_likelihood(config)
    use_levels(config)
    return config
