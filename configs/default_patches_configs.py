# SPDX-License-Identifier: Apache-2.0
"""Patches of natural photographs (scikit-learn's two, or those in `data.dir`), sized for two CPU cores."""

from ml_collections import ConfigDict

from configs.default_digits_configs import get_digits_configs


def get_patches_configs(size: int) -> ConfigDict:
    """The digits' network and training, on colour patches of 8 or 16 pixels, which have 256 levels."""
    config = get_digits_configs()
    config.data.update(dataset="PATCHES", image_size=size, num_channels=3, random_flip=True)
    config.model.update(nf=32, attn_resolutions=(size // 2,))
    config.training.batch_size = 128 if size <= 8 else 64
    return config
