# SPDX-License-Identifier: Apache-2.0
"""The changes to `default_configs.py` that all LSUN 256x256 configs share."""

from ml_collections import ConfigDict

from configs.default_configs import get_default_configs as get_base_configs


def get_default_configs() -> ConfigDict:
    config = get_base_configs()
    config.training.batch_size = 50
    config.training.n_iters = 3_400_001
    config.training.snapshot_freq_for_preemption = 5000
    config.data.dataset = "LSUN"
    config.data.image_size = 256
    config.model.num_scales = 2000
    config.model.dropout = 0.0
    config.sampling.snr = 0.075
    config.eval.batch_size = 100
    config.eval.enable_sampling = False
    config.eval.begin_ckpt = config.eval.end_ckpt = 52
    return config
