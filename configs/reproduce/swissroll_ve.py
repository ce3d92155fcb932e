# SPDX-License-Identifier: Apache-2.0
"""The five swiss rolls with a network that learns in minutes at order 3."""

from configs.default_reproduce_configs import toy
from configs.default_toy_configs import get_toy_configs


def get_config():
    config = toy(get_toy_configs("vesde", "swissroll"), n_iters=10_000, snapshots=1)
    config.model.update(num_layers=3, sigma_data=4.1)  # four of the rolls sit at (+-4.5, +-4.5)
    return config
