# SPDX-License-Identifier: Apache-2.0
"""Dequantisation: continuous images from those of whole levels, with the density of the noise, and a trained one.

For levels k in {0, ..., 255}, noise v ~ q(v | k) in [0, 1)^D and a density p of (k + v) / 256,
log2 P(k) >= E[log2 p((k + v) / 256) - log2 q(v | k)] - 8 D. Uniform noise is q = 1; a flow is trained to raise this
(variational dequantisation, Ho et al. 2019, arXiv 1902.00275). A truncated normal needs neither training nor uniform
noise in the score model's (Zheng et al. 2023, arXiv 2305.03935).
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from likelihood import bits_per_dim, likelihood_bound
from losses import LossFn
from sde_lib import SDE, Batch, PerExample, ScoreFn, batch_mul

Scaler = Callable[[Array], Array]


def dequantize(
    model: nn.Module,
    params: Any,
    image01: Batch,
    u: Batch,
    dropout_keys: Shaped[Array, "B *key"] | None = None,
    levels: int = 256,
) -> tuple[Batch, PerExample]:
    """x01 = (k + noise) / levels [B, ...] for k = (levels - 1) image01, and log q(noise | image) [B] in nats.

    The network `model` takes u ~ N(0, I) [B, ...] to the noise (see `models.flowpp`). With 256 levels floor(256 x01) is
    k exactly.

    Args:
        image01: multiples of 1 / (levels - 1) in [0, 1]; rounding errors in them do not matter.
        dropout_keys: one for each example; dropout is on if they are given.
    """
    flow: Any = model
    noise, log_q = flow.apply({"params": params}, u, image01, dropout_keys)
    level = jnp.round((levels - 1) * image01)
    return jnp.minimum(level + noise, jnp.nextafter(level + 1, level)) / levels, log_q  # level + noise may round up


def truncated_normal(sde: SDE, x: Batch, u: Batch, half: float, eps: float) -> tuple[Batch, PerExample]:
    """x_eps = alpha x + sigma n, and its log density log q(x_eps | x) [B] in nats, n ~ N(0, 1) cut to [-tau, tau].

    tau = alpha half / sigma at the time eps, so that the values of neighbouring levels meet and do not overlap. Then
    log P(x) >= E[log p(x_eps) - log q(x_eps | x)] for a density p at eps. The mean of -log q is
    D (ln(sigma Q sqrt(2 pi e)) - tau phi(tau) / Q), with phi the normal density and Q = erf(tau / sqrt 2).

    Args:
        x: levels, in the model's range. half: half the distance of two levels there. u: uniform in (0, 1).
    """
    t = jnp.full(x.shape[0], eps, x.dtype)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    mass = jax.scipy.special.erf(alpha * half / sigma / math.sqrt(2))
    n = math.sqrt(2) * jax.scipy.special.erfinv(batch_mul(mass, 2 * u - 1))
    log_q = -0.5 * jnp.square(n) - batch_mul(jnp.log(sigma * mass) + 0.5 * math.log(2 * math.pi), jnp.ones_like(n))
    return batch_mul(alpha, x) + batch_mul(sigma, n), jnp.sum(log_q.reshape(len(x), -1), axis=1)


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
    levels: int = 256,
) -> LossFn:
    """The loss of the dequantiser `model` under a fixed score model: an upper bound on -log2 P(image) / D.

    loss = `likelihood.bits_per_dim`(bound on log p(x)) + log q(noise | image) / (D ln 2), one draw an example. Its mean
    over draws is the bound itself; its gradient passes through x.

    Args:
        scaler, inverse_scaler: affine, from [0, 1] to the score model's data and back.
        eps, offset, importance_weighting, num_time_samples: see `likelihood.likelihood_bound`.
        train: whether the dequantiser's dropout is on. levels: of the images.

    Returns:
        A function of (params, unused model_state, image01 [B, ...], index [B], key) to the mean loss and the terms [B],
        all in bits/dim: `loss`, which is the sum of `bound` and `log_q`. image01: see `dequantize`.
    """
    options = {"eps": eps, "offset": offset, "importance_weighting": importance_weighting}

    def loss_fn(params, model_state, image01, index, key):
        of_example = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        draw_key, dropout_key = jax.random.split(key)
        u_keys, bound_keys = jnp.moveaxis(jax.vmap(jax.random.split)(of_example(draw_key, index)), 1, 0)
        u = jax.vmap(lambda key: jax.random.normal(key, image01.shape[1:]))(u_keys)
        dropout_keys = of_example(dropout_key, index) if train else None
        x01, log_q = dequantize(model, params, image01, u, dropout_keys, levels)
        logp = likelihood_bound(sde, score_fn, scaler(x01), bound_keys, num_time_samples=num_time_samples, **options)
        dim = math.prod(image01.shape[1:])
        bound, log_q = bits_per_dim(logp, dim, inverse_scaler, levels), log_q / (dim * math.log(2))
        loss = bound + log_q
        return jnp.mean(loss), {"loss": loss, "bound": bound, "log_q": log_q}

    return loss_fn
