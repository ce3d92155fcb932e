"""What a run writes down: JSON and npz files that are never half written, and the log of its metrics."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter


def write_json(path: Path, value: Any) -> None:
    """Writes beside and renames, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


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
        self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


class Pending:
    """The training metrics since the last log line; part of a checkpoint, so that a resume logs the same."""

    def __init__(self, values: dict[str, list[float]] | None = None):
        self.values = values or {}
        self._on_device: list[dict[str, jax.Array]] = []

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """metrics: [devices, n] each, equal on all devices. They are fetched later, not to hold up the device."""
        self._on_device.append(metrics)

    def flush(self) -> dict[str, list[float]]:
        for metrics in self._on_device:
            for name, value in metrics.items():
                self.values.setdefault(name, []).extend(np.asarray(value[0]).tolist())
        self._on_device = []
        return self.values

    def means(self) -> dict[str, float]:
        """Means over the steps since the last call."""
        means = {name: math.fsum(values) / len(values) for name, values in self.flush().items()}
        self.values = {}
        return means
