# SPDX-License-Identifier: Apache-2.0
"""Two-dimensional convolution whose derivatives are quick on the CPU, inside a loop as outside.

XLA on the CPU gives a convolution to its fast kernel if images are NHWC and weights HWIO. It brings other layouts to
that form in a program's entry computation alone (`conv_canonicalization.cc`), not in the body of a `lax.scan`; there a
convolution of another layout takes some 90 times as long. JAX's own gradients with respect to image and weights are of
such layouts, and that of the weights, with an image's height and width for those of a kernel, is slow in either form.
Here the first is written as a convolution in the standard form, of mirrored weights behind a barrier, which keeps XLA
from folding that back into the convolution; and the second as matrix products (benchmarks/convolution.py,
benchmarks/unrolled_steps.py).
"""

from typing import Any

import jax
import jax.numpy as jnp
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
    if not has_own_derivatives():
        return _convolve(x, weight, stride, dilation, padding)
    return _conv_p.bind(x, weight, stride=stride, dilation=dilation, padding=tuple(map(tuple, padding)))


def has_own_derivatives() -> bool:
    """Whether `conv2d` has the derivatives of this module, as on the CPU, or those of JAX, as on accelerators."""
    return jax.default_backend() == "cpu"


def _convolve(x, weight, stride, dilation, padding) -> Array:
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, weight, (stride,) * 2, padding, (dilation,) * 2, dimension_numbers=dimensions)


def _transpose_x(g, x, weight, *, stride, dilation, padding):
    """The cotangent of x: g, with zeros between its pixels, against the mirrored weights."""
    pads = []
    for size, out, k, (low, _) in zip(x.aval.shape[1:3], g.shape[1:3], weight.shape[:2], padding, strict=True):
        start = k - 1 - low
        pads.append((start, (size - 1) * dilation + k - ((out - 1) * stride + 1) - start))
    mirrored = lax.optimization_barrier(weight[::-1, ::-1].swapaxes(2, 3))
    return conv2d(g, mirrored, stride=dilation, dilation=stride, padding=pads)


def _transpose_weight(g, x, weight, *, stride, dilation, padding):
    """The cotangent of the weights, [k k C O], of which [i, j] is x^T g with one of the two moved by i and j pixels.

    With stride 1 that is g, which comes last: copies of x could be made, and held, long before.
    """
    rows, columns, channels, out = weight.aval.shape
    if stride > 1:
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*pads, dilation - 1) for pads in padding), (0, 0, 0)])
        return _moved_products(g, x, rows, columns, stride).reshape(rows, out, columns, channels).transpose(0, 2, 3, 1)
    pads = []
    for size, length, k, (low, _) in zip(x.shape[1:3], g.shape[1:3], (rows, columns), padding, strict=True):
        start = k - 1 - low
        pads.append((start, dilation * (size - 1) + k - length - start, 0))
    g = lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    mirrored = _moved_products(x, g, rows, columns, dilation).reshape(rows, channels, columns, out)
    return mirrored[::-1, :, ::-1].transpose(0, 2, 1, 3)


def _moved_products(a: Image, b: Float[Array, "B H2 W2 O"], rows: int, columns: int, stride: int) -> Array:
    """sum over images and pixels p of a[p]^T b[stride p + (i, j)], a product for each i: [rows, C, columns * O]."""
    _, height, width, channels = a.shape
    moved = [lax.slice_in_dim(b, j, j + stride * (width - 1) + 1, stride, axis=2) for j in range(columns)]
    a, b = a.reshape(-1, channels), lax.optimization_barrier(jnp.concatenate(moved, axis=-1))
    accumulated_in = jnp.promote_types(a.dtype, "float32")

    def row(i):
        pixels = lax.slice_in_dim(b, i, i + stride * (height - 1) + 1, stride, axis=1).reshape(len(a), -1)
        return jnp.einsum("pa,pb->ab", a, pixels, preferred_element_type=accumulated_in).astype(a.dtype)

    return jnp.stack([row(i) for i in range(rows)])


def _batch(args, axes, **params) -> tuple[Array, int]:
    """vmap: over images alone, a larger batch; else XLA's own rule for grouped convolutions."""
    (x, weight), (x_axis, weight_axis) = args, axes
    if weight_axis is None:
        x = jnp.moveaxis(x, x_axis, 0)
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
