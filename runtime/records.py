# SPDX-License-Identifier: Apache-2.0
"""What a run writes down: JSON and npz files that are never half written, and the log of its metrics."""

import itertools
import json
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from errors import UserError
from runtime.trackers import Tracker


def write_json(path: Path, value: Any) -> None:
    """Writes beside and renames, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """UserError if it is not JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it") from error


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """As `write_json`, compressed arrays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    temporary.replace(path)


def write_npz_rows(path: Path, name: str, count: int, chunks: Iterable[np.ndarray]) -> None:
    """As `write_npz`, of one array [count, ...] whose rows come in chunks [n, ...]: one is in memory at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with (
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(f"{name}.npy", "w", force_zip64=True) as file,
    ):
        for i, chunk in enumerate(chunks):
            if i == 0:
                descr = np.lib.format.dtype_to_descr(chunk.dtype)
                header = {"descr": descr, "fortran_order": False, "shape": (count, *chunk.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(chunk).data)
    temporary.replace(path)


class MetricsLog:
    """What a run logs: `metrics.jsonl` and the trackers. Opened at a step, it forgets what was logged after that step.

    The one writer of the training loops, to be opened by one process of a run.
    """

    def __init__(self, workdir: Path, step: int, trackers: Sequence[Tracker] = ()):
        path = workdir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = (line for line in lines if line.endswith("\n"))  # a killed run may have left half a line
        path.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
        self._file = path.open("a", buffering=1)
        self._trackers = trackers

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Numbers by name, to all."""
        self.note(step, split, values)
        finite = {f"{split}/{name}": value for name, value in values.items() if math.isfinite(value)}
        for tracker in self._trackers:
            tracker.scalars(step, finite)

    def note(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """A line of `metrics.jsonl` alone; a number that is not finite, which JSON lacks, is null there."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps({"step": step, "split": split, **finite}) + "\n")

    def image(self, step: int, split: str, name: str, png: bytes) -> None:
        """A picture, as a PNG, to the trackers."""
        for tracker in self._trackers:
            tracker.image(step, f"{split}/{name}", png)

    def histograms(self, step: int, split: str, values: Mapping[str, np.ndarray]) -> None:
        """The finite ones of values [N], by name, to the trackers; nothing of those that are all zero."""
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
    """The training metrics since the last log line; part of a checkpoint, so that a resume logs the same."""

    def __init__(self, values: dict[str, list[float]] | None = None):
        self.values = values or {}

    def add(self, metrics: dict[str, np.ndarray]) -> None:
        """metrics: [n] each, of n steps."""
        for name, value in metrics.items():
            self.values.setdefault(name, []).extend(value.tolist())

    def means(self) -> dict[str, float]:
        """Means since the last call over the steps that were taken, and how many were `skipped`; NaN if all were."""
        skipped = self.values.pop("skipped", [])
        taken = [not skip for skip in skipped]
        means = {name: _mean(itertools.compress(values, taken)) for name, values in self.values.items()}
        self.values = {}
        return {**means, "skipped": math.fsum(skipped)}


def _mean(values: Iterable[float]) -> float:
    kept = list(values)
    return math.fsum(kept) / len(kept) if kept else math.nan
