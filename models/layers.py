# SPDX-License-Identifier: Apache-2.0
"""The parts of the networks' blocks: activations, normalisation, dropout, affine maps, time embedding.

Call `conv`, `dense` and `normalize` inside a compact method.
"""

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float, Shaped

from errors import UserError
from models.convolution import conv2d

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "elu": nn.elu,
    "relu": nn.relu,
    "lrelu": functools.partial(nn.leaky_relu, negative_slope=0.2),
    "swish": nn.swish,
}


@jax.custom_jvp
def softmax(x: Float[Array, "*shape N"]) -> Float[Array, "*shape N"]:
    """`jax.nn.softmax` over the last axis, whose derivatives of every order are in terms of the result."""
    return jax.nn.softmax(x)


@softmax.defjvp
def _softmax_jvp(primals, tangents):
    y, (dx,) = softmax(*primals), tangents
    return y, y * (dx - jnp.sum(y * dx, axis=-1, keepdims=True))


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of maps [..., `channels`] in groups of four channels, at most 32 groups; UserError if uneven."""
    num_groups = min(channels // 4, 32)
    if num_groups == 0 or channels % num_groups:
        raise UserError(
            f"{channels} channels do not fall into even groups for GroupNorm; "
            "let model.nf * model.ch_mult be multiples of 4 up to 128 and of 32 above"
        )
    return nn.GroupNorm(num_groups=num_groups)


def normalize(x: Float[Array, "*shape C"]) -> Float[Array, "*shape C"]:
    """`group_norm` of x, in float32 or wider, returned in x's type."""
    return group_norm(x.shape[-1])(x).astype(x.dtype)


def dropout(
    x: Float[Array, "B *shape"], rate: float, keys: Shaped[Array, "B *key"] | None, name: str
) -> Float[Array, "B *shape"]:
    """Zeroes each entry with probability `rate` and scales the others to keep the mean; without keys it returns x.

    An example's mask is a function of its key and the layer's `name` alone.
    """
    if keys is None or rate == 0:
        return x

    def mask(key):
        return jax.random.bernoulli(jax.random.fold_in(key, zlib.crc32(name.encode())), 1 - rate, x.shape[1:])

    return jnp.where(jax.vmap(mask)(keys), x / (1 - rate), 0)


def default_init(scale: float = 1.0) -> Callable:
    """Uniform of variance `scale` / mean(fan in, fan out), as in DDPM (arXiv 2006.11239). Scale 0 stands for 1e-10."""
    return jax.nn.initializers.variance_scaling(scale or 1e-10, "fan_avg", "uniform")


def in_dtype_of(x: Array, *params: Any, dtype: Any = None, inexact: bool = True) -> list[Any]:
    """x and the parameters in one type: bfloat16 if x is, else the widest. A parameter may be None."""
    return promote_dtype(x, *params, dtype=jnp.bfloat16 if x.dtype == jnp.bfloat16 else dtype, inexact=inexact)


_PROMOTE: Any = in_dtype_of  # flax calls another signature than it declares


def _conv_of_flax(x, weight, strides, padding, **_) -> Array:
    return conv2d(x, weight, strides[0], padding=padding)


def conv(features: int, size: int = 3, stride: int = 1, init_scale: float = 1.0) -> nn.Conv:
    """Convolution [B, H, W, C] -> [B, H / stride, W / stride, features] with bias."""
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
    """Affine map of the last axis."""
    return nn.Dense(features, kernel_init=default_init(init_scale), promote_dtype=_PROMOTE)


class NIN(nn.Module):
    """Affine map of the channels of each pixel, [..., C] -> [..., features]."""

    features: int
    init_scale: float = 0.1

    @nn.compact
    def __call__(self, x: Float[Array, "*shape C"]) -> Float[Array, "*shape O"]:
        weight = self.param("W", default_init(self.init_scale), (x.shape[-1], self.features))
        x, weight, bias = in_dtype_of(x, weight, self.param("b", jax.nn.initializers.zeros, (self.features,)))
        return conv2d(x, weight[None, None]) + bias


def get_timestep_embedding(t: Float[Array, "B"], dim: int) -> Float[Array, "B dim"]:
    """[sin(w t), cos(w t)] with dim // 2 frequencies w from 1 down to 1e-4. An odd dim ends in a zero.

    The range suits t in [0, 999] (Vaswani et al. 2017, arXiv 1706.03762; DDPM, arXiv 2006.11239).
    """
    half = dim // 2
    if half < 2:
        raise UserError(f"a positional embedding needs 4 channels or more; raise model.nf={dim}")
    frequencies = jnp.exp(jnp.arange(half, dtype=jnp.float32) * (-math.log(10000.0) / (half - 1)))
    angles = t[:, None] * frequencies
    embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


def with_fourier_features(x: Float[Array, "*shape C"], powers: tuple[int, ...]) -> Float[Array, "*shape O"]:
    """x, and for each n of `powers` the channels sin(2^n 2 pi x) and cos(2^n 2 pi x): O = C (1 + 2 len(powers)).

    They show the network differences of one level of the pixels (VDM, arXiv 2107.00630, appendix C).
    """
    angles = [2 * math.pi * 2.0**n * x for n in powers]
    return jnp.concatenate([x, *(f(angle) for angle in angles for f in (jnp.sin, jnp.cos))], axis=-1)
