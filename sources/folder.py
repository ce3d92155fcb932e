# SPDX-License-Identifier: Apache-2.0
"""A folder of image files as an array of squares, decoded once and kept in a cache."""

import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from errors import UserError
from sources import images

CHUNK = 256  # files that are decoded before their rows are written


# The number of images of a split, and the function index [B] -> uint8 [B, S, S, C] that reads them.
Split = tuple[int, Callable[[np.ndarray], np.ndarray]]


def read(folder: Path, size: int, channels: int) -> tuple[Split, Split]:
    """Training and test images of the files below a folder, as `images.square` makes them.

    If there are folders `train` and `test`, they are the splits. Otherwise an image belongs to the test split if the
    hash of its file's content is 0 modulo 10, so that a file stays where it is when others are added. Examples are in
    the order of those hashes, the same on every machine.

    The images are kept in `$XDG_CACHE_HOME/mle_score_ode` (~/.cache), whose manifest has a line for each file. A call
    that is killed goes on there, and files that are new or changed are added. Broken files are skipped with a warning.
    UserError if no image is left, or a split has none.
    """
    if not folder.is_dir():
        raise UserError(f"data.dir={str(folder)!r} is not a folder; set it to one with images")
    files = {str(path.relative_to(folder)): path for path in images.files_of(folder)}
    cache = _cache(folder, size, channels)
    with _only_process(cache):
        entries = _index(files, cache, size, channels)
    broken = {name: None for name in files if entries[name]["row"] is None}
    if broken:
        shown = ", ".join(list(broken)[:5]) + (", ..." if len(broken) > 5 else "")
        logging.warning(
            "%d of %d files of %s cannot be read and are skipped: %s", len(broken), len(files), folder, shown
        )
    whole = sorted((entries[name]["digest"], name) for name in files if name not in broken)
    if not whole:
        raise UserError(f"none of the {len(files)} image files of data.dir={str(folder)!r} can be read")
    by_folder = all((folder / split).is_dir() for split in ("train", "test"))

    def split_of(digest: str, name: str) -> str:
        by_hash = "test" if int(digest[:12], 16) % 10 == 0 else "train"
        return name.partition(os.sep)[0] if by_folder else by_hash

    count = 1 + max(entries[name]["row"] for _, name in whole)
    array = np.memmap(cache / "images", np.uint8, "r", shape=(count, size, size, channels))
    splits = []
    for split in ("train", "test"):
        rows = [entries[name]["row"] for digest, name in whole if split_of(digest, name) == split]
        if not rows:
            raise UserError(
                f"data.dir={str(folder)!r} has no image for the {split} split; add more, or a folder {split}"
            )
        splits.append((len(rows), functools.partial(_take, array, np.array(rows))))
    return splits[0], splits[1]


def _take(array: np.ndarray, rows: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.asarray(array[rows[index]])


def _cache(folder: Path, size: int, channels: int) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mle_score_ode" / "images"
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return root / name / f"{size}x{size}x{channels}"


@contextlib.contextmanager
def _only_process(cache: Path) -> Iterator[None]:
    """Lets one process at a time work in the cache."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise UserError(f"the cache {cache} cannot be written: {error.strerror}; set XDG_CACHE_HOME") from error


def _index(files: dict[str, Path], cache: Path, size: int, channels: int) -> dict[str, dict[str, Any]]:
    """Decodes the files that the cache lacks, and returns the manifest's entry of each file."""
    entries, num_rows, num_bytes = _manifest(cache)
    row_bytes = size * size * channels

    def is_known(name: str) -> bool:
        stat = files[name].stat()
        known = entries.get(name)
        return known is not None and (known["bytes"], known["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns)

    todo = [name for name in files if not is_known(name)]
    with (
        (cache / "images").open("ab") as rows,
        (cache / "manifest.jsonl").open("ab") as manifest,
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(todo), desc="reading images", unit="file", disable=None) as progress,
    ):
        rows.truncate(num_rows * row_bytes)  # a killed call may have left rows without their lines, or half a line
        manifest.truncate(num_bytes)
        for start in range(0, len(todo), CHUNK):
            names = todo[start : start + CHUNK]
            lines = []
            decoded = pool.map(lambda name: _decoded(files[name], size, channels), names)
            for name, (pixels, entry) in zip(names, decoded, strict=True):
                entries[name] = {"name": name, **entry, "row": None if pixels is None else num_rows}
                if pixels is not None:
                    rows.write(pixels.tobytes())
                    num_rows += 1
                lines.append(json.dumps(entries[name]) + "\n")
            rows.flush()
            manifest.write("".join(lines).encode())
            manifest.flush()
            progress.update(len(names))
    return entries


def _manifest(cache: Path) -> tuple[dict[str, dict[str, Any]], int, int]:
    """The newest entry of each file, the number of rows, and the bytes of the whole lines."""
    path = cache / "manifest.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    lines = lines[: len(lines) - (1 if lines and not lines[-1].endswith(b"\n") else 0)]
    entries = [json.loads(line) for line in lines]
    num_rows = sum(entry["row"] is not None for entry in entries)
    return {entry["name"]: entry for entry in entries}, num_rows, sum(map(len, lines))


def _decoded(path: Path, size: int, channels: int) -> tuple[np.ndarray | None, dict[str, Any]]:
    """The pixels, None of a broken file, and what the manifest says of the file."""
    stat = path.stat()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    entry = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "digest": digest}
    try:
        return images.square(path, size, channels), entry
    except images.BROKEN as error:
        return None, {**entry, "error": f"{type(error).__name__}: {error}"}
