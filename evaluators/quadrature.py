# SPDX-License-Identifier: Apache-2.0
"""Likelihood and KL divergence of a density that is known on a grid, by quadrature."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

import datasets


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
