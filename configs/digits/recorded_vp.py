# SPDX-License-Identifier: Apache-2.0
"""The digits as colour images, for the network of the recorded public checkpoint tests/golden/ckpt_vp/checkpoint_3."""

from configs.digits import vp_ddpmpp


def get_config():
    config = vp_ddpmpp.get_config()
    config.data.num_channels = 3
    config.model.update(nf=8, ema_rate=0.6)
    config.eval.gaussian_baseline = False
    return config
