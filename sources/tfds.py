# SPDX-License-Identifier: Apache-2.0
"""Random access to what tensorflow-datasets prepared: array records and tfrecords, without TensorFlow's pipeline."""

import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from errors import UserError
from sources import reach


def info(dataset: str, name: str, data_dir: str, host: str) -> Any:
    """The `DatasetInfo` of the newest version of `name` in data_dir, $TFDS_DATA_DIR or ~/tensorflow_datasets.

    If there is none it is downloaded, where `host` can be reached. UserError, within seconds, says what to put where.
    """
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    versions = [path.parent for path in (root / name).glob("*.*.*/dataset_info.json")]
    newest = max(versions, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)], default=None)
    folder = newest or _download(dataset, name, root, host)
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(folder).info


def read_split(info: Any, split: str, size: int, fit: Callable) -> tuple[int, Callable[[np.ndarray], np.ndarray]]:
    """The number of images of a split, and the function index [B] -> uint8 [B, size, size, 3] that reads them.

    An image is decoded when first asked for and, up to 1 GiB, kept. fit: uint8 [H, W, 3] -> [size, size, 3].
    """
    if split not in info.splits:
        raise UserError(f"{info.data_dir} has no split {split!r}, which is needed; prepare {info.full_name} anew")
    count, records = info.splits[split].num_examples, _records([Path(path) for path in info.splits[split].filepaths])
    if len(records) != count:
        raise UserError(
            f"{info.data_dir}: {split} has {len(records)} examples, dataset_info.json says {count}; copy anew"
        )

    def decode(index: np.ndarray) -> np.ndarray:
        serialized = records.__getitems__(index.tolist()) if len(index) else []  # ArrayRecord refuses an empty list
        examples = map(info.features.deserialize_example_np, serialized)
        return np.array([fit(example["image"]) for example in examples], np.uint8).reshape(-1, size, size, 3)

    kept, is_kept = np.empty((count, size, size, 3), np.uint8), np.zeros(count, bool)

    def take(index: np.ndarray) -> np.ndarray:
        new = np.unique(index[~is_kept[index]])
        kept[new] = decode(new)
        is_kept[new] = True
        return kept[index]

    return count, take if kept.nbytes <= 2**30 else decode


def _records(paths: list[Path]) -> Any:
    """Serialised examples of the shards, in order: `len` and `__getitems__(list of int) -> list of bytes`."""
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is missing; prepare the data set anew, or copy all files of {path.parent}")
    if ".array_record-" in paths[0].name:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        try:
            return ArrayRecordDataSource([str(path) for path in paths])
        except RuntimeError as error:
            raise UserError(f"a file of {paths[0].parent} is damaged ({error}); copy or prepare it anew") from error
    if ".tfrecord-" in paths[0].name:
        return _TFRecords(paths)
    raise UserError(f"{paths[0]} is neither an array_record nor a tfrecord file; prepare the data set as one of them")


class _TFRecords:
    """Random access to tfrecord files, records of: length uint64, crc uint32, data, crc uint32. No crc is checked."""

    def __init__(self, paths: list[Path]):
        self._places: list[tuple[np.ndarray, int, int]] = []
        for path in paths:
            empty = path.stat().st_size == 0  # which memmap refuses
            data = np.zeros(0, np.uint8) if empty else np.memmap(path, np.uint8, "r")
            start = 0
            while start + 12 <= len(data):
                (length,) = struct.unpack("<Q", data[start : start + 8].tobytes())
                self._places.append((data, start + 12, start + 12 + length))
                start += length + 16
            if start != len(data):
                raise UserError(f"{path} ends in the middle of a record; fetch it again or prepare the data set anew")

    def __len__(self) -> int:
        return len(self._places)

    def __getitems__(self, index: list[int]) -> list[bytes]:
        return [data[start:end].tobytes() for data, start, end in (self._places[i] for i in index)]


def _download(dataset: str, name: str, root: Path, host: str) -> Path:
    """Has tensorflow-datasets prepare `name`, after a short probe: without network it would try for minutes."""
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
