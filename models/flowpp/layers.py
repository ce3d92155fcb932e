# SPDX-License-Identifier: Apache-2.0
"""The layers of the Flow++ networks (Ho et al. 2019, arXiv 1902.00275).

They are functions of the module that owns their parameters, `scope`, because published checkpoints keep them side by
side there, under names such as `block0_conv_c1_W`. Call them inside a compact method.

Initialisation depends on the data (Salimans & Kingma 2016, arXiv 1602.07868): weights are drawn, then scaled so that
every output has the standard deviation `init_scale` over the batch and all pixels, and its bias takes away the mean of
that very output. (The public code computes the bias from a second draw of the weights, so it does not centre.)
"""

import zlib
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from models.convolution import conv2d

Features = Float[Array, "B H W C"]
Keys = Shaped[Array, "B *key"]  # one for each example, new style or old

WEIGHT_STD = 0.05
GATE_SCALE = 0.1  # a residual branch starts small


def _all_but_last(x: Array) -> tuple[int, ...]:
    return tuple(range(x.ndim - 1))


def _amplification(weight: Array, output: Array, init_scale: float) -> Array:
    """The factor [C] that takes `output`, linear in `weight`, to the standard deviation `init_scale`.

    Inputs that vary by less than 1 % of unit variance, such as images of one colour, count as 1 %: they would ask for
    weights that blow up every other input.
    """
    norm = jnp.sqrt(jnp.sum(jnp.square(weight), axis=_all_but_last(weight)))
    return init_scale / jnp.maximum(jnp.std(output, axis=_all_but_last(output)), 0.01 * norm)


def _scaled_weight(
    scope: nn.Module, name: str, shape: tuple[int, ...], linear: Callable[[Array], Array], init_scale: float
) -> Array:
    def init(key):
        weight = WEIGHT_STD * jax.random.normal(key, shape)
        return weight * _amplification(weight, linear(weight), init_scale)

    return scope.param(f"{name}_W", init)


def _normalized_weight(
    scope: nn.Module, name: str, shape: tuple[int, ...], linear: Callable[[Array], Array], init_scale: float
) -> Array:
    """Weight normalisation: g V / |V|, the norm over all axes but the last."""
    v = scope.param(f"{name}_V", jax.nn.initializers.normal(WEIGHT_STD), shape)
    direction = v * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(v), axis=_all_but_last(v)), 1e-12))
    return direction * scope.param(f"{name}_g", lambda _: _amplification(direction, linear(direction), init_scale))


def _add_bias(scope: nn.Module, name: str, output: Array) -> Array:
    return output + scope.param(f"{name}_b", lambda _: -jnp.mean(output, axis=_all_but_last(output)))


def dense(
    scope: nn.Module, name: str, x: Float[Array, "*shape C"], features: int, init_scale: float = 1.0
) -> Float[Array, "*shape O"]:
    """Affine map of the last axis."""

    def linear(weight):
        return x @ weight

    weight = _scaled_weight(scope, name, (x.shape[-1], features), linear, init_scale)
    return _add_bias(scope, name, linear(weight))


def conv(
    scope: nn.Module, name: str, x: Features, features: int, init_scale: float = 1.0, weight_norm: bool = False
) -> Float[Array, "B H W O"]:
    """3x3 convolution with bias. The kernel's axes are [W, H, C, O], with `weight_norm` [H, W, C, O], as published."""

    def linear(weight):
        return conv2d(x, weight if weight_norm else weight.swapaxes(0, 1))

    make_weight = _normalized_weight if weight_norm else _scaled_weight
    weight = make_weight(scope, name, (3, 3, x.shape[-1], features), linear, init_scale)
    return _add_bias(scope, name, linear(weight))


def concat_elu(x: Features) -> Float[Array, "B H W C2"]:
    """[elu(x), elu(-x)]: twice the channels."""
    return jax.nn.elu(jnp.concatenate([x, -x], axis=-1))


def gate(x: Float[Array, "B H W C2"]) -> Features:
    """a sigmoid(b) of the first and second half of the channels."""
    a, b = jnp.split(x, 2, axis=-1)
    return a * jax.nn.sigmoid(b)


def layer_norm(scope: nn.Module, name: str, x: Features) -> Features:
    """Each pixel's channels to mean 0 and variance 1, then a scale and a shift a channel."""
    shape = (1, 1, 1, x.shape[-1])
    scale = scope.param(f"{name}_g", jax.nn.initializers.ones, shape)
    shift = scope.param(f"{name}_b", jax.nn.initializers.zeros, shape)
    return jax.nn.standardize(x, axis=-1, epsilon=1e-5) * scale + shift


def dropout(name: str, x: Features, rate: float, keys: Keys | None) -> Features:
    """Each feature is 0 with probability `rate`, the others grow to keep the mean; nothing happens without keys.

    The mask is a function of the example's key and the layer's name alone.
    """
    if keys is None or rate == 0:
        return x

    def mask(key):
        return jax.random.bernoulli(jax.random.fold_in(key, zlib.crc32(name.encode())), 1 - rate, x.shape[1:])

    return jnp.where(jax.vmap(mask)(keys), x / (1 - rate), 0)


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
    """Residual block with a gated branch; with a context, that is added to the branch and the last layer is 1x1."""
    channels = x.shape[-1]
    h = conv(scope, f"{name}_c1", concat_elu(x), channels, weight_norm=weight_norm)
    if context is not None:
        h += dense(scope, f"{name}_a_proj", concat_elu(context), channels)
    h = dropout(f"{name}_c2", concat_elu(h), rate, keys)
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
    h = dropout(f"{name}_proj2", h, rate, keys)
    return x + gate(dense(scope, f"{name}_proj2", h, 2 * channels, GATE_SCALE))
