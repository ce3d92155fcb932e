"""Metrics of a trained model, each computed per example before any mean."""

import math
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.integrate import trapezoid

import datasets


def mean_and_stderr(values: Float[np.ndarray, "R N"]) -> dict[str, Any]:
    """Mean over R repeats and N examples, and its standard error over the examples (each averaged over its repeats)."""
    per_example = np.mean(values, axis=0, dtype=np.float64)
    repeats, n = values.shape
    stderr = float(np.std(per_example, ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return {"mean": float(np.mean(per_example)), "stderr": stderr, "num_examples": n, "num_repeats": repeats}


def gaussian_bits_per_dim(dataset: datasets.Dataset, data_config: Any, seed: int) -> float:
    """Bits/dim of the test split under the Gaussian of the training split's mean and covariance.

    Both uniformly dequantised as in the model's likelihood, u / 256 in [0, 1): what a model of means and covariances
    alone can do, for images small enough that D x D numbers and more than D training images are at hand.
    """

    def split(name: str) -> np.ndarray:
        batches = datasets.eval_batches(dataset, data_config, name, 1024, seed=seed)
        x = np.concatenate([b["x"] for b in batches]).astype(np.float64)
        return datasets.get_data_inverse_scaler(data_config.centered)(x).reshape(len(x), -1)

    train, test = split("train"), split("test")
    dim = train.shape[1]
    factor = np.linalg.cholesky(np.cov(train, rowvar=False))
    white = np.linalg.solve(factor, (test - train.mean(axis=0)).T)
    log_det = np.sum(np.log(np.diag(factor)))
    logp = -0.5 * np.sum(white**2, axis=0) - log_det - 0.5 * dim * math.log(2 * math.pi)
    return float(np.mean(-logp / (dim * math.log(2)) + 8))


def density_grid(dataset: datasets.Dataset, points: int = 4001, points_2d: int = 100):
    """A regular grid over 1-D or 2-D data with a margin: points [M, D] (2-D: row-major), the cell's volume, data."""
    data = np.stack([dataset.test[i] for i in range(min(5000, len(dataset.test)))]).astype(np.float64)
    dim = data.shape[1]
    margin = 0.25 * (data.max(axis=0) - data.min(axis=0))
    count = points if dim == 1 else points_2d
    axes = [np.linspace(low, high, count) for low, high in zip(data.min(0) - margin, data.max(0) + margin, strict=True)]
    grid = np.stack([g.reshape(-1) for g in np.meshgrid(*axes, indexing="ij")], axis=-1)
    return grid.astype(np.float32), float(math.prod(a[1] - a[0] for a in axes)), data.astype(np.float32)


def quadrature_nll(
    model_logp: Float[np.ndarray, "M"], true_logp: Float[np.ndarray, "M"], cell: float
) -> dict[str, Any]:
    """NLL = -int p log q, entropy -int p log p and KL(p || q) in nats, by the trapezoid rule on a regular grid.

    p is normalised on the grid, so the entropy and the NLL carry the same small error and their difference, KL, less.
    `model_mass` = int q should be close to 1: it tells whether the grid is wide and the ODE tolerance tight enough.
    """
    true_logp, model_logp = np.asarray(true_logp, np.float64), np.asarray(model_logp, np.float64)
    p = np.where(np.isfinite(true_logp), np.exp(true_logp), 0.0)
    mass = trapezoid(p, dx=cell)
    p = p / mass
    entropy = -trapezoid(np.where(p > 0, p * np.where(p > 0, true_logp, 0.0), 0.0), dx=cell)
    nll = -trapezoid(p * model_logp, dx=cell)
    return {
        "exact_nll": float(nll),
        "true_entropy": float(entropy),
        "kl": float(nll - entropy),
        "model_mass": float(trapezoid(np.exp(model_logp), dx=cell)),
    }
