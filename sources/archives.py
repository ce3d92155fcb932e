# SPDX-License-Identifier: Apache-2.0
"""The published archives of CIFAR-10 and ImageNet32, read as they are, in their own order."""

import functools
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from errors import UserError

Images = UInt8[np.ndarray, "N H W 3"]
Splits = tuple[UInt8[np.ndarray, "N H W 3"], UInt8[np.ndarray, "M H W 3"]]
_CIFAR_FOLDER = "cifar-10-batches-bin"
_CIFAR = {"train": [f"data_batch_{n}.bin" for n in range(1, 6)], "test": ["test_batch.bin"]}
_RECORD = 1 + 3 * 32 * 32  # the label, then the three channels one after another


def cifar10(folder: Path) -> Splits | None:
    """Training and test images of `cifar-10-binary.tar.gz`, or of the folder in it; None if neither is there."""
    archive, unpacked = folder / "cifar-10-binary.tar.gz", folder / _CIFAR_FOLDER
    try:
        if unpacked.is_dir():
            files = {name: (unpacked / name).read_bytes() for names in _CIFAR.values() for name in names}
        elif archive.is_file():
            with tarfile.open(archive) as tar:
                members = {
                    name: tar.extractfile(f"{_CIFAR_FOLDER}/{name}") for names in _CIFAR.values() for name in names
                }
                files = {name: member.read() for name, member in members.items() if member is not None}
        else:
            return None
        train, test = (np.concatenate([_cifar_batch(files[name]) for name in names]) for names in _CIFAR.values())
    except (OSError, EOFError, KeyError, ValueError, tarfile.TarError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"CIFAR-10 in {folder} is damaged ({type(error).__name__}: {reason}); fetch it again"
        ) from error
    return train, test


def _cifar_batch(content: bytes) -> Images:
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
    return _channels_last(records[:, 1:], 32)


def imagenet(folder: Path, size: int) -> Splits | None:
    """Images of the `.npz` files of downsampled ImageNet (Chrabaszcz et al. 2017), training and validation.

    They are read from `Imagenet<size>_train_npz.zip` (`_part1`, `_part2` of 64x64) and `Imagenet<size>_val_npz.zip`, or
    from `train_data_batch_<n>.npz` and `val_data.npz` themselves. None if there is none of either.
    """
    try:
        train = _npz_files(folder, f"Imagenet{size}_train*npz.zip", "train_data_batch_")
        test = _npz_files(folder, f"Imagenet{size}_val_npz.zip", "val_data")
        if not train or not test:
            return None
        return _joined(train, size), _joined(test, size)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"ImageNet in {folder} is damaged ({type(error).__name__}: {reason}); fetch it again"
        ) from error


def _npz_files(folder: Path, archives: str, prefix: str) -> list[Callable[[], Any]]:
    """Functions that open the files of the folder, or of its archives, in the order of the numbers in their names."""
    found: dict[str, Callable[[], Any]] = {
        path.name: functools.partial(path.open, "rb") for path in folder.glob(f"{prefix}*.npz")
    }
    if not found:
        for archive in sorted(folder.glob(archives)):
            content = zipfile.ZipFile(archive)
            names = [name for name in content.namelist() if prefix in name]
            found |= {Path(name).name: functools.partial(content.open, name) for name in names}
    return [found[name] for name in sorted(found, key=lambda name: (len(name), name))]


def _joined(files: list[Callable[[], Any]], size: int) -> Images:
    batches = []
    for open_file in files:
        with open_file() as file, np.load(file) as arrays:  # np.load leaves a damaged file open
            batches.append(_channels_last(np.asarray(arrays["data"], np.uint8), size))
    return np.concatenate(batches)


def _channels_last(flat: UInt8[np.ndarray, "N D"], size: int) -> Images:
    return np.moveaxis(flat.reshape(-1, 3, size, size), 1, -1).copy()
