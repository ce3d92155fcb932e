# SPDX-License-Identifier: Apache-2.0
"""Resampling of images [B, H, W, C] by FIR filters, alone or together with a convolution (StyleGAN2, arXiv 1912.04958).

All filters are separable and given by their taps along one axis; they are normalised to sum to one. An axis is
filtered by a product with a constant banded matrix: quick on every device, with derivatives of any order of the same
kind. On the CPU a depthwise convolution is slow, and a sum of shifted slices is fused by XLA into what comes before it,
which is then computed again for every tap.
"""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from models.convolution import conv2d
from models.layers import in_dtype_of

Image = Float[Array, "B H W C"]
Resampled = Float[Array, "B H2 W2 C2"]
Taps = Sequence[float | int]


@functools.lru_cache
def _filter_matrix(size: int, taps: tuple[float, ...], up: int, down: int, pad: tuple[int, int]) -> np.ndarray:
    """The matrix [out, size] of: put up - 1 zeros after each pixel, pad (crop where negative), convolve, decimate."""
    stuffed = np.zeros((size * up, size))
    stuffed[::up] = np.eye(size)
    padded = np.pad(stuffed, ((max(pad[0], 0), max(pad[1], 0)), (0, 0)))
    padded = padded[max(-pad[0], 0) : len(padded) - max(-pad[1], 0)]
    length = len(padded) - len(taps) + 1
    # a convolution, not a correlation: the last tap meets the first pixel
    rows = sum(tap * padded[i : i + length] for i, tap in enumerate(reversed(taps)))
    return np.asarray(rows)[::down]


def _filter_axis(x: Image, taps: Taps, axis: int, up: int, down: int, pad: tuple[int, int]) -> Resampled:
    matrix = jnp.asarray(_filter_matrix(x.shape[axis], tuple(taps), up, down, pad), x.dtype)
    spec = "oh,bhwc->bowc" if axis == 1 else "ow,bhwc->bhoc"
    return jnp.einsum(spec, matrix, x, precision=lax.Precision.HIGHEST)


def upfirdn_2d(x: Image, taps: Taps, up: int, down: int, pad_h: tuple[int, int], pad_w: tuple[int, int]) -> Resampled:
    """Upsample by zeros, pad, filter by the outer product of `taps` with itself as it stands, and decimate."""
    return _filter_axis(_filter_axis(x, taps, 1, up, down, pad_h), taps, 2, up, down, pad_w)


def _normalised(taps: Taps | None, factor: int, axis_gain: float | int) -> tuple[float, ...]:
    taps = (1.0,) * factor if taps is None else tuple(taps)
    return tuple(axis_gain * tap / sum(taps) for tap in taps)


def upsample_2d(x: Image, taps: Taps | None = None, factor: int = 2, gain: float | int = 1) -> Resampled:
    """FIR upsampling to [B, factor H, factor W, C]; a constant image is multiplied by `gain` inside. None: nearest."""
    taps = _normalised(taps, factor, factor * gain**0.5)
    excess = len(taps) - factor
    pad = ((excess + 1) // 2 + factor - 1, excess // 2)
    return upfirdn_2d(x, taps, factor, 1, pad, pad)


def downsample_2d(x: Image, taps: Taps | None = None, factor: int = 2, gain: float | int = 1) -> Resampled:
    """FIR downsampling to [B, H / factor, W / factor, C], a constant image is multiplied by `gain`. None: mean."""
    taps = _normalised(taps, factor, gain**0.5)
    excess = len(taps) - factor
    pad = ((excess + 1) // 2, excess // 2)
    return upfirdn_2d(x, taps, 1, factor, pad, pad)


def naive_upsample_2d(x: Image, factor: int = 2) -> Resampled:
    """Nearest neighbour: [B, H, W, C] to [B, factor H, factor W, C]."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, factor, width, factor, channels))
    return x.reshape(batch, height * factor, width * factor, channels)


def naive_downsample_2d(x: Image, factor: int = 2) -> Resampled:
    """Mean over factor x factor blocks: [B, H, W, C] to [B, H / factor, W / factor, C]."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // factor, factor, width // factor, factor, channels).mean(axis=(2, 4))


def upsample_conv_2d(x: Image, weight: Float[Array, "k k C O"], taps: Taps | None = None, factor: int = 2) -> Resampled:
    """Transposed convolution of stride `factor`, then the upsampling filter: [B, factor H, factor W, O]."""
    taps = _normalised(taps, factor, factor)
    size = weight.shape[0]
    edge = (size - 1, max(size, factor) - 1)
    x = conv2d(x, weight, dilation=factor, padding=(edge, edge))
    excess = len(taps) - factor - (size - 1)
    pad = ((excess + 1) // 2 + factor - 1, excess // 2 + 1)
    return upfirdn_2d(x, taps, 1, 1, pad, pad)


def conv_downsample_2d(
    x: Image, weight: Float[Array, "k k C O"], taps: Taps | None = None, factor: int = 2
) -> Resampled:
    """The downsampling filter, then a convolution of stride `factor`: [B, H / factor, W / factor, O]."""
    taps = _normalised(taps, factor, 1)
    excess = len(taps) - factor + weight.shape[0] - 1
    pad = ((excess + 1) // 2, excess // 2)
    return conv2d(upfirdn_2d(x, taps, 1, 1, pad, pad), weight, stride=factor, padding="VALID")


class Conv2d(nn.Module):
    """Convolution with bias, doubling (`up`) or halving (`down`) the image by a FIR filter on the way."""

    features: int
    kernel_init: Callable
    size: int = 3
    up: bool = False
    down: bool = False
    taps: Taps = (1, 3, 3, 1)

    @nn.compact
    def __call__(self, x: Image) -> Resampled:
        weight = self.param("weight", self.kernel_init, (self.size, self.size, x.shape[-1], self.features))
        bias = self.param("bias", jax.nn.initializers.zeros, (self.features,))
        x, weight, bias = in_dtype_of(x, weight, bias)
        if self.up:
            x = upsample_conv_2d(x, weight, self.taps)
        elif self.down:
            x = conv_downsample_2d(x, weight, self.taps)
        else:
            x = conv2d(x, weight)
        return x + bias
