# SPDX-License-Identifier: Apache-2.0
"""Blocks of NCSN++ and DDPM++ (Song et al. 2021, arXiv 2011.13456).

The classes' names and the order in which a block creates its parts name the parameters, as in the published
checkpoints: they must not change.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models import up_or_down_sampling as resampling
from models.layers import NIN, conv, dense, normalize, softmax

Image = Float[Array, "B H W C"]
Resized = Float[Array, "B H2 W2 C2"]
TimeEmbedding = Float[Array, "B E"]
Taps = resampling.Taps


def add_skip(x: Image, h: Image, rescale: bool) -> Image:
    """x + h, divided by sqrt(2) if `rescale` so that the variance stays."""
    return (x + h) / math.sqrt(2) if rescale else x + h


class GaussianFourierProjection(nn.Module):
    """[sin(2 pi W x), cos(2 pi W x)] with W ~ N(0, scale^2) [size], fixed unless `trainable`: [B] -> [B, 2 size]."""

    size: int
    scale: float
    trainable: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B"]) -> TimeEmbedding:
        weight = self.param("W", jax.nn.initializers.normal(self.scale), (self.size,))
        if not self.trainable:
            weight = jax.lax.stop_gradient(weight)
        angles = x[:, None] * weight * 2 * jnp.pi
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Combine(nn.Module):
    """Brings x to the channels of y and adds it ("sum") or puts it before y ("cat")."""

    method: str

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], y: Float[Array, "B H W D"]) -> Float[Array, "B H W _"]:
        h = conv(y.shape[-1], size=1)(x)
        return h + y if self.method == "sum" else jnp.concatenate([h, y], axis=-1)


class AttnBlockpp(nn.Module):
    """Residual self-attention over all pixels, one head: softmax(q k^T / sqrt(C)) v."""

    skip_rescale: bool
    init_scale: float

    @nn.compact
    def __call__(self, x: Image) -> Image:
        batch, height, width, channels = x.shape
        h = normalize(x)
        q, k, v = (NIN(channels)(h).reshape(batch, height * width, channels) for _ in range(3))
        attention = softmax(jnp.einsum("bic,bjc->bij", q / math.sqrt(channels), k))
        h = jnp.einsum("bij,bjc->bic", attention, v).reshape(x.shape)
        return add_skip(x, NIN(channels, init_scale=self.init_scale)(h), self.skip_rescale)


class _Resampler(nn.Module):
    with_conv: bool
    fir: bool
    fir_kernel: Taps
    features: int | None = None  # None: C; with_conv only
    conv_size: int = 3

    up = True

    @nn.compact
    def __call__(self, x: Image) -> Resized:
        features = self.features or x.shape[-1]
        if not self.with_conv:
            return resample(x, self.fir_kernel if self.fir else None, self.up)
        if self.fir:
            options = {"up": self.up, "down": not self.up, "taps": self.fir_kernel}
            return resampling.Conv2d(features, self.conv_size, **options)(x)
        if self.up:
            return conv(features, self.conv_size)(resampling.naive_upsample_2d(x))
        return conv(features, self.conv_size, stride=2)(x)


class Upsample(_Resampler):
    """[B, H, W, C] -> [B, 2 H, 2 W, features], by FIR filter or nearest neighbour, and convolution if `with_conv`."""


class Downsample(_Resampler):
    """[B, H, W, C] -> [B, H / 2, W / 2, features], by FIR filter, mean or, if `with_conv`, convolution of stride 2."""

    up = False


def resample(x: Image, taps: Taps | None, up: bool) -> Resized:
    """Doubles (`up`) or halves the image, by the FIR filter `taps` or, if None, by nearest neighbour or mean."""
    if taps is None:
        return resampling.naive_upsample_2d(x) if up else resampling.naive_downsample_2d(x)
    return resampling.upsample_2d(x, taps) if up else resampling.downsample_2d(x, taps)


class _ResnetBlock(nn.Module, kw_only=True):
    act: Callable
    dropout: float
    skip_rescale: bool
    init_scale: float
    features: int | None = None  # None: C
    conv_size: int = 3

    def _convolutions(self, h: Image, features: int, temb: TimeEmbedding | None, train: bool) -> Resized:
        h = conv(features, self.conv_size)(h)
        if temb is not None:
            h += dense(features)(self.act(temb))[:, None, None, :].astype(h.dtype)
        h = self.act(normalize(h))
        h = nn.Dropout(self.dropout)(h, deterministic=not train)
        return conv(features, self.conv_size, init_scale=self.init_scale)(h)


class ResnetBlockDDPMpp(_ResnetBlock):
    """Residual block of DDPM: [B, H, W, C], time embedding [B, E] or None -> [B, H, W, features]."""

    conv_shortcut: bool = False  # a convolution, not a NIN, where the number of channels changes

    @nn.compact
    def __call__(self, x: Image, temb: TimeEmbedding | None, train: bool = False) -> Resized:
        features = self.features or x.shape[-1]
        h = self._convolutions(self.act(normalize(x)), features, temb, train)
        if x.shape[-1] != features:
            x = conv(features, self.conv_size)(x) if self.conv_shortcut else NIN(features)(x)
        return add_skip(x, h, self.skip_rescale)


class ResnetBlockBigGANpp(_ResnetBlock):
    """Residual block of BigGAN (arXiv 1809.11096), resampling before its first convolution if `up` or `down`.

    [B, H, W, C], time embedding [B, E] or None -> [B, H, W, features], or with H and W doubled or halved.
    """

    fir: bool
    fir_kernel: Taps
    up: bool = False
    down: bool = False

    @nn.compact
    def __call__(self, x: Image, temb: TimeEmbedding | None, train: bool = False) -> Resized:
        channels, features = x.shape[-1], self.features or x.shape[-1]
        h = self.act(normalize(x))
        if self.up or self.down:
            taps = self.fir_kernel if self.fir else None
            h, x = resample(h, taps, self.up), resample(x, taps, self.up)
        h = self._convolutions(h, features, temb, train)
        if channels != features or self.up or self.down:
            x = conv(features, size=1)(x)
        return add_skip(x, h, self.skip_rescale)
