# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST at 16x16, VE, the digits' network: the first-order model from which each order continues."""

from configs.reproduce import digits_ve


def get_config():
    config = digits_ve.get_config()
    config.data.update(dataset="FASHION_MNIST", image_size=16)
    config.training.batch_size = 64
    config.model.update(attn_resolutions=(8,), sigma_max=8.0)
    config.eval.update(num_examples=128, num_samples=64)
    return config
