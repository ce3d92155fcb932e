# SPDX-License-Identifier: Apache-2.0
"""The mixture of `configs/toy/mog_ve.py`, evaluated after 5,000, 10,000, 15,000 and 20,000 steps."""

from configs.default_reproduce_configs import toy
from configs.toy import mog_ve


def get_config():
    return toy(mog_ve.get_config(), n_iters=20_000, snapshots=4)
