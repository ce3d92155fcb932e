# SPDX-License-Identifier: Apache-2.0
"""Reads the files that a run leaves in its workdir."""

import json
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from errors import UserError


class RunFiles(NamedTuple):
    """The JSON files of a workdir. `results` has one entry for each evaluated checkpoint, the newest last."""

    workdir: Path
    eval: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    results: list[dict[str, Any]]
    launches: list[dict[str, Any]]  # of run.json: when, where and by what code the run was started

    @property
    def dataset(self) -> str:
        newest = self.results[-1] if self.results else {}
        return str(newest.get("dataset") or self.config.get("data", {}).get("dataset") or "")

    def series(self, split: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the steps and the values of one metric."""
        rows = [r for r in self.metrics if r["split"] == split and r.get(name) is not None]
        return np.array([r["step"] for r in rows]), np.array([r[name] for r in rows], np.float64)


def load(workdir: Path, eval_folder: str = "eval") -> RunFiles:
    """Reads a run's JSON files. UserError if `workdir` holds nothing of a run, or a JSON file in it is damaged."""
    folder, log = workdir / eval_folder, workdir / "metrics.jsonl"
    paths = workdir / "config.json", workdir / "run.json"
    try:
        config, facts = (json.loads(path.read_text()) if path.exists() else {} for path in paths)
        results = [json.loads(path.read_text()) for path in numbered(folder, "report_*.json")]
        lines = log.read_text().split("\n")[:-1] if log.exists() else []  # a stopped run may have left half a line
        metrics = [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"a JSON file of {workdir} is damaged: {error}") from error
    if not (config or metrics or results or numbered(folder, "*.npz") or numbered(workdir / "samples", "*")):
        raise UserError(f"nothing to report in {workdir}: no config.json, metrics.jsonl, samples/ or {eval_folder}/")
    return RunFiles(workdir, folder, config, metrics, results, facts.get("launches", []))


def numbered(folder: Path, pattern: str) -> list[Path]:
    """Returns the files `<name>_<number>.<suffix>` that match the pattern, in the order of their numbers."""
    return sorted((p for p in folder.glob(pattern) if re.search(r"_\d+\.\w+$", p.name)), key=number_of)


def number_of(path: Path) -> int:
    """Returns 3 for `<name>_3.<suffix>`."""
    return int(path.stem.rpartition("_")[2])


def newest_npz(folder: Path, pattern: str, *required: str) -> tuple[Path, dict[str, np.ndarray]] | None:
    """Returns the file with the highest number and its arrays, or None if none matches. Raises as `load_npz` does."""
    paths = numbered(folder, pattern)
    return (paths[-1], load_npz(paths[-1], *required)) if paths else None


def load_npz(path: Path, *required: str) -> dict[str, np.ndarray]:
    """Returns the arrays by name, in the file's order. UserError if it cannot be read or lacks a required array."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:  # np.load leaves a damaged file open
            return {name: arrays[name] for name in dict.fromkeys([*arrays.files, *required])}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path}: {error}") from error
