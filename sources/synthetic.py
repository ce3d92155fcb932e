# SPDX-License-Identifier: Apache-2.0
"""Points made from random numbers, for the toy experiments of Lu et al. 2022. A new set is one function here and a line
in the registry of `datasets`."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.special import logsumexp, ndtri

from errors import UserError

_MOG_MEANS = np.array([-2.0, -6.0, 4.0]) / 7
_MOG_VARIANCES = np.array([0.1, 0.1, 1.0]) / 49
_MOG_WEIGHTS = np.array([0.3, 0.3, 0.4])


class Points(NamedTuple):
    """transform: float64 [B, n_uniforms], uniform in (0, 1), -> [B, dim]. The fields with defaults are `Dataset`'s."""

    dim: int
    n_uniforms: int
    transform: Callable[[np.ndarray], np.ndarray]
    log_prob: Callable[[np.ndarray], np.ndarray] | None = None
    entropy: float | None = None
    mixture: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    breaks: tuple[float, ...] = ()


def mog(config: Any) -> Points:
    """Three Gaussians in `data.dim` dimensions: p(x) = sum_k w_k prod_d N(x_d; mu_k, var_k).

    As in the public code, all coordinates of an example share its component. The entropy is known for dim 1 only.
    """
    if config.dim < 1:
        raise UserError(f"data.dim={config.dim} must be at least 1")

    def transform(u: np.ndarray) -> np.ndarray:
        k = np.searchsorted(np.cumsum(_MOG_WEIGHTS)[:-1], u[:, 0])
        return _MOG_MEANS[k, None] + np.sqrt(_MOG_VARIANCES)[k, None] * ndtri(u[:, 1:])

    def log_prob(x: np.ndarray) -> np.ndarray:
        squares = np.square(np.asarray(x, np.float64)[:, None] - _MOG_MEANS[:, None]) / _MOG_VARIANCES[:, None]
        log_norm = 0.5 * x.shape[1] * np.log(2 * np.pi * _MOG_VARIANCES)
        return np.asarray(logsumexp(np.log(_MOG_WEIGHTS) - log_norm - 0.5 * squares.sum(axis=-1), axis=1))

    entropy = None
    if config.dim == 1:
        # The integrand and its derivatives vanish at both ends, so the trapezoid rule converges exponentially.
        grid = np.linspace(-3, 3, 20_001)
        logp = log_prob(grid[:, None])
        entropy = float(-np.sum(np.exp(logp) * logp) * (grid[1] - grid[0]))
    mixture = _MOG_WEIGHTS, _MOG_MEANS[:, None], _MOG_VARIANCES[:, None]
    return Points(config.dim, 1 + config.dim, transform, log_prob, entropy, mixture)


def checkerboard(config: Any) -> Points:
    """Uniform on the 8 squares of side 2 in [-4, 4)^2 with floor(x_1 / 2) + floor(x_2 / 2) even: p = 1/32 there."""

    def transform(u: np.ndarray) -> np.ndarray:
        column = np.floor(4 * u[:, 0]) - 2
        row = 2 * np.floor(2 * u[:, 1]) - 2 + column % 2
        return 2 * np.stack([4 * u[:, 0] - 2, row + u[:, 2]], axis=1)

    def log_prob(x: np.ndarray) -> np.ndarray:
        cell = np.floor(np.asarray(x, np.float64) / 2)
        inside = np.all((cell >= -2) & (cell < 2), axis=1) & (cell.sum(axis=1) % 2 == 0)
        return np.where(inside, -math.log(32), -np.inf)

    return Points(2, 3, transform, log_prob, entropy=math.log(32), breaks=(-4.0, -2.0, 0.0, 2.0, 4.0))


def swissroll(config: Any) -> Points:
    """(t cos t, t sin t) + N(0, I), t uniform in 1.5 pi [1, 3], over 10, at the origin or at one of (+-4.5, +-4.5)."""
    centers = 4.5 * np.array([[0, 0], [-1, -1], [-1, 1], [1, -1], [1, 1]])

    def transform(u: np.ndarray) -> np.ndarray:
        t = 1.5 * np.pi * (1 + 2 * u[:, :1])
        roll = np.concatenate([t * np.cos(t), t * np.sin(t)], axis=1) + ndtri(u[:, 1:3])
        return roll / 10 + centers[np.floor(5 * u[:, 3]).astype(int)]

    return Points(2, 4, transform)
