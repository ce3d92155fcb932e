# SPDX-License-Identifier: Apache-2.0
"""Units of work of an evaluation. Each is computed once, by one of the hosts, and written whole or not at all."""

import datetime
import hashlib
import json
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from errors import UserError
from runtime.records import write_npz

# The modules and folders of the project whose code makes a unit's numbers.
_CODE = (
    *("datasets", "dequantization", "diagnostics", "evaluation", "likelihood", "losses", "ode", "sampling", "sde_lib"),
    *("task", "evaluators", "models", "sources"),
)


def code_digest() -> str:
    """A hash of the sources that a unit's numbers depend on, so that units of other code are not read back."""
    root, sha = Path(__file__).parent.parent, hashlib.sha256()
    files = [path for name in _CODE for path in (root / f"{name}.py", *(root / name).rglob("*.py")) if path.is_file()]
    for path in sorted(files):
        sha.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return sha.hexdigest()[:12]


class Units(Sequence[dict[str, np.ndarray]]):
    """The units 0, 1, ... of one kind of work, a file each in `root/<name>_<digest of settings>`.

    Other settings have another folder, so a result is never read back under settings that did not make it. After `run`
    the units are a sequence. Each is read from disk when it is asked for, so only one is in memory at a time.
    """

    def __init__(self, root: Path, name: str, settings: dict[str, Any]):
        text = json.dumps(settings, sort_keys=True, default=str)
        self._folder = root / f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        self._name, self._count = name, 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, k: Any) -> dict[str, np.ndarray]:
        if not 0 <= k < self._count:
            raise IndexError(k)
        if (row := self._read(k)) is None:
            raise UserError(f"unit {k} of this evaluation was damaged meanwhile; run it again, it goes on from there")
        return row

    def run(self, count: int, compute: Callable[[int], dict[str, np.ndarray]], label: str = "") -> "Units":
        """Computes and writes `compute(k)` for each k = 0 .. count - 1 that is not on disk yet, and returns itself.

        Process p of n computes the units p, p + n, ... UserError if a unit of another process cannot be seen, because
        the hosts must share the folder.
        """
        mine = range(jax.process_index(), count, jax.process_count())
        todo = [k for k in mine if self._read(k) is None]
        if todo and len(todo) < len(mine):
            there = len(mine) - len(todo)
            logging.info("%s: %d of this host's %d units were there already", label or self._name, there, len(mine))
        start = time.monotonic()
        for done, k in enumerate(todo, 1):
            write_npz(self._path(k), **compute(k))
            if label and (done == len(todo) or done % max(1, len(todo) // 10) == 0):
                seconds = (len(todo) - done) * (time.monotonic() - start) / done
                left = f"  ETA {datetime.timedelta(seconds=round(seconds))}" if done < len(todo) else ""
                logging.info("%s: %d of %d%s", label, done, len(todo), left)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(str(self._folder))
        for k in range(count):
            if not self._path(k).exists():
                raise UserError(f"{self._path(k)} is missing: --workdir must be a folder that all hosts share")
        self._count = count
        return self

    def _path(self, k: int) -> Path:
        return self._folder / f"{k:06d}.npz"

    def _read(self, k: int) -> dict[str, np.ndarray] | None:
        """Returns None if the file is missing or damaged, e.g. by a disk that filled up under the rename."""
        path = self._path(k)
        if not path.exists():
            return None
        try:
            with path.open("rb") as file, np.load(file) as arrays:  # np.load leaves a damaged file open
                return {key: arrays[key] for key in arrays.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            logging.warning("%s cannot be read (%s) and is computed again", path, error)
            return None
