# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10, the U-Net of VDM (arXiv 2107.00630): full resolution throughout, 32 blocks. Not trained here.

Kept from DDPM++: the bias of the time embedding's projections, and what the network is told of the time.
"""

from configs.ml import cifar10


def get_config():
    config = cifar10.get_config()
    config.model.update(ch_mult=(1,), num_res_blocks=32, attn_resolutions=())
    config.model.skip_rescale = False
    return config
