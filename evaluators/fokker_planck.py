# SPDX-License-Identifier: Apache-2.0
"""The density of the reverse SDE's samples in one dimension, by its Fokker-Planck equation.

The reverse SDE dx = (f x - g^2 s) dt + g dW (Song et al. 2021, arXiv 2011.13456, equation 6), from the prior at T down
to eps, has another density than the probability flow ODE as soon as the score s is not exact. It is computed on a grid,
so it has no sampling error.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.interpolate import CubicSpline
from scipy.linalg import solve_banded
from scipy.sparse import dia_array

from sde_lib import SDE, ScoreFn


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
    """log density at x, nats [M], of the reverse SDE's solution at eps; -inf outside the grid.

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
