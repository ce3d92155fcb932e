# SPDX-License-Identifier: Apache-2.0
"""1-D mixture of Gaussians, VP SDE."""

from configs.default_toy_configs import get_toy_configs


def get_config():
    return get_toy_configs("vpsde", "mog")
