# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST at 16x16, VP, the digits' network: the first-order model from which each order continues."""

from configs.reproduce import digits_vp


def get_config():
    config = digits_vp.get_config()
    config.data.update(dataset="FASHION_MNIST", image_size=16)
    config.training.batch_size = 64
    config.model.attn_resolutions = (8,)
    config.eval.update(num_examples=128, num_samples=64)
    return config
