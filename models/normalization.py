# SPDX-License-Identifier: Apache-2.0
"""Normalisation of feature maps."""

import flax.linen as nn
from jaxtyping import Array, Float

from errors import UserError


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm over maps [..., `channels`] in groups of four channels, in 32 groups at most.

    Call it inside a compact method, which names the module. Raises UserError if the groups come out uneven.
    """
    num_groups = min(channels // 4, 32)
    if num_groups == 0 or channels % num_groups:
        raise UserError(
            f"{channels} channels do not fall into even groups for GroupNorm; "
            "let model.nf * model.ch_mult be multiples of 4 up to 128 and of 32 above"
        )
    return nn.GroupNorm(num_groups=num_groups)


def normalize(x: Float[Array, "*shape C"]) -> Float[Array, "*shape C"]:
    """`group_norm` of x, in x's type, computed in float32 even if that is bfloat16. Call it inside a compact method."""
    return group_norm(x.shape[-1])(x).astype(x.dtype)
