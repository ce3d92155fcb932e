# SPDX-License-Identifier: Apache-2.0
"""The files of a run's workdir, as the report reads them."""

import json
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from errors import UserError


class RunFiles(NamedTuple):
    """What a workdir holds, the arrays apart; `results` has the evaluated checkpoints, the newest last."""

    workdir: Path
    eval: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    results: list[dict[str, Any]]
    launches: list[dict[str, Any]] = []  # noqa: RUF012 (never changed) of run.json: where and by what code it was run

    @property
    def dataset(self) -> str:
        newest = self.results[-1] if self.results else {}
        return str(newest.get("dataset") or self.config.get("data", {}).get("dataset") or "")

    def series(self, split: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one metric."""
        rows = [r for r in self.metrics if r["split"] == split and r.get(name) is not None]
        return np.array([r["step"] for r in rows]), np.array([r[name] for r in rows], np.float64)

    def name(self, path: Path) -> str:
        return str(path.relative_to(self.workdir))


def load(workdir: Path, eval_folder: str = "eval") -> RunFiles:
    """UserError if nothing of a run is in `workdir`, or a file of it is damaged."""
    folder = workdir / eval_folder
    try:
        config, facts = (_json_or_nothing(workdir / name) for name in ("config.json", "run.json"))
        results = [json.loads(path.read_text()) for path in numbered(folder, "report_*.json")]
        log = workdir / "metrics.jsonl"
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        # A stopped run may have left half a line.
        metrics = [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise UserError(f"a JSON file of {workdir} is damaged: {error}") from error
    if not (config or metrics or results or numbered(folder, "*.npz") or numbered(workdir / "samples", "*")):
        raise UserError(f"nothing to report in {workdir}: no config.json, metrics.jsonl, samples/ or {eval_folder}/")
    return RunFiles(workdir, folder, config, metrics, results, facts.get("launches", []))


def _json_or_nothing(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def numbered(folder: Path, pattern: str) -> list[Path]:
    """The files `<name>_<number>.<suffix>` that match, by their number."""
    return sorted((p for p in folder.glob(pattern) if re.search(r"_\d+\.\w+$", p.name)), key=number_of)


def number_of(path: Path) -> int:
    """3, of `<name>_3.<suffix>`."""
    return int(path.stem.rpartition("_")[2])


def newest_npz(folder: Path, pattern: str, *required: str) -> tuple[Path, dict[str, np.ndarray]] | None:
    """The file of the highest number and its arrays; None if there is none. UserError as of `load_npz`."""
    paths = numbered(folder, pattern)
    return (paths[-1], load_npz(paths[-1], *required)) if paths else None


def load_npz(path: Path, *required: str) -> dict[str, np.ndarray]:
    """The arrays by name. UserError if it cannot be read or one that is required is missing."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:  # np.load leaves a damaged file open
            return {name: arrays[name] for name in {*arrays.files, *required}}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path}: {error}") from error
