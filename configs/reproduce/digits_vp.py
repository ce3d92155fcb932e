# SPDX-License-Identifier: Apache-2.0
"""8x8 digits, VP, DDPM++: the first-order model from which each order continues."""

from configs.default_reproduce_configs import images
from configs.digits import vp_ddpmpp


def get_config():
    return images(vp_ddpmpp.get_config(), n_iters=2_000)
