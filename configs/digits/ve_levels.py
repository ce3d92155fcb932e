# SPDX-License-Identifier: Apache-2.0
"""`ve_ncsnpp.py`, trained on the undequantised levels, so that a variational dequantiser has something to gain."""

from configs.digits import ve_ncsnpp


def get_config():
    config = ve_ncsnpp.get_config()
    config.data.uniform_dequantization = False
    config.model.sigma_min = 0.03  # half the distance of two levels
    return config
