# SPDX-License-Identifier: Apache-2.0
"""The files of a run: JSON and npz files that are never half written, the lock of the folder, the log of metrics."""

import contextlib
import fcntl
import json
import math
import os
import socket
import statistics
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from errors import UserError
from runtime.trackers import Tracker


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[BinaryIO]:
    """Yields a file that takes the place of `path` once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        yield file
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON."""
    with _replaced(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")


def read_json(path: Path) -> Any:
    """Reads JSON. Raises UserError if the file holds none."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it") from error


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """Writes compressed arrays."""
    with _replaced(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def write_npz_rows(path: Path, name: str, count: int, chunks: Iterable[np.ndarray]) -> None:
    """Writes one array [count, ...] as `write_npz` does; its rows come in chunks [n, ...], one in memory at a time."""
    with (
        _replaced(path) as whole,
        zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(f"{name}.npy", "w", force_zip64=True) as file,
    ):
        for i, chunk in enumerate(chunks):
            if i == 0:
                descr = np.lib.format.dtype_to_descr(chunk.dtype)
                header = {"descr": descr, "fortran_order": False, "shape": (count, *chunk.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(chunk).data)


@contextlib.contextmanager
def workdir_lock(workdir: Path):
    """Holds `workdir/.lock` against other processes; the operating system releases it however this process ends.

    Of several hosts the first holds it. Raises UserError if another run has it, or if the folder cannot be written.
    """
    if jax.process_index() != 0:
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"another run is at work in --workdir {workdir} ({holder}); wait for it, stop it, or use another folder"
            ) from error
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
        file.flush()
        yield


class MetricsLog:
    """Writes the metrics of a run to `metrics.jsonl` and the trackers; takes back what was logged after `step`."""

    def __init__(self, path: Path, step: int, trackers: Sequence[Tracker] = ()):
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = (line for line in lines if line.endswith("\n"))  # a killed run may have left half a line
        path.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
        self._file = path.open("a", buffering=1)
        self._trackers = trackers

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Logs numbers by name to the file and the trackers."""
        self.note(step, split, values)
        finite = {f"{split}/{name}": value for name, value in values.items() if math.isfinite(value)}
        for tracker in self._trackers:
            tracker.scalars(step, finite)

    def note(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Adds a line to the file alone. A number that is not finite, which JSON lacks, is null there."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps({"step": step, "split": split, **finite}) + "\n")

    def image(self, step: int, split: str, name: str, png: bytes) -> None:
        """Gives a PNG to the trackers."""
        for tracker in self._trackers:
            tracker.image(step, f"{split}/{name}", png)

    def histograms(self, step: int, split: str, values: Mapping[str, np.ndarray]) -> None:
        """Gives the finite values [N] of each name to the trackers, unless they are all zero."""
        for name, array in values.items():
            kept = array[np.isfinite(array)]
            if np.any(kept):
                for tracker in self._trackers:
                    tracker.histogram(step, f"{split}/{name}", kept)

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


class Pending:
    """The training metrics since the last log line. They are part of a checkpoint, so that a resume logs the same."""

    def __init__(self, values: dict[str, list[float]] | None = None):
        self.values = values or {}

    def add(self, metrics: dict[str, np.ndarray]) -> None:
        """Adds the metrics [n] of n steps."""
        for name, value in metrics.items():
            self.values.setdefault(name, []).extend(value.tolist())

    def means(self) -> dict[str, float]:
        """Means since the last call over the steps that were taken, and how many were `skipped`; NaN if all were."""
        skipped = self.values.pop("skipped", [])
        means = {}
        for name, values in self.values.items():
            taken = [value for value, skip in zip(values, skipped, strict=False) if not skip]
            means[name] = statistics.fmean(taken) if taken else math.nan
        self.values = {}
        return {**means, "skipped": math.fsum(skipped)}
