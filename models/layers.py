# SPDX-License-Identifier: Apache-2.0
"""What the blocks of `layerspp.py` are built of: initialisation, convolution, activations, time embedding."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from errors import UserError
from models.convolution import conv2d

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "elu": nn.elu,
    "relu": nn.relu,
    "lrelu": functools.partial(nn.leaky_relu, negative_slope=0.2),
    "swish": nn.swish,
}


def get_activation(name: str) -> Callable[[Array], Array]:
    """The elementwise function called `name`."""
    return ACTIVATIONS[name]


@jax.custom_jvp
def softmax(x: Float[Array, "*shape N"]) -> Float[Array, "*shape N"]:
    """`jax.nn.softmax` over the last axis, with derivatives of every order in terms of the result."""
    return jax.nn.softmax(x)


@softmax.defjvp
def _softmax_jvp(primals, tangents):
    y, (dx,) = softmax(*primals), tangents
    return y, y * (dx - jnp.sum(y * dx, axis=-1, keepdims=True))


def default_init(scale: float = 1.0) -> Callable:
    """Uniform, variance `scale` / mean(fan in, fan out), as in DDPM (arXiv 2006.11239); scale 0 stands for 1e-10."""
    return jax.nn.initializers.variance_scaling(scale or 1e-10, "fan_avg", "uniform")


def in_dtype_of(x: Array, *params: Any, dtype: Any = None, inexact: bool = True) -> list[Any]:
    """x and parameters (None stays) in the type to compute in: bfloat16 if x is, else the wider one."""
    return promote_dtype(x, *params, dtype=jnp.bfloat16 if x.dtype == jnp.bfloat16 else dtype, inexact=inexact)


_PROMOTE: Any = in_dtype_of  # flax declares another signature than the one it calls


def _conv_of_flax(x, weight, strides, padding, **_) -> Array:
    return conv2d(x, weight, strides[0], padding=padding)


def conv(features: int, size: int = 3, stride: int = 1, init_scale: float = 1.0) -> nn.Conv:
    """Convolution [B, H, W, C] -> [B, H / stride, W / stride, features] with bias. Call it inside a compact method."""
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding="SAME",
        kernel_init=default_init(init_scale),
        promote_dtype=_PROMOTE,
        conv_general_dilated=_conv_of_flax,
    )


def dense(features: int, init_scale: float = 1.0) -> nn.Dense:
    """Affine map of the last axis. Call it inside a compact method."""
    return nn.Dense(features, kernel_init=default_init(init_scale), promote_dtype=_PROMOTE)


class NIN(nn.Module):
    """Affine map of the channels of each pixel, [..., C] -> [..., features]."""

    features: int
    init_scale: float = 0.1

    @nn.compact
    def __call__(self, x: Float[Array, "*shape C"]) -> Float[Array, "*shape O"]:
        weight = self.param("W", default_init(self.init_scale), (x.shape[-1], self.features))
        x, weight, bias = in_dtype_of(x, weight, self.param("b", jax.nn.initializers.zeros, (self.features,)))
        return x @ weight + bias


def get_timestep_embedding(t: Float[Array, "B"], dim: int, max_period: float = 10000.0) -> Float[Array, "B dim"]:
    """[sin(w t), cos(w t)] with dim // 2 frequencies w from 1 down to 1 / max_period; an odd dim ends in a zero.

    Made for t in [0, 999] (Vaswani et al. 2017, arXiv 1706.03762; DDPM, arXiv 2006.11239).
    """
    half = dim // 2
    if half < 2:
        raise UserError(f"a positional embedding needs 4 channels or more; raise model.nf={dim}")
    frequencies = jnp.exp(jnp.arange(half, dtype=jnp.float32) * (-math.log(max_period) / (half - 1)))
    angles = t[:, None] * frequencies
    embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))
