# SPDX-License-Identifier: Apache-2.0
"""8x8 patches of photographs, VP SDE, DDPM++, times drawn for likelihood: 2.985 ± 0.066 bits/dim (docs/data.md)."""

from configs.default_configs import use_ddpmpp
from configs.default_patches_configs import get_patches_configs


def get_config():
    config = get_patches_configs(size=8)
    config.training.update(sde="vpsde", likelihood_weighting=True, importance_weighting=True)
    use_ddpmpp(config)
    return config
