# SPDX-License-Identifier: Apache-2.0
"""Inception features of images, and the files that hold a data set's.

TF-Hub's `tfgan/eval/inception/1`, whose pool_3 [2048] and logits [1008] the published IS, FID and KID of this line of
work are made of, or a SavedModel on disk. TensorFlow is imported late, because training needs none of this.
"""

import dataclasses
import hashlib
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Float32, UInt8

import datasets
from errors import UserError
from runtime import records
from sources import reach

TFHUB_HANDLE = "https://tfhub.dev/tensorflow/tfgan/eval/inception/1"
POOL_DIM, LOGITS_DIM = 2048, 1008
UNKNOWN = "unknown (public layout)"

FeatureFn = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Features:
    """A network of features, and what a result must say about it.

    fn: (images uint8 [N, H, W, 1 or 3], batch size) -> pool_3 float32 [N, d], logits float32 [N, k].
    hash: of the SavedModel's graph and weights. resize: who brings the images to the network's size, and how.
    comparable: whether results compare with published ones, as far as can be known; note: why.
    """

    fn: FeatureFn
    name: str
    hash: str
    resize: str
    comparable: bool
    note: str


class Statistics(NamedTuple):
    """The features of a data set: pool_3 [N, d] and where they are from; `hash` is of pool_3's bytes."""

    path: str
    pool_3: np.ndarray
    hash: str
    features_name: str
    features_hash: str


def inception_features(
    images: UInt8[np.ndarray, "N H W C"], path: str = "", batch_size: int = 100
) -> tuple[Float32[np.ndarray, "N d"], Float32[np.ndarray, "N k"]]:
    """pool_3 [N, 2048] and logits [N, 1008] of images in 0..255. Loads the network; for many calls `load_features`."""
    return load_features(path).fn(images, batch_size)


def load_features(path: str = "") -> Features:
    """The features of TF-Hub's `tfgan/eval/inception/1` or, if path is given, of the SavedModel in that folder.

    Images go in as (u - 127.5) / 127.5, float32 in [-1, 1], one channel as three equal ones. They go in at their own
    size, which the TF-Hub network itself brings to its own, unless the SavedModel takes one size only: then they are
    resized to it as tensorflow-gan once did, by TensorFlow 1's bilinear (pixel i is read at i * in / out; no
    antialiasing). TensorFlow runs on a GPU where it finds one, and takes of its memory what it needs.

    Offline nothing proves a folder to be TF-Hub's network; `comparable` is then False, and `hash` is there to compare.
    UserError: TF-Hub out of reach (within seconds), no SavedModel, no outputs pool_3 and logits.
    """
    import tensorflow as tf

    for gpu in tf.config.list_physical_devices("GPU"):
        try:  # TensorFlow would otherwise take all the memory that JAX left
            tf.config.experimental.set_memory_growth(gpu, True)
        except RuntimeError:
            logging.warning("TensorFlow was in use before: its memory on %s can no longer be limited", gpu.name)
    folder = Path(path).expanduser() if path else _tfhub_folder()
    call, size = _network(folder)
    resize = "inside the module" if size is None else f"bilinear to {size[0]}x{size[1]}, as TensorFlow 1's"

    def fn(images: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        parts = [call(images[start : start + batch_size]) for start in range(0, len(images), batch_size)]
        pools, logits = zip(*parts, strict=True)
        return np.concatenate(pools), np.concatenate(logits)

    try:
        pool_3, logits = fn(np.zeros((1, *(size or (32, 32)), 3), np.uint8), 1)
    except KeyError as error:
        raise UserError(f"{folder} has no output {error}; the network must give pool_3 and logits") from error
    except (TypeError, ValueError, IndexError, tf.errors.OpError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder} does not take images float32 [N, H, W, 3] ({reason}); set eval.inception_path to another"
        ) from error
    dims = (pool_3.shape[1], logits.shape[1])
    if dims != (POOL_DIM, LOGITS_DIM):
        note = f"not comparable with published results: pool_3 and logits have {dims[0]} and {dims[1]} numbers"
    elif path:
        note = f"comparable with published results only if this folder is {TFHUB_HANDLE}"
    else:
        note = "comparable with published results"
    comparable = not path and dims == (POOL_DIM, LOGITS_DIM)
    return Features(fn, path or TFHUB_HANDLE, _hash_of_model(folder), resize, comparable, note)


def _network(folder: Path) -> tuple[Callable, tuple[int, int] | None]:
    """uint8 [n, H, W, 1 or 3] -> pool_3, logits; and the height and width that it demands, or None if it takes any."""
    import tensorflow as tf

    if not (folder / "saved_model.pb").is_file():
        raise UserError(
            f"eval.inception_path={str(folder)!r} has no saved_model.pb: set it to the folder of a SavedModel"
        )
    try:
        model = tf.saved_model.load(str(folder))
    except (OSError, ValueError, RuntimeError, tf.errors.OpError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} cannot be read as a SavedModel ({reason}); copy it anew") from error
    if callable(model):
        functions, call = model.__call__.concrete_functions, model
    elif signatures := dict(model.signatures):
        signature: Any = signatures.get("serving_default") or next(iter(signatures.values()))
        argument = next(iter(signature.structured_input_signature[1]), "images")
        functions, call = [signature], lambda x: signature(**{argument: x})
    else:
        raise UserError(f"{folder} can neither be called nor has a signature; export it with one")
    inputs = [spec for f in functions for spec in tf.nest.flatten(f.structured_input_signature)]
    shapes = [spec.shape for spec in inputs if isinstance(spec, tf.TensorSpec) and spec.shape.rank == 4]
    sizes: list[Any] = [(shape[1], shape[2]) for shape in shapes]
    size = None if not sizes or any(None in s for s in sizes) else max(sizes)

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x = (images.astype(np.float32) - np.float32(127.5)) / np.float32(127.5)
        x = tf.constant(np.repeat(x, 3, axis=-1) if x.shape[-1] == 1 else x)
        if size is not None and x.shape[1:3] != size:
            x = tf.compat.v1.image.resize_bilinear(x, size)
        outputs: Any = call(x)
        if not hasattr(outputs, "keys"):
            raise KeyError("pool_3")
        pool_3, logits = (np.asarray(outputs[name], np.float32) for name in ("pool_3", "logits"))
        return pool_3.reshape(len(images), -1), logits.reshape(len(images), -1)

    return run, size


def _tfhub_folder() -> Path:
    """Where TF-Hub's network lies, downloaded if it is not there yet; a short probe first, as urllib waits minutes."""
    import tensorflow as tf

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # requirements.txt holds setuptools for it
        import tensorflow_hub as hub

    cache = Path(os.environ.get("TFHUB_CACHE_DIR") or Path(tempfile.gettempdir(), "tfhub_modules"))
    cached = cache / hashlib.sha1(TFHUB_HANDLE.encode()).hexdigest()
    reason = "" if (cached / "saved_model.pb").is_file() else reach.why_unreachable(TFHUB_HANDLE)
    if not reason:
        try:
            return Path(hub.resolve(TFHUB_HANDLE))
        except (OSError, ValueError, tf.errors.OpError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    raise UserError(
        f"{TFHUB_HANDLE} is neither in {cache} nor can be downloaded ({reason}): download it where there is a network "
        "and set eval.inception_path to its folder, or set eval.enable_metrics=False"
    )


def _hash_of_model(folder: Path) -> str:
    """Of the names and bytes of the graph and the weights; a copy of the folder has the same."""
    digest = hashlib.sha256()
    for path in [folder / "saved_model.pb", *sorted((folder / "variables").glob("*"))]:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def statistics_path(data_config: Any, stats_path: str = "") -> Path:
    """stats_path or, if empty, assets/stats/<name>_stats.npz, in the working directory: the public code's names."""
    return Path(stats_path).expanduser() if stats_path else Path("assets/stats", f"{_data_name(data_config)}_stats.npz")


def _data_name(data_config: Any) -> str:
    """cifar10, imagenet32 (its newer copy imagenet_resized32), lsun_<category>_<size>, else the name in lower case."""
    name, size = data_config.dataset, data_config.image_size
    if name == "LSUN":
        return f"lsun_{data_config.category}_{size}"
    if name == "ImageNet":
        newer = data_config.category == "imagenet_resized"
        return f"imagenet_resized{size}" if newer else f"imagenet{size}"
    return name.lower()


def load_statistics(path: Path, data_config: Any = None) -> Statistics:
    """The features that `compute_statistics` wrote, or of a public file, an npz with `pool_3` [N, d] and no more.

    UserError: no such file, not one of these, or, if data_config is given, one of other images.
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
    pool_3 = arrays["pool_3"].reshape(len(arrays["pool_3"]), -1)
    name, hash_ = (str(arrays.get(key, UNKNOWN)) for key in ("features_name", "features_hash"))
    digest = hashlib.sha256(np.ascontiguousarray(pool_3).data).hexdigest()[:16]
    return Statistics(str(path), pool_3, digest, name, hash_)


def _images_name(data_config: Any) -> str:
    return f"{_data_name(data_config)} {data_config.image_size}x{data_config.image_size}"


def compute_statistics(
    dataset: datasets.Dataset, data_config: Any, features: Features, path: Path, batch_size: int = 100
) -> Path:
    """Writes the features of every training image, in order and as it is: 8 bits, no flip, no dequantisation.

    Holds the N d features once. UserError if the file there is of other features, a public one for example: it may not
    be possible to make it anew.
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
    text = {
        "data": _images_name(data_config),
        "features_name": features.name,
        "features_hash": features.hash,
        "resize": features.resize,
    }
    records.write_npz(path, pool_3=pool_3, **{key: np.array(value) for key, value in text.items()})
    return path


def stats(config: Any) -> Path:
    """`--mode stats`: the file of the features of the config's training images. UserError if they are not images."""
    dataset = datasets.load(config.data)
    if not dataset.is_image:
        raise UserError(f"--mode stats needs images; data.dataset={config.data.dataset!r} has none")
    path = statistics_path(config.data, config.eval.stats_path)
    features = load_features(config.eval.inception_path)
    return compute_statistics(dataset, config.data, features, path, config.eval.inception_batch_size)
