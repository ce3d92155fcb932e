# SPDX-License-Identifier: Apache-2.0
"""NCSN++ on LSUN church_outdoor at 256x256, VE SDE."""

from ml_collections import ConfigDict

from configs.default_lsun_configs import get_default_configs


def get_config() -> ConfigDict:
    config = get_default_configs()
    config.training.sde = "vesde"
    config.data.category = "church_outdoor"
    config.model.sigma_max = 380.0
    config.model.ch_mult = (1, 1, 2, 2, 2, 2, 2)
    config.model.num_res_blocks = 2
    config.model.progressive = "output_skip"
    config.model.progressive_input = "input_skip"
    config.sampling.method = "pc"
    return config
