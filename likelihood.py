# SPDX-License-Identifier: Apache-2.0
"""Likelihoods of a score model: exact under its probability flow ODE, and a variational bound under its SDE.

Values are per example, and in nats until `bits_per_dim`. Notation: x_t = alpha x + sigma z, drift f(t) x, diffusion
g(t), score s, J = ds/dx, D = number of entries of one x, probe v with E[v v^T] = I.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from ode import STARTING_EVALUATIONS, adams_bashforth, rk45
from sde_lib import SDE, Batch, PerExample, ScoreFn, batch_mul, score_and_jacobian

Probes = Float[Array, "K B *shape"]


def probe(key: PRNGKeyArray, shape: tuple[int, ...], kind: str) -> Array | None:
    """Draws v of Hutchinson's tr J = E[v . J v]: 'rademacher' (least variance) or 'gaussian'. None for 'exact'."""
    draws = {"rademacher": jax.random.rademacher, "gaussian": jax.random.normal}
    return None if kind.lower() == "exact" else draws[kind.lower()](key, shape, jnp.float32)


def probes(keys: Shaped[Array, "B *key"], shape: tuple[int, ...], kind: str, count: int) -> Array | None:
    """Draws `count` probes (see `probe`) an example from its key: [count, B, *shape], or [B, *shape] if one."""
    of_keys = jax.vmap(lambda key: probe(key, shape, kind))
    if count == 1:
        return of_keys(keys)
    return jax.vmap(of_keys)(jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys))


def score_and_divergence(
    score_fn: ScoreFn, x: Batch, t: PerExample, probe: Batch | Probes | None
) -> tuple[Batch, PerExample]:
    """s [B, ...] and an estimate of its divergence tr J [B], from one forward-mode pass.

    The estimate is v . J v for a probe [B, ...], and its mean for K probes [K, B, ...]. Without a probe the trace is
    exact, by D tangents and B D^2 numbers.
    """
    if probe is None:
        score, jacobian = score_and_jacobian(lambda x: score_fn(x, t), x)
        return score, jnp.trace(jacobian, axis1=1, axis2=2)

    def directional(v):
        score, jv = jax.jvp(lambda x: score_fn(x, t), (x,), (v,))
        return score, _inner(v, jv)

    if probe.ndim == x.ndim:
        return directional(probe)
    score, quadratic = jax.vmap(directional, out_axes=(None, 0))(probe)  # the score is computed once
    return score, jnp.mean(quadratic, axis=0)


def ode_log_likelihood(
    sde: SDE,
    score_fn: ScoreFn,
    x: Batch,
    probe: Batch | Probes | None,
    *,
    eps: float = 1e-5,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 20_000,
) -> tuple[PerExample, Batch, Int[Array, "B"]]:
    """Log density of x under the probability flow ODE (Song et al. 2021, arXiv 2011.13456, appendix D.2).

    dx/dt = f x - g^2 s / 2 from x at eps to z at T;  log p(x) = log prior(z) + integral of (D f - g^2 tr J / 2) dt.

    `score_and_divergence` estimates tr J with the probe, which stays the same over the solve. The mean of the result
    over probes is log p(x). The tolerances and `max_steps` are those of `ode.rk45` for the state x and log p.

    Returns:
        log p(x) in nats [B], z [B, ...], evaluations of the score [B]. log p(x) and z are NaN for an example that the
        solver gave up on (see `ode.rk45`).
    """
    dim = math.prod(x.shape[1:])

    def derivative(t, state):
        score, divergence = score_and_divergence(score_fn, state[0], t, probe)
        log_rate = dim * sde.drift_coefficient(t) - 0.5 * sde.diffusion_sq(t) * divergence
        return sde.probability_flow(state[0], t, score), log_rate

    def without_divergence(t, state):  # the second of a step's six stages needs no more (`ode.rk45`)
        return sde.probability_flow(state[0], t, score_fn(state[0], t)), jnp.zeros_like(t)

    state = x, jnp.zeros(x.shape[0], x.dtype)
    solver = {"rtol": rtol, "atol": atol, "max_steps": max_steps}
    (z, change), stats = rk45(derivative, state, eps, sde.T, second_stage=without_divergence, **solver)
    return sde.prior_logp(z) + change, z, stats.nfe


def even_grid_log_likelihood(
    sde: SDE,
    score_fn: ScoreFn,
    x: Batch,
    probe: Batch | Probes | None,
    *,
    steps: int,
    eps: float = 1e-5,
    data_std: float = 0.25,
) -> tuple[PerExample, Batch, Int[Array, "B"], PerExample]:
    """The density of `ode_log_likelihood` by `ode.adams_bashforth`, in `steps` steps that are even in log-SNR.

    An even grid averages out the roughness in t of a network's score, which an adaptive solver has to resolve. The
    solver steps in w = x / c over u = log(sigma / (alpha S)), with S = data_std and c^2 = alpha^2 + sigma^2 / S^2:

        dw/du = -sigma^2 r(x, t) / c,  r = s + x / (c S)^2,
        log p(x) = log prior(z) + D log(c(T) / c(eps)) - integral of sigma^2 tr(dr/dx) du.

    w keeps the size of the data at every t. The residual r is the score less that of Gaussian data of deviation S. The
    density does not depend on S.

    Args:
        steps: an even number, 4 or more; UserError for another.
        data_std: S, about the standard deviation of x.

    Returns:
        log p(x) in nats [B], z [B, ...], evaluations of the score [B], and the change of log p(x) if every other
        evaluation were left out [B]. This change is about the error from the roughness of the score, without the
        formula's error for a smooth one. An example that is not finite is NaN throughout.
    """
    dim = math.prod(x.shape[1:])

    def scale(t):
        return jnp.sqrt(jnp.square(sde.alpha(t)) + jnp.square(sde.sigma(t) / data_std))

    def derivative(u, state):
        t = jnp.clip(sde.time_at_log_snr(-2 * (u + math.log(data_std))), eps, sde.T)
        c, sigma_sq = scale(t), jnp.square(sde.sigma(t))
        x, gaussian = batch_mul(c, state[0]), 1 / jnp.square(c * data_std)
        score, divergence = score_and_divergence(score_fn, x, t, probe)
        residual = score + batch_mul(gaussian, x)
        return batch_mul(-sigma_sq / c, residual), -sigma_sq * (divergence + dim * gaussian)

    ends = jnp.asarray([eps, sde.T], x.dtype)
    (first, last), (start, end) = scale(ends), -0.5 * sde.log_snr(ends) - math.log(data_std)
    state = x / first, jnp.zeros(x.shape[0], x.dtype)
    (w, change), (w_by, change_by) = adams_bashforth(derivative, state, start, end, steps=steps)
    z = w * last
    log_prior = sde.prior_logp(z)
    logp = log_prior + dim * jnp.log(last / first) + change
    by = sde.prior_logp(z + w_by * last) - log_prior + change_by
    whole = jnp.isfinite(logp) & jnp.isfinite(by)
    nfe = jnp.full(len(x), steps + STARTING_EVALUATIONS)
    logp, z, error = (batch_mul(jnp.where(whole, 1, jnp.nan), value) for value in (logp, z, jnp.abs(by)))
    return logp, z, nfe, error


def likelihood_bound(
    sde: SDE,
    score_fn: ScoreFn,
    x: Batch,
    keys: Shaped[Array, "B *key"],
    *,
    eps: float = 1e-5,
    num_time_samples: int = 1000,
    importance_weighting: bool = True,
    denoising: bool = True,
    offset: bool = True,
    hutchinson_type: str = "rademacher",
) -> PerExample:
    """An unbiased estimate of a lower bound, in nats [B], on the log density of x under the reverse SDE.

    log p(x) >= E log prior(x_T) - integral from eps to T of E[`bound_integrand`] dt - E[`bound_offset`]
    (Song et al. 2021, arXiv 2101.09258, theorem 3). The noises at T and eps are drawn once.

    Args:
        keys: one key for each example. An example's draws are a function of its key alone.
        num_time_samples: number of independent times, each with its own noise and one evaluation of the score.
        importance_weighting: draws times uniform in log-SNR, with less variance, instead of uniform in [eps, T].
        denoising: takes the denoising form instead of the sliced form, which has a probe of `hutchinson_type`.
        offset: accounts for starting at eps and not at 0.
    """
    shape = x.shape[1:]
    normal = jax.vmap(functools.partial(jax.random.normal, shape=shape))
    prior_keys, offset_keys, time_keys = jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, 3))(keys), 1, 0)

    def draw(key):
        u_key, noise_key, probe_key = jax.random.split(key, 3)
        v = None if denoising else probe(probe_key, shape, hutchinson_type)
        return jax.random.uniform(u_key), jax.random.normal(noise_key, shape), v

    def add_sample(number, total):
        u, noise, v = jax.vmap(lambda key: draw(jax.random.fold_in(key, number)))(time_keys)
        t = sde.time(u, eps, importance_weighting)
        integrand = bound_integrand(sde, score_fn, x, t, noise, v, denoising=denoising)
        return total + integrand * sde.inverse_time_density(t, eps, importance_weighting)

    total = jax.lax.fori_loop(0, num_time_samples, add_sample, jnp.zeros(x.shape[0], x.dtype))
    bound = bound_prior(sde, x, normal(prior_keys)) - total / num_time_samples
    if offset:
        bound -= bound_offset(sde, score_fn, x, normal(offset_keys), eps)
    return bound


def bound_integrand(
    sde: SDE, score_fn: ScoreFn, x: Batch, t: PerExample, noise: Batch, probe: Batch | None, *, denoising: bool
) -> PerExample:
    """g^2 / 2 (|s - grad log p_0t|^2 - |grad log p_0t|^2) - D f at x_t = alpha x + sigma z, for z = noise; nats [B].

    Since grad log p_0t = -z / sigma, the bracket is |s|^2 + 2 s . z / sigma, where no large numbers cancel. The sliced
    form is |s|^2 + 2 tr J; integration by parts gives it the same mean. See `score_and_divergence` for the probe.
    """
    mean, std = sde.marginal_prob(x, t)
    x_t = mean + batch_mul(std, noise)
    if denoising:
        score = score_fn(x_t, t)
        cross = _inner(score, noise) / std
    else:
        score, cross = score_and_divergence(score_fn, x_t, t, probe)
    rate = 0.5 * sde.diffusion_sq(t) * (_inner(score, score) + 2 * cross)
    return rate - math.prod(x.shape[1:]) * sde.drift_coefficient(t)


def bound_prior(sde: SDE, x: Batch, noise: Batch) -> PerExample:
    """log prior(x_T), nats [B], at x_T = alpha(T) x + sigma(T) noise."""
    mean, std = sde.marginal_prob(x, jnp.full(x.shape[0], sde.T, x.dtype))
    return sde.prior_logp(mean + batch_mul(std, noise))


def bound_offset(sde: SDE, score_fn: ScoreFn, x: Batch, noise: Batch, eps: float) -> PerExample:
    """-log q(x | x_eps) - H[x_eps | x], nats [B]: the bound on log p(x_eps) less this is a bound on log p(x).

    The decoder q is N((x_eps + sigma^2 s) / alpha, (sigma / alpha)^2 I). At x_eps = alpha x + sigma z, z = noise, the
    value is |z + sigma s|^2 / 2 - D / 2 - D log alpha.
    """
    t = jnp.full(x.shape[0], eps, x.dtype)
    mean, std = sde.marginal_prob(x, t)
    residual = noise + batch_mul(std, score_fn(mean + batch_mul(std, noise), t))
    return 0.5 * _inner(residual, residual) - math.prod(x.shape[1:]) * (0.5 + sde.log_alpha(t))


class DiscreteBound(NamedTuple):
    """The parts, in nats [B], of an upper bound on -log P(x) of discrete x."""

    prior: PerExample
    diffusion: PerExample
    reconstruction: PerExample


def discrete_bound(
    sde: SDE,
    score_fn: ScoreFn,
    x: Batch,
    grid: Float[Array, "L"],
    keys: Shaped[Array, "B *key"],
    *,
    eps: float = 1e-5,
    num_time_samples: int = 1000,
    importance_weighting: bool = True,
) -> DiscreteBound:
    """An unbiased estimate of the bound of Kingma et al. 2021 (arXiv 2107.00630) for x whose values are in the grid.

    prior = KL(q(x_T | x) || prior), diffusion = integral of g^2 / (2 sigma^2) E|z + sigma s|^2 dt from eps to T, and
    reconstruction = -E log p(x | x_eps), where p is proportional to the density of x_eps at each value of the grid.
    No dequantisation is needed. keys, num_time_samples and importance_weighting are those of `likelihood_bound`.
    """
    shape, dim = x.shape[1:], math.prod(x.shape[1:])
    normal = jax.vmap(functools.partial(jax.random.normal, shape=shape))
    start_keys, time_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)

    mean, std = sde.marginal_prob(x, jnp.full(x.shape[0], sde.T, x.dtype))
    ratio = jnp.square(std / sde.prior_std)
    prior = 0.5 * (_inner(mean, mean) / sde.prior_std**2 + dim * (ratio - 1 - jnp.log(ratio)))

    t = jnp.full(x.shape[0], eps, x.dtype)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    x_eps = (batch_mul(alpha, x) + batch_mul(sigma, normal(start_keys))).reshape(len(x), dim, 1)
    log_density = -0.5 * jnp.square((x_eps - batch_mul(alpha, jnp.ones_like(x_eps)) * grid) / sigma[:, None, None])
    level = jnp.argmin(jnp.abs(x.reshape(len(x), dim, 1) - grid), axis=-1)
    log_p = jnp.take_along_axis(jax.nn.log_softmax(log_density), level[..., None], axis=-1)

    def add_sample(number, total):
        u, noise = jax.vmap(lambda key: _time_and_noise(jax.random.fold_in(key, number), shape))(time_keys)
        t = sde.time(u, eps, importance_weighting)
        mean, std = sde.marginal_prob(x, t)
        residual = noise + batch_mul(std, score_fn(mean + batch_mul(std, noise), t))
        rate = 0.5 * sde.diffusion_sq(t) / jnp.square(std) * _inner(residual, residual)
        return total + rate * sde.inverse_time_density(t, eps, importance_weighting)

    total = jax.lax.fori_loop(0, num_time_samples, add_sample, jnp.zeros(x.shape[0], x.dtype))
    return DiscreteBound(prior, total / num_time_samples, -jnp.sum(log_p, axis=(1, 2)))


def _time_and_noise(key, shape):
    u_key, noise_key = jax.random.split(key)
    return jax.random.uniform(u_key), jax.random.normal(noise_key, shape)


def bits_per_dim(logp: PerExample, dim: int, inverse_scaler: Callable[[Array], Array], levels: int = 256) -> PerExample:
    """Bits per dimension of data with so many levels from the log density, in nats, of the scaled data.

    bpd = -log p / (D ln 2) + log2(levels) + log2(d inverse_scaler / dx): for 256 levels the constant is 8 for data in
    [0, 1] and 7 for [-1, 1]. The inverse scaler is affine and takes the model's data to [0, 1].
    """
    slope = jax.grad(inverse_scaler)(0.0)
    return -logp / (dim * math.log(2)) + math.log2(levels) + jnp.log2(slope)


def _inner(a, b):
    return jnp.sum((a * b).reshape(a.shape[0], -1), axis=-1)
