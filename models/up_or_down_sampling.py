# SPDX-License-Identifier: Apache-2.0
"""Resampling of images [B, H, W, C] by FIR filters, alone or together with a convolution (StyleGAN2, arXiv 1912.04958).

All filters are separable. Their taps along one axis are normalised to sum to one. A product with a constant banded
matrix filters an axis: it is quick on every device, and so are its derivatives of any order.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from models.convolution import conv2d
from models.layers import default_init, in_dtype_of

Image = Float[Array, "B H W C"]
Resampled = Float[Array, "B H2 W2 C2"]
Taps = Sequence[float | int]


@functools.lru_cache
def _filter_matrix(size: int, taps: tuple[float, ...], up: int, down: int, pad: tuple[int, int]) -> np.ndarray:
    """The matrix [out, size] that puts up - 1 zeros after each pixel, pads (crops if negative), filters, decimates."""
    stuffed = np.zeros((size * up, size))
    stuffed[::up] = np.eye(size)
    padded = np.pad(stuffed, ((max(pad[0], 0), max(pad[1], 0)), (0, 0)))
    padded = padded[max(-pad[0], 0) : len(padded) - max(-pad[1], 0)]
    length = len(padded) - len(taps) + 1
    # This is a convolution, not a correlation: the last tap meets the first pixel.
    rows = sum(tap * padded[i : i + length] for i, tap in enumerate(reversed(taps)))
    return np.asarray(rows)[::down]


def _filter_axis(x: Image, taps: Taps, axis: int, up: int, down: int, pad: tuple[int, int]) -> Resampled:
    matrix = jnp.asarray(_filter_matrix(x.shape[axis], tuple(taps), up, down, pad), x.dtype)
    spec = "oh,bhwc->bowc" if axis == 1 else "ow,bhwc->bhoc"
    return jnp.einsum(spec, matrix, x, precision=lax.Precision.HIGHEST)


def upfirdn_2d(x: Image, taps: Taps, up: int, down: int, pad_h: tuple[int, int], pad_w: tuple[int, int]) -> Resampled:
    """Upsamples by zeros, pads, filters by the outer product of `taps` with itself, and decimates."""
    return _filter_axis(_filter_axis(x, taps, 1, up, down, pad_h), taps, 2, up, down, pad_w)


def _normalised(taps: Taps | None, axis_gain: float | int) -> tuple[float, ...]:
    taps = (1.0, 1.0) if taps is None else tuple(taps)
    return tuple(axis_gain * tap / sum(taps) for tap in taps)


def _pad(excess: int, before: int = 0, after: int = 0) -> tuple[int, int]:
    return (excess + 1) // 2 + before, excess // 2 + after


def upsample_2d(x: Image, taps: Taps | None = None, gain: float | int = 1) -> Resampled:
    """FIR upsampling to [B, 2 H, 2 W, C]. Inside, a constant image is multiplied by `gain`. None: nearest neighbour."""
    taps = _normalised(taps, 2 * gain**0.5)
    pad = _pad(len(taps) - 2, before=1)
    return upfirdn_2d(x, taps, 2, 1, pad, pad)


def downsample_2d(x: Image, taps: Taps | None = None, gain: float | int = 1) -> Resampled:
    """FIR downsampling to [B, H / 2, W / 2, C]. A constant image is multiplied by `gain`. None: mean."""
    taps = _normalised(taps, gain**0.5)
    pad = _pad(len(taps) - 2)
    return upfirdn_2d(x, taps, 1, 2, pad, pad)


def naive_upsample_2d(x: Image) -> Resampled:
    """Nearest neighbour: [B, H, W, C] to [B, 2 H, 2 W, C]."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


def naive_downsample_2d(x: Image) -> Resampled:
    """Mean over 2 x 2 blocks: [B, H, W, C] to [B, H / 2, W / 2, C]."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


def upsample_conv_2d(x: Image, weight: Float[Array, "k k C O"], taps: Taps | None = None) -> Resampled:
    """Transposed convolution of stride 2, then the upsampling filter: [B, 2 H, 2 W, O]."""
    taps, size = _normalised(taps, 2), weight.shape[0]
    edge = (size - 1, max(size, 2) - 1)
    pad = _pad(len(taps) - 1 - size, before=1, after=1)
    return upfirdn_2d(conv2d(x, weight, dilation=2, padding=(edge, edge)), taps, 1, 1, pad, pad)


def conv_downsample_2d(x: Image, weight: Float[Array, "k k C O"], taps: Taps | None = None) -> Resampled:
    """The downsampling filter, then a convolution of stride 2: [B, H / 2, W / 2, O]."""
    taps = _normalised(taps, 1)
    pad = _pad(len(taps) - 3 + weight.shape[0])
    return conv2d(upfirdn_2d(x, taps, 1, 1, pad, pad), weight, stride=2, padding="VALID")


class Conv2d(nn.Module):
    """Convolution with bias, together with a FIR filter that doubles (`up`) or halves (`down`) the image."""

    features: int
    size: int = 3
    up: bool = False
    down: bool = False
    taps: Taps = (1, 3, 3, 1)

    @nn.compact
    def __call__(self, x: Image) -> Resampled:
        weight = self.param("weight", default_init(), (self.size, self.size, x.shape[-1], self.features))
        bias = self.param("bias", jax.nn.initializers.zeros, (self.features,))
        x, weight, bias = in_dtype_of(x, weight, bias)
        if self.up:
            x = upsample_conv_2d(x, weight, self.taps)
        elif self.down:
            x = conv_downsample_2d(x, weight, self.taps)
        else:
            x = conv2d(x, weight)
        return x + bias
