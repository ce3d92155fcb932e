# SPDX-License-Identifier: Apache-2.0
"""Two-dimensional convolution whose derivatives are quick on the CPU, inside a loop as outside.

XLA on the CPU gives a convolution to its fast kernel if images are NHWC and weights HWIO. JAX's gradients have other
layouts, which XLA brings to this form outside of loops alone (`conv_canonicalization.cc`). That of the weights, whose
kernel is as large as the image, is slow in either form. Here the gradient of the image is a convolution in the standard
form, of mirrored weights, and that of the weights is matrix products (benchmarks/step.py, convolution.py).
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

    `padding` is "SAME", "VALID" or (low, high) for each axis. There are derivatives of any order, in both modes.
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
    """The cotangent of x: the convolution of g, with zeros between its pixels, by the mirrored weights."""
    pads = []
    for size, out, k, (low, _) in zip(x.aval.shape[1:3], g.shape[1:3], weight.shape[:2], padding, strict=True):
        start = k - 1 - low
        pads.append((start, (size - 1) * dilation + k - ((out - 1) * stride + 1) - start))
    mirrored = lax.optimization_barrier(weight[::-1, ::-1].swapaxes(2, 3))  # else XLA folds the mirroring into `conv2d`
    return conv2d(g, mirrored, stride=dilation, dilation=stride, padding=pads)


def _transpose_weight(g, x, weight, *, stride, dilation, padding):
    """The cotangent [k k C O] of the weights. Its entry [i, j] is x^T g with x or g moved by i and j pixels.

    With stride 1 it moves g, which is known last: XLA could make copies of x long before and hold them.
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
    """Sums a[p]^T b[stride p + (i, j)] over images and pixels p, by a product for each i: [rows, C, columns * O]."""
    _, height, width, channels = a.shape
    moved = [lax.slice_in_dim(b, j, j + stride * (width - 1) + 1, stride, axis=2) for j in range(columns)]
    a, b = a.reshape(-1, channels), lax.optimization_barrier(jnp.concatenate(moved, axis=-1))
    accumulated_in = jnp.promote_types(a.dtype, "float32")

    def row(i):
        pixels = lax.slice_in_dim(b, i, i + stride * (height - 1) + 1, stride, axis=1).reshape(len(a), -1)
        return jnp.einsum("pa,pb->ab", a, pixels, preferred_element_type=accumulated_in).astype(a.dtype)

    return jnp.stack([row(i) for i in range(rows)])


def _batch(args, axes, **params) -> tuple[Array, int]:
    """The rule of vmap: a larger batch if it maps images alone, else XLA's own rule for grouped convolutions."""
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
