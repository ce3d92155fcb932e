# SPDX-License-Identifier: Apache-2.0
"""The variational dequantiser of Flow++ (Ho et al. 2019, arXiv 1902.00275, section 3.1).

It is a flow from Gaussian noise to the noise that fills the gaps between the 256 levels of an image, conditioned on the
image. Parameter paths and shapes are those of the public code, so the modules are named after its classes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array, Float

from errors import UserError
from models.flowpp.layers import Keys, concat_elu, conv, gated_attention, gated_conv, layer_norm

Values = Float[Array, "*shape"]
Image = Float[Array, "B H W C"]
Half = Float[Array, "B H W2 C"]  # every second column, W2 = W / 2
Halves = tuple[Half, Half]
LogDet = Float[Array, ""] | Float[Array, "B"]  # log |det d output / d input| in nats

MIN_LOGSCALE = -7.0  # of a logistic component
POSITION_STD = 0.01
CONTEXT_HEADS = 4
HALVINGS = 40  # a bracket in float32 that is as wide as its ends are large has about 24 bits left to halve


class Mixture(NamedTuple):
    """Unnormalised log weights, means and log scales of K logistic distributions for each element."""

    logits: Float[Array, "*shape K"]
    means: Float[Array, "*shape K"]
    logscales: Float[Array, "*shape K"]


def mixture_logit(x: Values, mixture: Mixture) -> tuple[Values, Values]:
    """y = logit F(x) and log dy/dx, elementwise, for F = sum_k w_k sigmoid((x - mean_k) / scale_k).

    dy/dx = F'(x) / (F(x) (1 - F(x))). F and 1 - F are each a sum of positive terms, computed in logarithms, so neither
    end is cut off (arXiv 1902.00275, section 3.2).
    """
    z = (x[..., None] - mixture.means) * jnp.exp(-mixture.logscales)
    log_weights = jax.nn.log_softmax(mixture.logits)
    below, above = jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)
    log_cdf = jax.nn.logsumexp(log_weights + below, axis=-1)
    log_survival = jax.nn.logsumexp(log_weights + above, axis=-1)
    log_pdf = jax.nn.logsumexp(log_weights + below + above - mixture.logscales, axis=-1)
    return log_cdf - log_survival, log_pdf - log_cdf - log_survival


def inverse_mixture_logit(y: Values, mixture: Mixture) -> Values:
    """The x with logit F(x) = y, elementwise (see `mixture_logit`), by bisection and a Newton step.

    Component k alone reaches y at mean_k + scale_k y. The mixture reaches y between the least and greatest of these.
    """
    own = mixture.means + jnp.exp(mixture.logscales) * y[..., None]

    def halve(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        too_low = mixture_logit(middle, mixture)[0] < y
        return jnp.where(too_low, middle, low), jnp.where(too_low, high, middle)

    low, high = jax.lax.fori_loop(0, HALVINGS, halve, (own.min(axis=-1), own.max(axis=-1)))
    x = 0.5 * (low + high)
    reached, log_slope = mixture_logit(x, mixture)
    return x + (y - reached) * jnp.exp(-log_slope)


def split_columns(x: Image) -> Halves:
    """Even and odd columns, [B, H, W / 2, C] each: one channel is enough for the couplings."""
    return x[:, :, 0::2], x[:, :, 1::2]


def _sum(x: Array) -> Float[Array, "B"]:
    return jnp.sum(x, axis=(1, 2, 3))


class Norm(nn.Module):
    """Scales and shifts each element of both halves.

    At the start each channel has mean 0 and variance 1 over the batch and all pixels, where the public code takes each
    element's over the batch alone and overflows for few images.
    """

    @nn.compact
    def __call__(self, halves: Halves, inverse: bool = False) -> tuple[Halves, LogDet]:
        outputs, log_det = [], jnp.zeros(())
        for i, x in enumerate(halves):
            mean, std = jnp.mean(x, axis=(0, 1, 2)), jnp.maximum(jnp.std(x, axis=(0, 1, 2)), 1e-3)
            shape = x.shape[1:]
            # The values are bound now because flax may call an initialiser after the loop has moved on.
            scale = self.param(f"norm{i}_g", lambda _, std=std, shape=shape: jnp.broadcast_to(1 / std, shape))
            shift = self.param(f"norm{i}_b", lambda _, b=-mean / std, shape=shape: jnp.broadcast_to(b, shape))
            scale = jnp.maximum(scale, 1e-7)
            outputs.append((x - shift) / scale if inverse else x * scale + shift)
            log_det += jnp.sum(jnp.log(scale))
        return tuple(outputs), -log_det if inverse else log_det


class Pointwise(nn.Module):
    """An invertible linear map of each pixel's channels, one for each half; it starts near the identity."""

    @nn.compact
    def __call__(self, halves: Halves, inverse: bool = False) -> tuple[Halves, LogDet]:
        outputs, log_det = [], jnp.zeros(())
        for i, x in enumerate(halves):
            size = (x.shape[-1], x.shape[-1])
            weight = self.param(f"W{i}", lambda key, size=size: jnp.eye(*size) + 0.001 * jax.random.normal(key, size))
            outputs.append(x @ (jnp.linalg.inv(weight) if inverse else weight))
            log_det += x[0, ..., 0].size * jnp.linalg.slogdet(weight)[1]
        return tuple(outputs), -log_det if inverse else log_det


class Coupling(nn.Module):
    """Maps the second half by y = exp(s) logit F(x) + t and exchanges the halves.

    A network computes s, t and F, a mixture of logistics, from the first half. Fields: see `Dequantizer`.
    """

    filters: int
    components: int
    blocks: int
    heads: int
    deep: bool
    attention: bool
    weight_norm: bool

    @nn.compact
    def __call__(self, context: Array, halves: Halves, inverse: bool = False) -> tuple[Halves, LogDet]:
        fixed, x = reversed(halves) if inverse else halves
        numbers = self._network(fixed, context).reshape(*fixed.shape, 2 + 3 * self.components)
        s, t = jnp.tanh(numbers[..., 0]), numbers[..., 1]
        logits, means, logscales = jnp.split(numbers[..., 2:], 3, axis=-1)
        mixture = Mixture(logits, means, jnp.maximum(logscales, MIN_LOGSCALE))
        if inverse:
            x = inverse_mixture_logit((x - t) * jnp.exp(-s), mixture)
            return (fixed, x), -_sum(mixture_logit(x, mixture)[1] + s)
        y, log_slope = mixture_logit(x, mixture)
        return (jnp.exp(s) * y + t, fixed), _sum(log_slope + s)

    def _network(self, x: Half, context: Array) -> Array:
        """[B, H, W2, C] -> [B, H, W2, C (2 + 3 components)]."""
        outputs = x.shape[-1] * (2 + 3 * self.components)
        # It is part of every checkpoint, also if no attention reads it.
        position = self.param("pos_emb", jax.nn.initializers.normal(POSITION_STD), (*x.shape[1:3], self.filters))
        first, last = ("c1", "c2") if self.deep else ("proj_in", "proj_out")
        h = conv(self, first, x, self.filters, weight_norm=self.weight_norm)
        for i in range(self.blocks):
            h = gated_conv(self, f"block{i}_conv", h, context, weight_norm=self.weight_norm)
            h = layer_norm(self, f"block{i}_ln1", h)
            if self.attention:
                h = gated_attention(self, f"block{i}_attn", h, position, self.heads)
                h = layer_norm(self, f"block{i}_ln2", h)
        h = concat_elu(h) if self.deep else h
        # The public name contains the number of the last block.
        return conv(self, f"block{self.blocks - 1}_{last}", h, outputs, 0.1, self.weight_norm)


class Context(nn.Module):
    """Features [B, H, W / 2, filters] of the image, for the couplings. Fields: see `Dequantizer`."""

    filters: int
    blocks: int
    deep: bool
    attention: bool
    weight_norm: bool
    dropout: float

    @nn.compact
    def __call__(self, image: Image, dropout_keys: Keys | None = None) -> Float[Array, "B H W2 E"]:
        options: Any = dict(rate=self.dropout, keys=dropout_keys)
        h = jnp.concatenate(split_columns(image - 0.5), axis=-1)
        h = conv(self, "proj", h, self.filters, weight_norm=self.weight_norm)
        if self.deep:
            position = self.param("pos_emb_dq", jax.nn.initializers.normal(POSITION_STD), h.shape[1:])
        for i in range(self.blocks):
            h = gated_conv(self, f"c{i}", h, weight_norm=self.weight_norm, **options)
            if self.deep:
                h = layer_norm(self, f"dqln{i}", h)
            if self.deep and self.attention:
                h = gated_attention(self, f"dqattn{i}", h, position, CONTEXT_HEADS, **options)
                h = layer_norm(self, f"ln{i}", h)
        return h


class Dequantizer(nn.Module):
    """noise = f(u; image), invertible in u, from Gaussian u to noise in (0, 1); all [B, H, W, C], image in [0, 1].

    f splits the columns of u in two halves. `steps` times it applies Norm, Pointwise and Coupling and exchanges the
    halves. It ends in a sigmoid. The density of the noise, in nats [B], is
    log q(noise | image) = log N(u; 0, I) - log |det d noise / d u|.

    Attributes:
        filters, blocks, heads: channels, residual blocks and attention heads of a coupling's network.
        components: number of logistics in a mixture.
        pointwise: whether there are Pointwise layers.
        deep: the layout of the ImageNet networks: layer norms in the context network, one more nonlinearity in the
            couplings' network, other parameter names.
        attention: whether the couplings and, if `deep`, the context network have attention.
        weight_norm: whether the convolutions have weight normalisation.
        context_filters, context_blocks: channels and residual blocks of the network that takes the image.
        dropout: rate in that network, if there are dropout keys.

    Raises UserError for an odd number of columns and for filters that the heads do not divide.
    """

    filters: int
    components: int
    blocks: int
    heads: int
    steps: int
    pointwise: bool
    deep: bool
    attention: bool
    weight_norm: bool
    context_filters: int
    context_blocks: int
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.filters % self.heads:
            raise UserError(f"a dequantiser's filters={self.filters} must be a multiple of its heads={self.heads}")
        super().__post_init__()

    def __call__(self, u: Image, image: Image, dropout_keys: Keys | None = None) -> tuple[Image, Float[Array, "B"]]:
        """u -> noise and log q(noise | image) [B] in nats. Keys, one for each example, switch dropout on."""
        h, log_det = self._flow(u, image, inverse=False, dropout_keys=dropout_keys)
        log_det += _sum(jax.nn.log_sigmoid(h) + jax.nn.log_sigmoid(-h))
        return jax.nn.sigmoid(h), _sum(norm.logpdf(u)) - log_det

    def inverse(self, noise: Image, image: Image) -> tuple[Image, Float[Array, "B"]]:
        """noise in (0, 1) -> u and log q(noise | image) [B] in nats."""
        h = jnp.log(noise) - jnp.log1p(-noise)
        u, log_det = self._flow(h, image, inverse=True)
        log_det -= _sum(jnp.log(noise) + jnp.log1p(-noise))
        return u, _sum(norm.logpdf(u)) + log_det

    @nn.compact
    def _flow(self, x: Image, image: Image, inverse: bool, dropout_keys: Keys | None = None) -> tuple[Image, LogDet]:
        """The flow without its last sigmoid, and its log determinant."""
        if image.shape[2] % 2:
            raise UserError(
                f"data.image_size={image.shape[2]} is odd, but the dequantiser splits the columns in two; make it even"
            )
        layout: Any = dict(deep=self.deep, attention=self.attention, weight_norm=self.weight_norm)
        context_name = "DeepProcessor_0" if self.deep else "ShallowProcessor_0"
        coupling_name = "MixLogisticAttnCoupling" if self.attention else "MixLogisticCoupling"
        options: Any = dict(dropout=self.dropout, name=context_name, **layout)
        context = Context(self.context_filters, self.context_blocks, **options)(image, dropout_keys)
        sizes = self.filters, self.components, self.blocks, self.heads
        maps: list[Callable[[Halves, bool], tuple[Halves, LogDet]]] = []
        for i in range(self.steps):
            maps.append(Norm(name=f"Norm_{i}"))
            if self.pointwise:
                maps.append(Pointwise(name=f"Pointwise_{i}"))
            coupling = Coupling(*sizes, name=f"{coupling_name}_{i}", **layout)
            maps.append(functools.partial(coupling, context))
        halves, log_det = split_columns(x), jnp.zeros(())
        for apply in reversed(maps) if inverse else maps:
            halves, change = apply(halves, inverse)
            log_det += change
        return jnp.stack(halves, axis=3).reshape(x.shape), log_det
