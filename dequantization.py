# SPDX-License-Identifier: Apache-2.0
"""Variational dequantisation (Ho et al. 2019, arXiv 1902.00275): continuous images from 8-bit ones, and its loss.

An image has integer levels k in {0, ..., 255}. With noise v in [0, 1)^D, v ~ q(v | k), and a density p of
(k + v) / 256, log2 P(k) >= E[log2 p((k + v) / 256) - log2 q(v | k)] - 8 D. Uniform noise is q = 1; a flow that is
trained to raise the right-hand side gives a tighter bound.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from likelihood import ScoreFn, bits_per_dim, bound_integrand, bound_offset, bound_prior, inverse_time_density
from sde_lib import SDE

Batch = Float[Array, "B *shape"]
PerExample = Float[Array, "B"]
Scaler = Callable[[Array], Array]
# (params, image01 [B, ...], example index in the global batch [B], key) -> (mean loss, terms [B] by name)
LossFn = Callable[[Any, Array, Array, PRNGKeyArray], tuple[Array, dict[str, Array]]]


def dequantize(
    model: nn.Module, params: Any, image01: Batch, u: Batch, dropout_keys: Shaped[Array, "B *key"] | None = None
) -> tuple[Batch, PerExample]:
    """x01 = (k + noise) / 256 [B, ...] for k = 255 image01, and log q(noise | image) [B] in nats.

    The network `model` takes u ~ N(0, I) [B, ...] to the noise (see `models.flowpp`). floor(256 x01) is k exactly:
    where k + noise would round up to k + 1 in floating point, it stays one step below.

    Args:
        image01: multiples of 1/255 in [0, 1]; rounding errors in them do not matter.
        dropout_keys: one for each example; dropout is on if they are given.
    """
    flow: Any = model
    noise, log_q = flow.apply({"params": params}, u, image01, dropout_keys)
    level = jnp.round(255 * image01)
    return jnp.minimum(level + noise, jnp.nextafter(level + 1, level)) / 256, log_q


class Draws(NamedTuple):
    """The randomness of the loss of a batch: K times, each with its noise, an example."""

    u: Float[Array, "B *shape"]  # what becomes the dequantisation noise
    prior_noise: Float[Array, "B *shape"]  # at T
    offset_noise: Float[Array, "B *shape"]  # at eps
    time_u: Float[Array, "B K"]  # uniform in [0, 1)
    noise: Float[Array, "B K *shape"]


def draw(key: PRNGKeyArray, index: Int[Array, "B"], shape: tuple[int, ...], num_time_samples: int = 1) -> Draws:
    """The draws of each example: a function of (key, index) alone, whatever the batch and the device."""

    def draw_one(i):
        keys = jax.random.split(jax.random.fold_in(key, i), 5)
        u, prior_noise, offset_noise = (jax.random.normal(k, shape) for k in keys[:3])
        time_u = jax.random.uniform(keys[3], (num_time_samples,))
        return Draws(u, prior_noise, offset_noise, time_u, jax.random.normal(keys[4], (num_time_samples, *shape)))

    return jax.vmap(draw_one)(index)


def bound_at(
    sde: SDE,
    score_fn: ScoreFn,
    x: Batch,
    draws: Draws,
    *,
    eps: float,
    offset: bool,
    importance_weighting: bool,
) -> PerExample:
    """The estimate of the lower bound on log p(x), nats [B], that the draws give: `likelihood.likelihood_bound` in the
    denoising form, with the K times of all examples in one batch and so without a scan.
    """
    batch, num_times = draws.time_u.shape
    u = draws.time_u.reshape(-1)
    t = sde.importance_weighted_time(u, eps) if importance_weighting else eps + u * (sde.T - eps)
    noise = draws.noise.reshape(-1, *x.shape[1:])
    integrand = bound_integrand(sde, score_fn, jnp.repeat(x, num_times, axis=0), t, noise, None, denoising=True)
    integral = (integrand * inverse_time_density(sde, t, eps, importance_weighting)).reshape(batch, num_times)
    bound = bound_prior(sde, x, draws.prior_noise) - jnp.mean(integral, axis=1)
    return bound - bound_offset(sde, score_fn, x, draws.offset_noise, eps) if offset else bound


def get_loss_fn(
    sde: SDE,
    score_fn: ScoreFn,
    model: nn.Module,
    scaler: Scaler,
    inverse_scaler: Scaler,
    *,
    eps: float = 1e-5,
    offset: bool = True,
    importance_weighting: bool = True,
    num_time_samples: int = 1,
    train: bool = True,
) -> LossFn:
    """The loss of the dequantiser `model` under a fixed score model: an upper bound on -log2 P(image) / D.

    loss = `likelihood.bits_per_dim`(bound on log p(x)) + log q(noise | image) / (D ln 2), one draw an example of u and
    of the bound's noises; its mean over draws is the bound itself, and its gradient passes through x.
    The public code has the same mean by another estimator: there the divergence D f of the drift has a uniform time,
    a noise and a probe of its own; here it stands in closed form beside the denoising term, at the same time, where
    the two cancel in part.

    Args:
        scaler, inverse_scaler: affine, from [0, 1] to the score model's data and back.
        eps, offset, importance_weighting: see `likelihood.likelihood_bound`. num_time_samples: times an example.
        train: whether the dequantiser's dropout is on.

    Returns:
        A function of (params, image01 [B, ...] in multiples of 1/255, index [B], key) to the mean loss and the terms
        [B], all in bits/dim: `loss`, which is the sum of `bound` and `log_q`.
    """

    def loss_fn(params, image01, index, key):
        draw_key, dropout_key = jax.random.split(key)
        shape = image01.shape[1:]
        draws = draw(draw_key, index, shape, num_time_samples)
        dropout_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(dropout_key, index) if train else None
        x01, log_q = dequantize(model, params, image01, draws.u, dropout_keys)
        logp = bound_at(
            sde, score_fn, scaler(x01), draws, eps=eps, offset=offset, importance_weighting=importance_weighting
        )
        dim = math.prod(shape)
        bound, log_q = bits_per_dim(logp, dim, inverse_scaler), log_q / (dim * math.log(2))
        loss = bound + log_q
        return jnp.mean(loss), {"loss": loss, "bound": bound, "log_q": log_q}

    return loss_fn
