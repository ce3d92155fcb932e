# SPDX-License-Identifier: Apache-2.0
"""Random access to what tensorflow-datasets prepared as array records."""

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from errors import UserError
from sources import reach


def builder(dataset: str, name: str, data_dir: str, host: str) -> Any:
    """The builder of the newest version of `name` in data_dir, $TFDS_DATA_DIR or ~/tensorflow_datasets.

    If there is none, tensorflow-datasets downloads it from `host`. If that cannot be reached, a UserError says within
    seconds what to put where.
    """
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    versions = [path.parent for path in (root / name).glob("*.*.*/dataset_info.json")]
    newest = max(versions, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)], default=None)
    folder = newest or _download(dataset, name, root, host)
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(folder)


def read_split(builder: Any, split: str, size: int, fit: Callable) -> tuple[int, Callable[[np.ndarray], np.ndarray]]:
    """The number of images of a split, and the function index [B] -> uint8 [B, size, size, 3] that reads them.

    An image is decoded when it is asked for, and then kept if the whole split takes 1 GiB at most.
    fit: uint8 [H, W, 3] -> [size, size, 3].
    """
    info, folder = builder.info, builder.data_dir
    if split not in info.splits:
        raise UserError(f"{folder} has no split {split!r}, which is needed; prepare {info.full_name} anew")
    if missing := [path for path in info.splits[split].filepaths if not Path(path).is_file()]:
        raise UserError(f"{missing[0]} is missing; prepare the data set anew, or copy all files of {folder}")
    try:
        records = builder.as_data_source(split)
        records[len(records) - 1]
    except NotImplementedError as error:
        raise UserError(
            f"{folder} was prepared as {info.file_format.value}, which has no random access; prepare it once more with "
            f"tfds.builder({info.name!r}, ...).download_and_prepare(file_format='array_record'), see docs/data.md"
        ) from error
    except (RuntimeError, IndexError) as error:
        raise UserError(f"a file of {folder} is damaged ({error}); copy or prepare it anew") from error

    def decode(index: np.ndarray) -> np.ndarray:
        images = [fit(example["image"]) for example in records.__getitems__(index.tolist())]
        return np.array(images, np.uint8).reshape(-1, size, size, 3)

    shape = (len(records), size, size, 3)
    if math.prod(shape) > 2**30:
        return len(records), decode
    kept, is_kept = np.empty(shape, np.uint8), np.zeros(len(records), bool)

    def take(index: np.ndarray) -> np.ndarray:
        new = np.unique(index[~is_kept[index]])
        kept[new] = decode(new)
        is_kept[new] = True
        return kept[index]

    return len(records), take


def _download(dataset: str, name: str, root: Path, host: str) -> Path:
    """Has tensorflow-datasets prepare `name`. A short probe goes first: without a network it would try for minutes."""
    why = reach.why_unreachable(f"https://{host}/")
    reason = f"{host} cannot be reached to download it ({why})"
    if not why:
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder(name, data_dir=root, file_format="array_record")
            builder.download_and_prepare()
            return Path(builder.data_dir)
        except Exception as error:  # whatever stopped it, the user's way out is the same
            reason = f"downloading it failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    command = f"tfds.builder({name!r}, data_dir={str(root)!r}, file_format='array_record').download_and_prepare()"
    raise UserError(
        f"data.dataset={dataset!r}: {root / name}/<version>/dataset_info.json does not exist, and {reason}. "
        f"Where there is a network run `import tensorflow_datasets as tfds; {command}` and copy "
        f"{name.partition('/')[0]}/ into {root}, or set data.dir to the folder that holds it"
    )
