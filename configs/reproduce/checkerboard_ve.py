# SPDX-License-Identifier: Apache-2.0
"""The checkerboard with a network that learns in minutes at order 3."""

from configs.default_reproduce_configs import toy
from configs.toy import checkerboard_ve


def get_config():
    config = toy(checkerboard_ve.get_config(), n_iters=10_000, snapshots=1)
    config.model.nf = 64
    return config
