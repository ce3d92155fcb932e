# SPDX-License-Identifier: Apache-2.0
"""8x8 digits, VE, NCSN++: the first-order model from which each order continues."""

from configs.default_reproduce_configs import images
from configs.digits import ve_ncsnpp


def get_config():
    return images(ve_ncsnpp.get_config(), n_iters=2_000)
