# SPDX-License-Identifier: Apache-2.0
"""2-D checkerboard, VE SDE."""

from configs.default_toy_configs import get_toy_configs


def get_config():
    config = get_toy_configs("vesde", "checkerboard")
    config.model.update(nf=128, num_layers=3, sigma_data=2.3)  # uniform on [-4, 4)
    return config
