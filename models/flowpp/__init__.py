# SPDX-License-Identifier: Apache-2.0
"""The Flow++ networks of variational dequantisation (Ho et al. 2019, arXiv 1902.00275), by `config.deq.network`."""

from typing import Any

from jaxtyping import Array, Float, PRNGKeyArray

from models import fresh_variables
from models.flowpp.dequantizer import Dequantizer

# Sizes and layouts are those of the public code; `small` is ours, for images of 8x8 and one channel. No public
# checkpoint of imagenet64 exists, since Flax refuses the names of its layers.
NETWORKS: dict[str, dict[str, Any]] = {
    "cifar10": dict(
        filters=96, components=32, blocks=2, heads=4, steps=4, pointwise=True, deep=False, attention=True,
        weight_norm=False, context_filters=32, context_blocks=3,
    ),
    "imagenet32": dict(
        filters=128, components=32, blocks=8, heads=4, steps=8, pointwise=False, deep=True, attention=True,
        weight_norm=True, context_filters=32, context_blocks=8,
    ),
    "imagenet64": dict(
        filters=96, components=4, blocks=5, heads=4, steps=4, pointwise=False, deep=True, attention=False,
        weight_norm=False, context_filters=32, context_blocks=5,
    ),
    "small": dict(
        filters=16, components=4, blocks=1, heads=2, steps=4, pointwise=False, deep=False, attention=True,
        weight_norm=False, context_filters=16, context_blocks=1,
    ),
}  # fmt: skip


def create_dequantizer(network: str, dropout: float = 0.0) -> Dequantizer:
    """Makes the dequantiser called `network`, a key of NETWORKS, for images of any even width."""
    return Dequantizer(**NETWORKS[network], dropout=dropout)


def init_params(
    model: Dequantizer, key: PRNGKeyArray, image: Float[Array, "B H W C"], u: Float[Array, "B H W C"]
) -> dict[str, Any]:
    """Fresh parameters for which every layer's outputs on this batch have mean 0 and a known spread (see `layers`).

    The batch is images in [0, 1] and standard normal u. All devices and all starts need the same images.
    """
    return fresh_variables(model, key, u, image)["params"]
