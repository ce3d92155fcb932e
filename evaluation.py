# SPDX-License-Identifier: Apache-2.0
"""Metrics: means with standard errors, IS, FID and KID; and statistics files, a data set's features."""

import functools
import hashlib
import importlib
import importlib.util
import math
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Float
from scipy.linalg import solve_triangular

import datasets
from errors import UserError
from runtime import records

KID_BLOCK_SIZE = 1024  # tensorflow-gan's default, which the public code keeps


def mean_and_stderr(values: Float[np.ndarray, "R N"]) -> dict[str, Any]:
    """Mean over R repeats and N examples, and its standard error over the examples (each averaged over its repeats).

    With more than one repeat, `stderr_over_repeats` is the standard error that the noise (dequantisation, probes) alone
    makes. Examples with a value that is not finite have failed: they are left out, and `num_failed` counts them.
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
    """Marks a result as incomplete if `count` examples or samples failed; else it is empty."""
    return {"num_failed": count} if count else {}


def gaussian_bits_per_dim(
    dataset: datasets.Dataset, data_config: Any, seed: int, split: str = "test", limit: int = 0
) -> float:
    """Bits/dim of a split, or of its first `limit` examples, under the Gaussian with the training split's moments.

    This is what means and covariances alone can do. Images are dequantised uniformly, as for the model's likelihood.
    It takes D x D numbers, a batch of images at a time, and more than D training images. The moments of the batches are
    merged (Chan, Golub and LeVeque 1979).
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
    return float(nats / (dim * math.log(2)) + math.log2(dataset.levels))


# TensorFlow is imported late, because training needs none of what follows.
UNKNOWN = "unknown (public layout)"  # the features in a statistics file of the public code


def check_levels(dataset: datasets.Dataset) -> None:
    """UserError if the images have not 256 levels, which the features of IS, FID and KID are made for."""
    if dataset.levels != 256:
        raise UserError(
            f"data.dataset={dataset.name!r} has {dataset.levels} levels: IS, FID and KID are of 8-bit images; "
            "set eval.enable_metrics=False"
        )


class Features(NamedTuple):
    """A network that computes features, and what a result must say about it.

    fn: (images uint8 [N, H, W, 1 or 3], batch size) -> pool_3 float32 [N, d], logits float32 [N, k].
    hash: of the SavedModel's graph and weights. resize: how images are brought to the network's size.
    comparable: whether results compare with published ones, as far as can be known; note: why.
    """

    fn: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
    name: str
    hash: str
    resize: str
    comparable: bool
    note: str


class Statistics(NamedTuple):
    """The features of a data set, pool_3 [N, d], and their origin; `hash` is of pool_3's bytes."""

    path: str
    pool_3: np.ndarray
    hash: str
    num_images: int  # N
    features_name: str
    features_hash: str


class KernelDistance(NamedTuple):
    """The KID of all features and its standard error; mean and standard deviation of the KIDs of subsets."""

    mean: float
    stderr: float
    subset_mean: float
    subset_std: float
    subset_size: int
    num_subsets: int


@functools.cache
def _tfgan() -> Any:
    """tensorflow-gan's classifier metrics.

    Its package does not import on TensorFlow 2.16 and later, because its estimators need `tf.estimator`. Bare modules
    in place of the packages above the metrics let the metrics be found without running those packages' imports.
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
    tf.get_logger().setLevel("ERROR")  # no user can mend that the metrics use deprecated arguments
    return importlib.import_module("tensorflow_gan.python.eval.classifier_metrics")


def _by_tfgan(metric: str, *arrays: np.ndarray, **options: int) -> float:
    """The tensorflow-gan metric of that name, in float64."""
    import tensorflow as tf

    return float(getattr(_tfgan(), metric)(*(tf.constant(x, tf.float64) for x in arrays), **options))


def frechet_distance(real: Float[np.ndarray, "N d"], fake: Float[np.ndarray, "M d"]) -> float:
    """FID: |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) of the means and unbiased covariances (Heusel et al. 2017).

    It is biased upwards by some 1/N + 1/M: compare at equal numbers only. With fewer examples than dimensions it is
    finite, but mostly that bias.
    """
    return _by_tfgan("frechet_classifier_distance_from_activations", real, fake)


def inception_score(logits: Float[np.ndarray, "N k"]) -> float:
    """exp of the mean over x of KL(p(y|x) || p(y)), of all examples at once, no splits (Salimans et al. 2016)."""
    return _by_tfgan("classifier_score_from_logits", logits)


def kernel_distance(
    real: Float[np.ndarray, "N d"], fake: Float[np.ndarray, "M d"], subsets: int = 100, subset_size: int = 1000
) -> KernelDistance:
    """KID, the unbiased squared MMD under k(x, y) = (x . y / d + 1)^3 (Binkowski et al. 2018), and its standard error.

    mean: tensorflow-gan's block estimator over all features, in float64. It averages ceil(max(N, M) / 1024) blocks in
    the order given, which must not be sorted. Every block needs two of each set: if one is more than 512 times the
    other, a random part of it (seed 0) is used.

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

    mean = _kid(thinned(real), thinned(fake), KID_BLOCK_SIZE)
    stderr = _kid_stderr(thinned(real), thinned(fake), subsets)
    m = min(subset_size, smaller // 2)
    kids = [_random_kid(i, real, fake, m, m) for i in range(subsets if m >= 2 else 0)] or [math.nan]
    std = float(np.std(kids, ddof=1)) if len(kids) > 1 else math.nan
    return KernelDistance(mean, stderr, float(np.mean(kids)), std, m, subsets)


def _kid_stderr(real: np.ndarray, fake: np.ndarray, subsets: int) -> float:
    """`KernelDistance.stderr`: random block i, seed (1, i), is as large as block i mod n of tensorflow-gan."""
    n = max(2, math.ceil(max(len(real), len(fake)) / KID_BLOCK_SIZE))
    if min(len(real), len(fake)) < 2 * n or subsets < 2:
        return math.nan
    sizes = [((len(real) + i % n) // n, (len(fake) + i % n) // n) for i in range(subsets)]
    kids = [_random_kid((1, i), real, fake, *sizes[i]) for i in range(subsets)]
    return float(np.std(kids, ddof=1) / math.sqrt(n - 1))


def _random_kid(seed: int | tuple[int, int], real: np.ndarray, fake: np.ndarray, n: int, m: int) -> float:
    """KID of one block: n real features and m fake ones, drawn without replacement."""
    rng = np.random.default_rng(seed)
    some_real = real[rng.choice(len(real), n, replace=False)]
    return _kid(some_real, fake[rng.choice(len(fake), m, replace=False)], max(n, m))


def _kid(real: np.ndarray, fake: np.ndarray, block_size: int) -> float:
    return _by_tfgan("kernel_classifier_distance_from_activations", real, fake, max_block_size=block_size)


def sample_metrics(
    features: Features,
    statistics: Statistics,
    pool_3: Float[np.ndarray, "M d"],
    logits: Float[np.ndarray, "M k"],
    eval_config: Any,
) -> dict[str, Any]:
    """IS, FID and KID of M samples and what they were made with, for JSON.

    UserError: fewer than 2 samples, or statistics of other features (a public file does not tell which it has).
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
        "features": {key: value for key, value in features._asdict().items() if key != "fn"},
        "statistics": {key: value for key, value in statistics._asdict().items() if key != "pool_3"},
    }


def statistics_path(data_config: Any, stats_path: str = "") -> Path:
    """stats_path or, if empty, the public code's assets/stats/<name>_stats.npz in the working directory."""
    return Path(stats_path).expanduser() if stats_path else Path("assets/stats", f"{_data_name(data_config)}_stats.npz")


def _data_name(data_config: Any) -> str:
    """cifar10, imagenet32, imagenet_resized32 (the newer copy), lsun_<category>_<size>, else the name in lower case."""
    name, size = data_config.dataset, data_config.image_size
    if name == "LSUN":
        return f"lsun_{data_config.category}_{size}"
    if name == "ImageNet":
        return f"imagenet_resized{size}" if data_config.category == "imagenet_resized" else f"imagenet{size}"
    return name.lower()


def load_statistics(path: Path, data_config: Any = None) -> Statistics:
    """Reads a file of `compute_statistics` or a public one, an npz with `pool_3` [N, d] and no more.

    UserError: no such file, another kind of file, or, if data_config is given, the features of other images.
    """
    if not path.is_file():
        raise UserError(
            f"{path}, the features of the training images, does not exist: make it with --mode stats, "
            "or set eval.stats_path"
        )
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:  # np.load leaves a damaged file open
            arrays = {name: saved[name] for name in saved.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as an npz file ({error}); make it with --mode stats") from error
    if "pool_3" not in arrays or len(arrays["pool_3"]) < 2:
        raise UserError(f"{path} has no array pool_3 of two rows or more; make it with --mode stats")
    if data_config is not None and "data" in arrays and str(arrays["data"]) != _images_name(data_config):
        raise UserError(
            f"{path} is of {arrays['data']}, not of {_images_name(data_config)}: "
            "set eval.stats_path to another file and make it with --mode stats"
        )
    count = len(arrays["pool_3"])
    pool_3 = arrays["pool_3"].reshape(count, -1)
    name, hash_ = (str(arrays.get(key, UNKNOWN)) for key in ("features_name", "features_hash"))
    digest = hashlib.sha256(np.ascontiguousarray(pool_3).data).hexdigest()[:16]
    return Statistics(str(path), pool_3, digest, count, name, hash_)


def _images_name(data_config: Any) -> str:
    return f"{_data_name(data_config)} {data_config.image_size}x{data_config.image_size}"


def compute_statistics(
    dataset: datasets.Dataset, data_config: Any, features: Features, path: Path, batch_size: int = 100
) -> Path:
    """Writes the features of every training image, in order, in 8 bits, neither flipped nor dequantised.

    Holds the N d features once. UserError if `path` exists with other features, because nobody may be able to make
    that file anew, if it is a public one for example.
    """
    if path.exists() and (old := load_statistics(path).features_hash) != features.hash:
        raise UserError(f"{path} exists, of features {old}, not {features.hash}: move it or set eval.stats_path")
    count, pool_3 = len(dataset.train), np.empty((0, 0), np.float32)
    for start in range(0, count, batch_size):
        stop = min(start + batch_size, count)
        batch, _ = features.fn(dataset.train[np.arange(start, stop)], batch_size)
        if start == 0:
            pool_3 = np.empty((count, batch.shape[1]), np.float32)
        pool_3[start:stop] = batch
        if 10 * stop // count > 10 * start // count:
            logging.info("features of the training images: %d of %d", stop, count)
    facts = _images_name(data_config), features.name, features.hash, features.resize
    names = "data", "features_name", "features_hash", "resize"
    records.write_npz(path, pool_3=pool_3, **dict(zip(names, map(np.array, facts), strict=True)))
    return path
