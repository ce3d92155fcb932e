"""What a run writes down: JSON and npz files that are never half written, and the log of its metrics."""

import itertools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from errors import UserError


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


class MetricsLog:
    """`metrics.jsonl` and TensorBoard. Opened at a step, it forgets what an interrupted run logged after that step."""

    def __init__(self, workdir: Path, step: int):
        path = workdir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = (line for line in lines if line.endswith("\n"))  # a killed run may have left half a line
        path.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        self.note(step, split, values)
        for name, value in values.items():
            if math.isfinite(value):
                self._board.add_scalar(f"{split}/{name}", value, step)

    def note(self, step: int, split: str, values: dict[str, Any]) -> None:
        """A line of `metrics.jsonl` alone; a number that is not finite, which JSON lacks, is null there."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps({"step": step, "split": split, **finite}) + "\n")

    def close(self) -> None:
        self._file.close()
        self._board.close()


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
