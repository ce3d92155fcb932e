# SPDX-License-Identifier: Apache-2.0
"""The network whose features of images make IS, FID and KID: TF-Hub's `tfgan/eval/inception/1` or a SavedModel on disk.

The published IS, FID and KID of this line of work are made of the former's pool_3 [2048] and logits [1008].
TensorFlow is imported late, because training does not need it.
"""

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from errors import UserError
from evaluation import Features
from sources import reach

TFHUB_HANDLE = "https://tfhub.dev/tensorflow/tfgan/eval/inception/1"
POOL_DIM, LOGITS_DIM = 2048, 1008


def load_features(path: str = "") -> Features:
    """Loads TF-Hub's `tfgan/eval/inception/1` or, if path is given, the SavedModel in that folder.

    Images go in as (u - 127.5) / 127.5, float32 in [-1, 1], one channel as three equal ones. They keep their size, and
    the TF-Hub network resizes them itself. If a SavedModel takes one size only, images are resized to it by TensorFlow
    1's bilinear (pixel i is read at i * in / out; no antialiasing), as tensorflow-gan once did. TensorFlow runs on a
    GPU if it finds one, and takes as much of its memory as it needs.

    Nothing proves a folder to be TF-Hub's network, so `comparable` is False for it. `hash` is there to compare.
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
        batches = [call(images[start : start + batch_size]) for start in range(0, len(images), batch_size)]
        pools, logits = zip(*batches, strict=True)
        return np.concatenate(pools), np.concatenate(logits)

    try:
        pool_3, logits = fn(np.zeros((1, *(size or (32, 32)), 3), np.uint8), 1)
    except KeyError as error:
        raise UserError(f"{folder} has no output {error}; the network must give pool_3 and logits") from error
    except (TypeError, ValueError, IndexError, tf.errors.OpError) as error:
        takes_not = f"{folder} does not take images float32 [N, H, W, 3] ({_in_one_line(error)})"
        raise UserError(f"{takes_not}; set eval.inception_path to another") from error
    pool_dim, logits_dim = pool_3.shape[1], logits.shape[1]
    note = "comparable with published results"
    if (pool_dim, logits_dim) != (POOL_DIM, LOGITS_DIM):
        note = f"not {note}: pool_3 and logits have {pool_dim} and {logits_dim} numbers"
    elif path:
        note = f"{note} only if this folder is {TFHUB_HANDLE}"
    comparable = not path and (pool_dim, logits_dim) == (POOL_DIM, LOGITS_DIM)
    return Features(fn, path or TFHUB_HANDLE, _hash_of_model(folder), resize, comparable, note)


def _network(folder: Path) -> tuple[Callable, tuple[int, int] | None]:
    """(uint8 [n, H, W, 1 or 3]) -> pool_3, logits; and the height and width that it demands, or None for any."""
    import tensorflow as tf

    if not (folder / "saved_model.pb").is_file():
        raise UserError(
            f"eval.inception_path={str(folder)!r} has no saved_model.pb: set it to the folder of a SavedModel"
        )
    try:
        model = tf.saved_model.load(str(folder))
    except (OSError, ValueError, RuntimeError, tf.errors.OpError) as error:
        raise UserError(f"{folder} cannot be read as a SavedModel ({_in_one_line(error)}); copy it anew") from error
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
    """The folder of TF-Hub's network, downloaded if it is not there. A short probe goes first: urllib waits minutes."""
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
            reason = f"{type(error).__name__}: {_in_one_line(error)}"
    raise UserError(
        f"{TFHUB_HANDLE} is neither in {cache} nor can be downloaded ({reason}): download it where there is a network "
        "and set eval.inception_path to its folder, or set eval.enable_metrics=False"
    )


def _hash_of_model(folder: Path) -> str:
    """A hash of the names and bytes of the graph and the weights."""
    digest = hashlib.sha256()
    for path in [folder / "saved_model.pb", *sorted((folder / "variables").glob("*"))]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
