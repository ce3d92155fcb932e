# SPDX-License-Identifier: Apache-2.0
"""Metrics of a trained model, each computed per example before any mean."""

import functools
import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.linalg import solve_triangular

import datasets
from errors import UserError
from inception import UNKNOWN, Features, Statistics
from inception import compute_statistics as compute_statistics
from inception import inception_features as inception_features
from inception import load_features as load_features
from inception import load_statistics as load_statistics
from inception import statistics_path as statistics_path
from inception import stats as stats

KID_BLOCK_SIZE = 1024  # tensorflow-gan's default, which the public code keeps


def mean_and_stderr(values: Float[np.ndarray, "R N"]) -> dict[str, Any]:
    """Mean over R repeats and N examples, and its standard error over the examples (each averaged over its repeats).

    For more than one repeat also `stderr_over_repeats`, which is that of the noise (dequantisation, probes) alone. An
    example with a value that is not finite has failed: all is of the others, and `num_failed` says how many it leaves
    out. Without failures that key is not there.
    """
    whole = np.isfinite(values).all(axis=0)
    failed, values = int(np.sum(~whole)), values[:, whole]
    per_example = np.mean(values, axis=0, dtype=np.float64)
    repeats, n = values.shape
    stderr = float(np.std(per_example, ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    mean = float(np.mean(per_example)) if n else math.nan
    result = {"mean": mean, "stderr": stderr, "num_examples": n, "num_repeats": repeats, **failures(failed)}
    if repeats > 1:
        over_repeats = np.std(np.mean(values, axis=1, dtype=np.float64), ddof=1) / math.sqrt(repeats)
        result["stderr_over_repeats"] = float(over_repeats)
    return result


def failures(count: int) -> dict[str, int]:
    """What marks a result as incomplete, if `count` examples or samples failed."""
    return {"num_failed": count} if count else {}


def gaussian_bits_per_dim(
    dataset: datasets.Dataset, data_config: Any, seed: int, split: str = "test", limit: int = 0
) -> float:
    """Bits/dim of a split, or of its first `limit` examples, under the Gaussian of the training split's moments.

    Both uniformly dequantised as in the model's likelihood, u / 256 in [0, 1): what a model of means and covariances
    alone can do, for images small enough that D x D numbers and more than D training images are at hand. The moments
    are those of batches, merged (Chan, Golub and LeVeque 1979), so it holds a batch at a time.
    """

    def batches(name: str, limit: int = 0) -> Iterator[np.ndarray]:
        for batch in datasets.eval_batches(dataset, data_config, name, 1024, seed=seed, limit=limit):
            x = datasets.get_data_inverse_scaler(data_config.centered)(batch["x"].astype(np.float64))
            yield x.reshape(len(x), -1)

    dim = math.prod(dataset.shape)
    count, mean, scatter = 0, np.zeros(dim), np.zeros((dim, dim))
    for x in batches("train"):
        shift, centred = x.mean(axis=0) - mean, x - x.mean(axis=0)
        total = count + len(x)
        scatter += centred.T @ centred + count * len(x) / total * np.outer(shift, shift)
        mean, count = mean + len(x) / total * shift, total
    factor = np.linalg.cholesky(scatter / (count - 1))
    squares = [np.sum(solve_triangular(factor, (x - mean).T, lower=True) ** 2, axis=0) for x in batches(split, limit)]
    nats = 0.5 * np.mean(np.concatenate(squares)) + np.sum(np.log(np.diag(factor))) + 0.5 * dim * math.log(2 * math.pi)
    return float(nats / (dim * math.log(2)) + 8)


class Grid(NamedTuple):
    """A rule of quadrature: int f = sum of weights * f(points). In 2-D the points are row-major, as many on each axis.

    Every third point of each axis makes a coarser rule of the same kind, of the points `thirds`.
    """

    points: Float[np.ndarray, "M D"]
    weights: Float[np.ndarray, "M"]
    thirds: Int[np.ndarray, "m"]


def density_grid(dataset: datasets.Dataset, points: int = 3999, points_2d: int = 126) -> tuple[Grid, np.ndarray]:
    """A grid over 1-D or 2-D data with a margin of a quarter of their range; data float32 [N, D]."""
    data = np.stack([dataset.test[i] for i in range(min(5000, len(dataset.test)))]).astype(np.float64)
    margin = 0.25 * (data.max(axis=0) - data.min(axis=0))
    ends = zip(data.min(axis=0) - margin, data.max(axis=0) + margin, strict=True)
    count = points if data.shape[1] == 1 else points_2d
    axes, weights = zip(*(_midpoints(low, high, dataset.breaks, count) for low, high in ends), strict=True)
    shape = [len(axis) for axis in axes]
    thirds = np.arange(math.prod(shape)).reshape(shape)[(slice(1, None, 3),) * len(shape)]
    grid = np.stack([g.reshape(-1) for g in np.meshgrid(*axes, indexing="ij")], axis=-1)
    product = functools.reduce(np.multiply.outer, weights).reshape(-1)
    return Grid(grid.astype(np.float32), product, thirds.reshape(-1)), data.astype(np.float32)


def _midpoints(low: float, high: float, breaks: Sequence[float], count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` points or a few more of [low, high], and their weights: the midpoint rule, of second order or better.

    Between breaks, where the density jumps and a model's has a thin layer, the rule is that of u in [0, 1] with
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
    """NLL = -int p log q, entropy -int p log p and KL(p || q) in nats, by quadrature; weights: one for all, or each.

    p is normalised on the grid, so the entropy and the NLL carry the same small error and their difference, KL, less.
    `model_mass` = int q should be close to 1: it tells whether the grid is wide and the ODE tolerance tight enough.
    With the `thirds` of a `Grid` also `kl_grid_error`, an estimate of KL's error: |KL - KL of the thirds| / (3^2 - 1),
    by Richardson for a rule of second order.
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


# Samples of images. Features are in `inception`; TensorFlow is imported late, because training needs none of this.
class KernelDistance(NamedTuple):
    """`mean`: KID of all features. `stderr`: its standard error. The rest: the subsets' own KIDs."""

    mean: float
    stderr: float
    subset_mean: float
    subset_std: float
    subset_size: int
    num_subsets: int


@functools.cache
def _tfgan() -> Any:
    """tensorflow-gan's classifier metrics.

    Its package does not import on TensorFlow 2.16 and later: it loads its estimators, and `tf.estimator` is gone. Bare
    modules in place of the packages above the metrics let them be found without running those packages' own imports.
    """
    import tensorflow as tf

    spec = importlib.util.find_spec("tensorflow_gan")
    assert spec is not None and spec.submodule_search_locations, "tensorflow-gan is in requirements.txt"
    folder = Path(spec.submodule_search_locations[0])
    for name in ("tensorflow_gan", "tensorflow_gan.python", "tensorflow_gan.python.eval"):
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = package
    tf.get_logger().setLevel("ERROR")  # that they use deprecated arguments is nothing that the user can mend
    return importlib.import_module("tensorflow_gan.python.eval.classifier_metrics")


def frechet_distance(real: Float[np.ndarray, "N d"], fake: Float[np.ndarray, "M d"]) -> float:
    """FID: |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) of the means and unbiased covariances (Heusel et al. 2017).

    By tensorflow-gan, in float64. Biased upwards by some 1/N + 1/M: compare at equal numbers only. With fewer examples
    than dimensions it is finite, but mostly that bias.
    """
    return float(_tfgan().frechet_classifier_distance_from_activations(_float64(real), _float64(fake)))


def inception_score(logits: Float[np.ndarray, "N k"]) -> float:
    """exp of the mean over x of KL(p(y|x) || p(y)), of all examples at once, no splits (Salimans et al. 2016).

    By tensorflow-gan, in float64.
    """
    return float(_tfgan().classifier_score_from_logits(_float64(logits)))


def kernel_distance(
    real: Float[np.ndarray, "N d"], fake: Float[np.ndarray, "M d"], subsets: int = 100, subset_size: int = 1000
) -> KernelDistance:
    """KID, the unbiased squared MMD under k(x, y) = (x . y / d + 1)^3 (Binkowski et al. 2018), and its standard error.

    mean: tensorflow-gan's block estimator over all features, in float64: ceil(max(N, M) / 1024) blocks in the order
    given (which must not be sorted), averaged. Every block needs two of each: of the larger set, where it is more than
    512 times the smaller, a random part (seed 0) is used.

    stderr: of `mean`, from random blocks of the sizes of its n blocks. With s the standard deviation of `subsets` such
    KIDs it is s / sqrt(n - 1): random blocks overlap, so that E s^2 is 1 - 1/n of a block's variance. A single block is
    halved instead, stderr = s: the delete-half jackknife (Shao and Wu 1989). That is to first order in 1/N and 1/M;
    where the two distributions are equal it is too large, by sqrt(1 + 1/n), for a single block by sqrt(3). NaN with
    fewer than 4 of either, or subsets < 2.

    The literature's "mean +- std" is subset_mean and subset_std, of subsets of m = min(subset_size, min(N, M) // 2)
    examples drawn without replacement: the spread of a KID of m examples, not the error of `mean`. NaN where m < 2.
    """
    smaller = min(len(real), len(fake))
    most = KID_BLOCK_SIZE * (smaller // 2)

    def thinned(x: np.ndarray) -> np.ndarray:
        return x[np.random.default_rng(0).permutation(len(x))[:most]] if len(x) > most else x

    real_kept, fake_kept = thinned(real), thinned(fake)
    mean = _kid(real_kept, fake_kept, KID_BLOCK_SIZE)
    stderr = _kid_stderr(real_kept, fake_kept, subsets)
    m = min(subset_size, smaller // 2)
    kids = np.full(max(subsets, 1), math.nan)
    for i in range(subsets if m >= 2 else 0):
        rng = np.random.default_rng(i)
        some_real, some_fake = (x[rng.choice(len(x), m, replace=False)] for x in (real, fake))
        kids[i] = _kid(some_real, some_fake, m)
    std = float(np.std(kids, ddof=1)) if len(kids) > 1 else math.nan
    return KernelDistance(mean, stderr, float(np.mean(kids)), std, m, subsets)


def _kid_stderr(real: np.ndarray, fake: np.ndarray, subsets: int) -> float:
    """`KernelDistance.stderr`: random block i, seed (1, i), is as large as block i mod n of tensorflow-gan."""
    n = max(2, math.ceil(max(len(real), len(fake)) / KID_BLOCK_SIZE))
    if min(len(real), len(fake)) < 2 * n or subsets < 2:
        return math.nan
    kids = []
    for i in range(subsets):
        rng = np.random.default_rng((1, i))
        some_real, some_fake = (x[rng.choice(len(x), (len(x) + i % n) // n, replace=False)] for x in (real, fake))
        kids.append(_kid(some_real, some_fake, max(len(some_real), len(some_fake))))
    return float(np.std(kids, ddof=1) / math.sqrt(n - 1))


def _kid(real: np.ndarray, fake: np.ndarray, block_size: int) -> float:
    metric = _tfgan().kernel_classifier_distance_from_activations
    return float(metric(_float64(real), _float64(fake), max_block_size=block_size))


def _float64(x: np.ndarray) -> Any:
    import tensorflow as tf

    return tf.constant(x, tf.float64)


def sample_metrics(
    features: Features,
    statistics: Statistics,
    pool_3: Float[np.ndarray, "M d"],
    logits: Float[np.ndarray, "M k"],
    eval_config: Any,
) -> dict[str, Any]:
    """IS, FID and KID of M samples and what they were made with, for JSON.

    UserError: fewer than 2 samples, or statistics of other features (those of a public file cannot be told apart).
    """
    if len(pool_3) < 2:
        raise UserError(f"IS, FID and KID need 2 samples, not {len(pool_3)}; raise eval.num_samples")
    known = statistics.features_hash != UNKNOWN
    if statistics.pool_3.shape[1] != pool_3.shape[1] or (known and statistics.features_hash != features.hash):
        raise UserError(
            f"{statistics.path} has {statistics.pool_3.shape[1]} features of {statistics.features_name}, hash "
            f"{statistics.features_hash}; the samples' are {pool_3.shape[1]} of {features.name}, hash {features.hash}: "
            "make the file anew with --mode stats, or set eval.inception_path to the same features"
        )
    kid = kernel_distance(statistics.pool_3, pool_3, eval_config.kid_subsets, eval_config.kid_subset_size)
    return {
        "inception_score": inception_score(logits),
        "fid": frechet_distance(statistics.pool_3, pool_3),
        "kid": kid._asdict(),
        "num_samples": len(pool_3),
        "features": {
            "name": features.name,
            "hash": features.hash,
            "resize": features.resize,
            "comparable": features.comparable,
            "note": features.note,
        },
        "statistics": {
            "path": statistics.path,
            "hash": statistics.hash,
            "num_images": len(statistics.pool_3),
            "features_name": statistics.features_name,
            "features_hash": statistics.features_hash,
        },
    }
