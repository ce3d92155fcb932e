# SPDX-License-Identifier: Apache-2.0
"""8x8 patches of photographs, VE SDE, NCSN++: 2.973 ± 0.065 bits/dim (docs/data.md)."""

from configs.default_patches_configs import get_patches_configs


def get_config():
    config = get_patches_configs(size=8)
    config.training.sde = "vesde"
    config.model.update(sigma_min=0.005, sigma_max=8.0)
    return config
