# SPDX-License-Identifier: Apache-2.0
"""Score diagnostics: the Fisher curves of a score model along its probability flow ODE, per example.

The notation is that of `likelihood`: drift f(t) x, diffusion g(t), score s, J = ds/dx, D = number of entries of one x,
probe v. The density of the ODE's state at t is q_t: the prior at T, carried back along h(x, t) = f x - g^2 s / 2. Its
score s_ode = grad log q_t equals s if the model's SDE and ODE agree. The paper bounds the likelihood gap of the ODE by
the distances below (Lu et al. 2022, arXiv 2206.08265, section 3 and the curves of its experiments).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from likelihood import score_and_divergence
from ode import rk45
from sde_lib import SDE, Batch, PerExample, ScoreFn, batch_mul

Probes = Float[Array, "P B *shape"]
Curve = Float[Array, "K B"] | PerExample  # at K times, or at one


class FisherCurves(NamedTuple):
    """g^2-weighted squared distances at K times for B examples, each at its own x_t on the ODE.

    `normal` stands for the score of N(0, sigma(t)^2 I), which is -x / sigma^2, of divergence -D / sigma^2. The fields
    with `true` are None without a true score.

    Distances of scores are in nats, those of the divergence in nats / (unit of x)^2 and those of its gradient in
    nats / (unit of x)^4, all per unit of time. Half the mean over data of a distance of scores, integrated over t, is
    the Fisher divergence of the bounds.

    One probe adds the variance of its estimates to the curves; for images it may be many times the distance. With P
    probes a curve is the mean over all pairs of probes of the product of their residuals, which has no bias. It is
    sometimes below 0 where the distance is small.
    """

    score_ode: Curve  # g^2 |s - s_ode|^2
    score_normal: Curve  # g^2 |s - s_normal|^2
    ode_normal: Curve  # g^2 |s_ode - s_normal|^2
    divergence_normal: Curve  # g^2 (v . J v + D / sigma^2)^2
    grad_divergence_normal: Curve  # g^2 |grad_x (v . J v)|^2
    score_true: Curve | None = None  # g^2 |s - s_true|^2
    ode_true: Curve | None = None  # g^2 |s_ode - s_true|^2


def fisher_curves(
    sde: SDE,
    score_fn: ScoreFn,
    x: Batch,
    probe: Batch | Probes | None,
    times: Float[Array, "K"],
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 20_000,
    true_score: ScoreFn | None = None,
) -> FisherCurves:
    """The Fisher curves of a batch: forward from x at times[0] to T, back from there with s_ode, compared at `times`.

    Along the ODE, d s_ode / dt = -f s_ode + g^2 / 2 (grad_x (v . J v) + J^T s_ode), with s_ode = -x / prior_std^2 at T.
    The probe is fixed over the solve, so s_ode is the score of the log density that `likelihood.ode_log_likelihood`
    gives with that probe.

    Args:
        probe: v [B, ...]; P >= 2 probes [P, B, ...] for curves without the bias of one, at P times the work; None for
            the exact trace, with D tangents, for small D only.
        times: rising, in (0, T]. The solver starts anew in each interval, at no less than 8 evaluations.
        rtol, atol, max_steps: see `ode.rk45`; the limit holds for each interval.
        true_score: score of the marginal at t of the data under the SDE, see `gaussian_mixture_score`.

    Returns:
        Curves [K, B]. An example that the solver gave up on is NaN at all times. Parameters have no gradient.
    """
    times = times.astype(x.dtype)
    num_probes = probe.shape[0] if probe is not None and probe.ndim > x.ndim else 1
    probe = probe if probe is None else probe.reshape(-1, *x.shape[1:])  # probe by probe, as `tile` makes x
    solve = partial(rk45, rtol=rtol, atol=atol, max_steps=max_steps)

    def interval(state, span):
        (x, ode_score), _ = solve(partial(ode_score_flow, sde, score_fn, probe), state, *span)
        t = jnp.broadcast_to(span[1], x.shape[:1])
        curves = compare_scores(sde, score_fn, x, ode_score, t, probe, true_score, num_probes=num_probes)
        return (x, ode_score), curves

    end, _ = solve(lambda t, x: sde.probability_flow(x, t, score_fn(x, t)), x, times[0], sde.T)
    end = jnp.tile(end, (num_probes, *[1] * (x.ndim - 1)))
    starts = jnp.append(times[1:], jnp.asarray(sde.T, x.dtype))
    (x0, _), curves = jax.lax.scan(interval, (end, -end / sde.prior_std**2), (starts, times), reverse=True)
    # `rk45` makes a failed example NaN throughout, and it stays NaN.
    failed = jnp.isnan(x0.reshape(num_probes, x.shape[0], -1)[..., 0]).any(axis=0)
    return jax.tree.map(lambda curve: jnp.where(failed, jnp.nan, curve), curves)


def ode_score_flow(
    sde: SDE, score_fn: ScoreFn, probe: Batch | None, t: PerExample, state: tuple[Batch, Batch]
) -> tuple[Batch, Batch]:
    """d(x, s_ode) / dt at (x, s_ode), as in `fisher_curves`."""
    x, ode_score = state
    score, _, pulled = _pull_back(score_fn, x, t, probe, ode_score)
    # The equation of s_ode is the flow's for (-f, -g^2), with the pulled-back covector in the place of the score.
    return sde.probability_flow(x, t, score), -sde.probability_flow(ode_score, t, pulled)


def compare_scores(
    sde: SDE,
    score_fn: ScoreFn,
    x: Batch,
    ode_score: Batch,
    t: PerExample,
    probe: Batch | None,
    true_score: ScoreFn | None = None,
    *,
    num_probes: int = 1,
) -> FisherCurves:
    """One point of each curve: the distances at x, where the density of the ODE has the score `ode_score`.

    With num_probes = P > 1 the first axis of x, ode_score, t and probe holds the examples P times, once for each probe.
    The result has each example once.
    """
    score, divergence, grad_divergence = _pull_back(score_fn, x, t, probe, jnp.zeros_like(x))
    sigma_sq, g_sq = jnp.square(sde.sigma(t)), sde.diffusion_sq(t)
    normal = -batch_mul(1 / sigma_sq, x)

    def distance(a, b):
        residuals = (a - b).reshape(num_probes, x.shape[0] // num_probes, -1)
        squares = jnp.sum(jnp.square(residuals), axis=(0, 2))
        if num_probes > 1:
            squares = jnp.sum(jnp.square(jnp.sum(residuals, axis=0)), axis=1) - squares  # pairs of two probes
        return g_sq[: len(squares)] * squares / max(1, num_probes * (num_probes - 1))

    truth = None if true_score is None else true_score(x, t)
    return FisherCurves(
        score_ode=distance(score, ode_score),
        score_normal=distance(score, normal),
        ode_normal=distance(ode_score, normal),
        divergence_normal=distance(divergence, -x[0].size / sigma_sq),
        grad_divergence_normal=distance(grad_divergence, 0.0),
        score_true=None if truth is None else distance(score, truth),
        ode_true=None if truth is None else distance(ode_score, truth),
    )


def _pull_back(score_fn, x, t, probe, cotangent):
    """s [B, ...], v . J v [B] and grad_x (v . J v) + J^T cotangent [B, ...]; examples are independent."""
    (score, divergence), vjp = jax.vjp(lambda x: score_and_divergence(score_fn, x, t, probe), x)
    return score, divergence, vjp((cotangent, jnp.ones_like(divergence)))[0]


def gaussian_mixture_score(sde: SDE, weights: ArrayLike, means: ArrayLike, variances: ArrayLike) -> ScoreFn:
    """The score of p_t for data from a mixture of Gaussians p_0(x) = sum_m w_m prod_d N(x_d; mu_md, var_md).

    It is -sum_m r_m(x, t) (x - alpha mu_m) / (alpha^2 var_m + sigma^2), r_m the probability of component m given x.

    Args:
        weights: [M], positive, of sum 1.
        means, variances: [M, D], or [M, 1] if they are the same in every coordinate.

    Returns:
        (x [B, D], t [B]) -> score [B, D], in nats per unit of x.
    """

    def score_fn(x, t):
        w, mu, var = (jnp.asarray(values, x.dtype) for values in (weights, means, variances))
        alpha, sigma = sde.alpha(t)[:, None, None], sde.sigma(t)[:, None, None]
        var_t = jnp.square(alpha) * var + jnp.square(sigma)  # [B, M, D or 1]
        offset = x[:, None] - alpha * mu  # [B, M, D]
        log_joint = jnp.log(w) - 0.5 * jnp.sum(jnp.square(offset) / var_t + jnp.log(var_t), axis=-1)
        return -jnp.sum(jax.nn.softmax(log_joint)[..., None] * offset / var_t, axis=1)

    return score_fn
