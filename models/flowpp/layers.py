# SPDX-License-Identifier: Apache-2.0
"""The layers of the Flow++ networks (Ho et al. 2019, arXiv 1902.00275).

They are functions of the module that owns their parameters, `scope`: published checkpoints keep the parameters side by
side there, under names such as `block0_conv_c1_W`. Call them inside a compact method.

Initialisation depends on the data (Salimans & Kingma 2016, arXiv 1602.07868). Weights are drawn, then scaled so that
every output has the standard deviation `init_scale` over the batch and all pixels. The bias takes away the mean of that
output.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from models.convolution import conv2d
from models.layers import dropout

Features = Float[Array, "B H W C"]
Keys = Shaped[Array, "B *key"]  # one for each example

WEIGHT_STD = 0.05
GATE_SCALE = 0.1  # a residual branch starts small


def _all_but_last(x: Array) -> tuple[int, ...]:
    return tuple(range(x.ndim - 1))


def _amplification(weight: Array, output: Array, init_scale: float) -> Array:
    """The factor [C] that takes `output`, linear in `weight`, to the standard deviation `init_scale`.

    A deviation of the output below 1 % of that for inputs of unit variance counts as 1 %. Images of one colour would
    else ask for weights that blow up every other input.
    """
    norm = jnp.sqrt(jnp.sum(jnp.square(weight), axis=_all_but_last(weight)))
    return init_scale / jnp.maximum(jnp.std(output, axis=_all_but_last(output)), 0.01 * norm)


def _affine(scope, name, linear, shape, init_scale, weight_norm=False) -> Array:
    """`linear` of a weight of `shape`, plus a bias. With `weight_norm` the weight is g V / |V| for each output."""

    def init(key):
        weight = WEIGHT_STD * jax.random.normal(key, shape)
        return weight * _amplification(weight, linear(weight), init_scale)

    if weight_norm:
        v = scope.param(f"{name}_V", jax.nn.initializers.normal(WEIGHT_STD), shape)
        direction = v * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(v), axis=_all_but_last(v)), 1e-12))
        gain = scope.param(f"{name}_g", lambda _: _amplification(direction, linear(direction), init_scale))
        output = linear(direction * gain)
    else:
        output = linear(scope.param(f"{name}_W", init))
    return output + scope.param(f"{name}_b", lambda _: -jnp.mean(output, axis=_all_but_last(output)))


def dense(
    scope: nn.Module, name: str, x: Float[Array, "*shape C"], features: int, init_scale: float = 1.0
) -> Float[Array, "*shape O"]:
    """Affine map of the last axis."""
    return _affine(scope, name, lambda weight: x @ weight, (x.shape[-1], features), init_scale)


def conv(
    scope: nn.Module, name: str, x: Features, features: int, init_scale: float = 1.0, weight_norm: bool = False
) -> Float[Array, "B H W O"]:
    """3x3 convolution with bias. The kernel's axes are [W, H, C, O], or [H, W, C, O] if `weight_norm`, as published."""

    def linear(weight):
        return conv2d(x, weight if weight_norm else weight.swapaxes(0, 1))

    return _affine(scope, name, linear, (3, 3, x.shape[-1], features), init_scale, weight_norm)


def concat_elu(x: Features) -> Float[Array, "B H W C2"]:
    """[elu(x), elu(-x)], with twice the channels."""
    return jax.nn.elu(jnp.concatenate([x, -x], axis=-1))


def gate(x: Float[Array, "B H W C2"]) -> Features:
    """a sigmoid(b), where a and b are the first and second half of the channels."""
    a, b = jnp.split(x, 2, axis=-1)
    return a * jax.nn.sigmoid(b)


def layer_norm(scope: nn.Module, name: str, x: Features) -> Features:
    """Brings each pixel's channels to mean 0 and variance 1, then scales and shifts each channel."""
    shape = (1, 1, 1, x.shape[-1])
    scale = scope.param(f"{name}_g", jax.nn.initializers.ones, shape)
    shift = scope.param(f"{name}_b", jax.nn.initializers.zeros, shape)
    return jax.nn.standardize(x, axis=-1, epsilon=1e-5) * scale + shift


def gated_conv(
    scope: nn.Module,
    name: str,
    x: Features,
    context: Float[Array, "B H W E"] | None = None,
    *,
    weight_norm: bool = False,
    rate: float = 0.0,
    keys: Keys | None = None,
) -> Features:
    """Residual block with a gated branch. A context is added to the branch, whose last layer is then 1x1."""
    channels = x.shape[-1]
    h = conv(scope, f"{name}_c1", concat_elu(x), channels, weight_norm=weight_norm)
    if context is not None:
        h += dense(scope, f"{name}_a_proj", concat_elu(context), channels)
    h = dropout(concat_elu(h), rate, keys, f"{name}_c2")
    if context is not None:
        h = dense(scope, f"{name}_c2", h, 2 * channels, GATE_SCALE)
    else:
        h = conv(scope, f"{name}_c2", h, 2 * channels, GATE_SCALE, weight_norm)
    return x + gate(h)


def gated_attention(
    scope: nn.Module,
    name: str,
    x: Features,
    position: Float[Array, "H W C"],
    heads: int,
    *,
    rate: float = 0.0,
    keys: Keys | None = None,
) -> Features:
    """Residual block whose gated branch is attention of all pixels to all, with `heads` heads."""
    batch, height, width, channels = x.shape
    projected = dense(scope, f"{name}_proj1", x + position, 3 * channels)
    query, key, value = jnp.moveaxis(projected.reshape(batch, height * width, 3, heads, channels // heads), 2, 0)
    h = jax.nn.dot_product_attention(query, key, value).reshape(x.shape)  # scaled by sqrt(channels / heads)
    h = dropout(h, rate, keys, f"{name}_proj2")
    return x + gate(dense(scope, f"{name}_proj2", h, 2 * channels, GATE_SCALE))
