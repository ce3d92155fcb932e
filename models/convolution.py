# SPDX-License-Identifier: Apache-2.0
"""Two-dimensional convolution whose derivatives are as quick inside a loop as outside, on the CPU.

XLA on the CPU gives a convolution to its fast kernel if images are NHWC and weights HWIO. It brings other layouts to
that form in a program's entry computation alone (`conv_canonicalization.cc`), not in the body of a `lax.scan`; there a
convolution of another layout takes some 90 times as long. JAX's own gradients with respect to image and weights are of
such layouts. Here they are written as convolutions in the standard form, of arrays transposed beforehand; a barrier
keeps XLA from folding the transposition back into the convolution (benchmarks/unrolled_steps.py).
"""

from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

Image = Float[Array, "B H W C"]
Weight = Float[Array, "k k C O"]


def conv2d(x: Image, weight: Weight, stride: int = 1, dilation: int = 1, padding: Any = "SAME") -> Array:
    """sum_k x[stride o + k] weight[k], with dilation - 1 zeros between the pixels of x: [B, H, W, C] -> [B, H2, W2, O].

    `padding`: "SAME", "VALID" or (low, high) of each axis. Derivatives of any order, in forward and reverse mode.
    """
    if isinstance(padding, str):
        lengths = [(size - 1) * dilation + 1 for size in x.shape[1:3]]
        padding = tuple(lax.padtype_to_pads(lengths, weight.shape[:2], (stride, stride), padding))
    if jax.default_backend() != "cpu":
        return _convolve(x, weight, stride, dilation, padding)
    return _conv_p.bind(x, weight, stride=stride, dilation=dilation, padding=tuple(map(tuple, padding)))


def _convolve(x, weight, stride, dilation, padding, rhs_dilation: int = 1) -> Array:
    strides, dilations, rhs_dilations = (stride,) * 2, (dilation,) * 2, (rhs_dilation,) * 2
    return lax.conv_general_dilated(x, weight, strides, padding, dilations, rhs_dilations, ("NHWC", "HWIO", "NHWC"))


def _transpose_x(g, x, weight, *, stride, dilation, padding):
    """The cotangent of x: g, with zeros between its pixels, against the mirrored weights."""
    pads = []
    for size, out, k, (low, _) in zip(x.aval.shape[1:3], g.shape[1:3], weight.shape[:2], padding, strict=True):
        start = k - 1 - low
        pads.append((start, (size - 1) * dilation + k - ((out - 1) * stride + 1) - start))
    mirrored = lax.optimization_barrier(weight[::-1, ::-1].swapaxes(2, 3))
    return conv2d(g, mirrored, stride=dilation, dilation=stride, padding=pads)


def _transpose_weight(g, x, weight, *, stride, dilation, padding):
    """The cotangent of the weights: x against g, the batch in the place of the channels."""
    pads = []
    for size, out, k, (low, _) in zip(x.shape[1:3], g.shape[1:3], weight.aval.shape[:2], padding, strict=True):
        window, length = (out - 1) * stride + 1, (size - 1) * dilation + 1
        pads.append((low, k - 1 + window - length - low))
    x, g = lax.optimization_barrier((x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)))  # [C, H, W, B], [H2, W2, B, O]
    return _convolve(x, g, 1, dilation, pads, rhs_dilation=stride).transpose(1, 2, 0, 3)


def _batch(args, axes, **params) -> tuple[Array, int]:
    """vmap: over images alone, a larger batch; else XLA's own rule for grouped convolutions."""
    (x, weight), (x_axis, weight_axis) = args, axes
    if weight_axis is None:
        x = jax.numpy.moveaxis(x, x_axis, 0)
        out = _conv_p.bind(x.reshape(-1, *x.shape[2:]), weight, **params)
        return out.reshape(*x.shape[:2], *out.shape[1:]), 0
    return jax.vmap(lambda x, weight: _convolve(x, weight, **params), axes)(x, weight), 0


_conv_p: Any = Primitive("conv2d")
_conv_p.def_impl(jax.jit(_convolve, static_argnames=("stride", "dilation", "padding")))
_conv_p.def_abstract_eval(
    lambda x, weight, **params: jax.typeof(jax.eval_shape(lambda *args: _convolve(*args, **params), x, weight))
)
ad.defbilinear(_conv_p, _transpose_x, _transpose_weight)
batching.primitive_batchers[_conv_p] = _batch
mlir.register_lowering(_conv_p, mlir.lower_fun(_convolve, multiple_results=False))
