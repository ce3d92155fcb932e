# SPDX-License-Identifier: Apache-2.0
"""8x8 digits, VP SDE, DDPM++."""

from configs.default_configs import use_ddpmpp
from configs.default_digits_configs import get_digits_configs


def get_config():
    config = get_digits_configs()
    config.training.sde = "vpsde"
    use_ddpmpp(config)
    return config
