# SPDX-License-Identifier: Apache-2.0
"""As `ve_ncsnpp.py`, trained on the 8-bit levels as they are: what a variational dequantiser can gain on."""

from configs.digits import ve_ncsnpp


def get_config():
    config = ve_ncsnpp.get_config()
    config.data.uniform_dequantization = False
    config.model.sigma_min = 0.002
    return config
