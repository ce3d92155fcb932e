# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST at 16x16, VP: five times the steps and more test images; hours on a CPU."""

from configs.default_reproduce_configs import images
from configs.reproduce import fashion_vp


def get_config():
    config = images(fashion_vp.get_config(), n_iters=10_000)
    config.eval.update(num_examples=512, num_samples=64)
    return config
