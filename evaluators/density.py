# SPDX-License-Identifier: Apache-2.0
"""Densities on a grid: the likelihood and KL divergence of one by quadrature, and that of the reverse SDE's samples."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from scipy.interpolate import CubicSpline
from scipy.linalg import solve_banded
from scipy.sparse import dia_array

import datasets
from sde_lib import SDE, ScoreFn


class Grid(NamedTuple):
    """A rule of quadrature: int f = sum of weights * f(points). In 2-D the points are row-major.

    The points number `thirds`, every third one of each axis, make a coarser rule of the same kind.
    """

    points: Float[np.ndarray, "M D"]
    weights: Float[np.ndarray, "M"]
    thirds: Int[np.ndarray, "m"]


def density_grid(dataset: datasets.Dataset) -> tuple[Grid, np.ndarray]:
    """A grid over 1-D or 2-D test data with a margin of a quarter of their range; and those data, float32 [N, D]."""
    data = dataset.test[np.arange(min(5000, len(dataset.test)))].astype(np.float64)
    margin = 0.25 * np.ptp(data, axis=0)
    ends = zip(data.min(axis=0) - margin, data.max(axis=0) + margin, strict=True)
    count = 3999 if data.shape[1] == 1 else 126  # on each axis
    axes, weights = zip(*(_midpoints(low, high, dataset.breaks, count) for low, high in ends), strict=True)
    shape = [len(axis) for axis in axes]
    thirds = np.arange(math.prod(shape)).reshape(shape)[(slice(1, None, 3),) * len(shape)]
    grid = np.stack([g.reshape(-1) for g in np.meshgrid(*axes, indexing="ij")], axis=-1)
    product = functools.reduce(np.multiply.outer, weights).reshape(-1)
    return Grid(grid.astype(np.float32), product, thirds.reshape(-1)), data.astype(np.float32)


def _midpoints(low: float, high: float, breaks: Sequence[float], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The midpoint rule on [low, high], of second order or better: `count` points or a few more, and their weights.

    At a break the density jumps and a model's has a thin layer. Between breaks the rule is that of u in [0, 1] with
    x = start + width (10 u^3 - 15 u^4 + 6 u^5): dx/du vanishes at both ends, so the points are dense there.
    """
    ends = np.array([low, *(at for at in breaks if low < at < high), high])
    n = 3 * math.ceil(count / (3 * (len(ends) - 1)))
    u = (np.arange(n) + 0.5) / n
    x, slope = u, np.ones(n)
    if len(ends) > 2:
        x, slope = u**3 * (10 - 15 * u + 6 * u**2), 30 * u**2 * (1 - u) ** 2
    width = np.diff(ends)[:, None]
    return (ends[:-1, None] + width * x).reshape(-1), (width * slope / n).reshape(-1)


def quadrature_nll(
    model_logp: Float[np.ndarray, "M"],
    true_logp: Float[np.ndarray, "M"],
    weights: float | Float[np.ndarray, "M"],
    thirds: Int[np.ndarray, "m"] | None = None,
) -> dict[str, Any]:
    """NLL = -int p log q, entropy -int p log p and KL(p || q) in nats, by quadrature with one weight or one a point.

    p is normalised on the grid, so the entropy and the NLL carry the same small error and their difference, KL, less.
    `model_mass` = int q is close to 1 if the grid is wide and the ODE's tolerance tight enough.
    With the `thirds` of a `Grid`, `kl_grid_error` estimates KL's error: |KL - KL of the thirds| / (3^2 - 1), by
    Richardson for a rule of second order.
    """
    true_logp, model_logp = np.asarray(true_logp, np.float64), np.asarray(model_logp, np.float64)
    p = weights * np.where(np.isfinite(true_logp), np.exp(true_logp), 0.0)
    p = p / np.sum(p)
    entropy = -np.sum(p * np.where(p > 0, true_logp, 0.0))
    nll = -np.sum(p * model_logp)
    result = {
        "exact_nll": float(nll),
        "true_entropy": float(entropy),
        "kl": float(nll - entropy),
        "model_mass": float(np.sum(weights * np.exp(model_logp))),
    }
    if thirds is not None:
        of_thirds = np.broadcast_to(weights, model_logp.shape)[thirds]
        coarse = quadrature_nll(model_logp[thirds], true_logp[thirds], of_thirds)
        result["kl_grid_error"] = abs(result["kl"] - coarse["kl"]) / 8
    return result


def reverse_sde_log_density(
    sde: SDE,
    score_fn: ScoreFn,
    x: Float[np.ndarray, "M"],
    *,
    eps: float,
    data_std: float,
    cells: int = 4000,
    steps: int = 2000,
    half_width: float = 8.0,
) -> Float[np.ndarray, "M"]:
    """log density at x, nats [M], of samples of the reverse SDE in one dimension; -inf outside the grid.

    The reverse SDE dx = (f x - g^2 s) dt + g dW (Song et al. 2021, arXiv 2011.13456, equation 6), from the prior at T
    down to eps, has another density than the probability flow ODE as soon as the score s is not exact. It is computed
    by its Fokker-Planck equation, so it has no sampling error.

    With w = x / c, c = S alpha cosh tau, sinh tau = sigma / (alpha S) and -tau as the time, every process has the SDE

        dw = (2 sigma s + tanh(tau) w) dr + sqrt(2 tanh tau) dW,    r = -tau,

    the Ornstein-Uhlenbeck process for the score of N(0, S^2) data. Its density q obeys dq/dr = -dF/dw with the flux
    F = (2 sigma s + tanh(tau) w) q - tanh(tau) dq/dw: finite volumes, central in w, Crank-Nicolson in r, both of second
    order, on cells of [-half_width, half_width], through whose ends nothing flows.

    Args:
        score_fn: takes `cells + 1` points at one time.
        data_std: S, about the standard deviation of the data, so that the grid covers them `half_width` times.
    """
    edges = np.linspace(-half_width, half_width, cells + 1)
    centers, h = 0.5 * (edges[1:] + edges[:-1]), 2 * half_width / cells
    ends = jnp.asarray([sde.T, eps])
    start, end = taus = np.arcsinh(np.exp(-0.5 * np.asarray(sde.log_snr(ends), np.float64)) / data_std)
    first_scale, last_scale = data_std * np.asarray(sde.alpha(ends), np.float64) * np.cosh(taus)
    dr = (start - end) / steps
    middles = start - dr * (np.arange(steps) + 0.5)
    t = jnp.clip(sde.time_at_log_snr(jnp.asarray(-2 * np.log(data_std * np.sinh(middles)))), eps, sde.T)
    scales = data_std * np.asarray(sde.alpha(t), np.float64) * np.cosh(middles)
    sigmas, times = np.asarray(sde.sigma(t), np.float64), np.asarray(t, np.float32)

    prior = sde.prior_logp(jnp.asarray(first_scale * centers, jnp.float32)[:, None])
    density = first_scale * np.exp(np.asarray(prior, np.float64))
    for tau, time, scale, sigma in zip(middles, times, scales, sigmas, strict=True):
        points: Any = (scale * edges).astype(np.float32)[:, None], np.full(cells + 1, time)
        score = np.asarray(score_fn(*points), np.float64)[:, 0]
        half = 0.5 * dr * _flow(2 * sigma * score + np.tanh(tau) * edges, np.tanh(tau), h)
        implicit = -half
        implicit[1] += 1
        explicit = dia_array((half, (1, 0, -1)), shape=(cells, cells))
        density = solve_banded((1, 1), implicit, density + explicit @ density)
    w = x / last_scale
    logp = CubicSpline(centers, np.log(np.maximum(density, 1e-30)))(w) - np.log(last_scale)
    return np.where(np.abs(w) <= centers[-1], logp, -np.inf)


def _flow(velocity: Float[np.ndarray, "edges"], diffusion: float, h: float) -> Float[np.ndarray, "3 cells"]:
    """-dF/dw of cells of width h as a tridiagonal matrix, in the layout of `solve_banded` and `dia_array`."""
    from_left, from_right = velocity / 2 + diffusion / h, velocity / 2 - diffusion / h  # parts of the flux at an edge
    from_left[[0, -1]] = from_right[[0, -1]] = 0
    bands = np.stack([np.append(0, -from_right[1:-1]), from_right[:-1] - from_left[1:], np.append(from_left[1:-1], 0)])
    return bands / h
