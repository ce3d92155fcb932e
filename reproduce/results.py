# SPDX-License-Identifier: Apache-2.0
"""Tabulates the runs of a study: numbers of each, means over seeds, differences to order 1, and pictures.

Differences are taken seed by seed, between models with the same initial weights, data order, test examples and probes.
Their standard errors, as those of means, are over seeds. Differences of images are paired over test examples as well.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

import datasets
import evaluation
from configs.check import flatten
from report import run_files
from reproduce.pictures import pictures
from reproduce.runner import Run

METRICS = {  # name of a number: its place in an evaluation's report
    "nll": "exact_nll",
    "kl": "kl",
    "kl_grid_error": "kl_grid_error",
    "sde_kl": "sde_kl",
    "kl_of_examples": "kl_of_examples.mean",
    "test_nll": "nll.mean",
    "bound": "bound.mean",
    "bpd": "bpd.mean",
    "nfe": "nfe.mean",
    "fisher_score_ode": "fisher.score_ode",
    "fisher_score_true": "fisher.score_true",
}
PAIRED = "bpd of order 1 minus, paired over test examples"
COMPARED = ("nll", "kl", "sde_kl", "kl_of_examples", "test_nll", "bpd", "pixel_frechet")


def collect(workdir: Path, name: str, runs: Sequence[Run], out: Path) -> Iterator[Path]:
    """Writes `out/<name>.json` and `out/<name>_*.png` of the evaluated runs, and yields their paths.

    Numbers in that file of runs that are not in the workdir stay there, so seeds may be run on several machines.
    """
    new = [row for run in runs for row in rows_of(workdir, run)]
    if not new:
        return
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    old = _read(path)
    rows = with_new(old.get("runs", []), new, runs)
    result = {"experiment": name, "summary": summary(rows), "order 1 minus": differences(rows), "runs": rows}
    if paired := with_new(old.get(PAIRED, []), paired_differences(workdir, runs), runs):
        result[PAIRED] = paired
    path.write_text(json.dumps(result, indent=1) + "\n")
    yield path
    yield from pictures(workdir, name, runs, result, out)


def with_new(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The rows `new`, and the rows `old` of other seeds of the same variants, in the order of `runs`."""
    places = {(run.variant, run.seed): place for place, run in enumerate(runs)}
    variants = {run.variant for run in runs}
    replaced = {(row["variant"], row["seed"]) for row in new}
    kept = [row for row in old if row["variant"] in variants and (row["variant"], row["seed"]) not in replaced]
    return sorted([*kept, *new], key=lambda row: places.get((row["variant"], row["seed"]), len(places)))


def missing(name: str, runs: Sequence[Run], out: Path) -> list[Run]:
    """The runs of which `<out>/<name>.json` has no numbers."""
    there = {(row["variant"], row["seed"]) for row in _read(out / f"{name}.json").get("runs", [])}
    return [run for run in runs if (run.variant, run.seed) not in there]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def rows_of(workdir: Path, run: Any) -> Iterator[dict[str, Any]]:
    """Yields a row for each evaluated checkpoint: variant, seed, step and the metrics."""
    folder = workdir / run.folder
    reports: dict[int, dict[str, Any]] = {}
    for path in (p for sub in ("eval_fisher", "eval") for p in run_files.numbered(folder / sub, "report_*.json")):
        reports.setdefault(run_files.number_of(path), {}).update(flatten(_read(path)))  # eval's come last and count
    for number, report in sorted(reports.items()):
        values = {name: float(report[key]) for name, key in METRICS.items() if report.get(key) is not None}
        if (distance := pixel_frechet(folder / "eval" / f"samples_{number}.npz", folder)) is not None:
            values["pixel_frechet"] = distance
        yield {"variant": run.variant, "seed": run.seed, "step": report["step"], "checkpoint": number, **values}


def pixel_frechet(samples: Path, folder: Path) -> float | None:
    """Returns the Frechet distance between the pixels, in [0, 1], of samples and of as many test images, or None.

    It compares means and covariances of images. It is comparable with itself alone, at the same number of samples.
    """
    if not samples.exists() or not (folder / "config.json").exists():
        return None
    dataset = datasets.load(ml_collections.ConfigDict(_read(folder / "config.json")).data)
    if not dataset.is_image or dataset.shape[0] > 8:  # 256 pixels and more need more samples than there are
        return None
    images = run_files.load_npz(samples, "samples")["samples"].astype(np.float64)
    images = images / 255 if images.max() > 2 else images
    real = dataset.test[np.arange(len(dataset.test))].astype(np.float64) / (dataset.levels - 1)
    count = min(len(images), len(real))
    return evaluation.frechet_distance(real[:count].reshape(count, -1), images[:count].reshape(count, -1))


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, standard error over seeds and number of seeds of each metric, by variant and step."""
    groups = _by_step(rows).items()
    return [{"variant": v, "step": step, **_means(here, (*METRICS, "pixel_frechet"))} for (v, step), here in groups]


def _by_step(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Returns (variant, step): rows."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["variant"], row["step"]), []).append(row)
    return groups


def _means(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Returns mean and standard error of each number that some rows have."""
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: mean_and_error(of_name) for name, of_name in values.items() if of_name}


def mean_and_error(values: Sequence[float]) -> dict[str, Any]:
    """The standard error is None for one value."""
    n = len(values)
    stderr = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None
    return {"mean": float(np.mean(values)), "stderr": stderr, "n": n}


def differences(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Order 1 minus the other orders of its family, seed by seed and at the same step. A gain is positive."""
    table = {(row["variant"], row["seed"], row["step"]): row for row in rows}
    result = []
    for (variant, step), here in _by_step(table.values()).items():
        both = [(row, first) for row in here if (first := _first_order(table, variant, row["seed"], step)) is not None]
        gains = [
            {name: first[name] - row[name] for name in COMPARED if name in row and name in first} for row, first in both
        ]
        if means := _means(gains, COMPARED):
            result.append({"variant": variant, "step": step, **means})
    return result


def _first_order(table: Mapping[tuple, Any], variant: str, *key: Any) -> Any:
    """The entry of order 1 in the family of a variant of order 2 or 3, or None.

    For order2_vp_w0.1 it is order1_vp_w0.1, else order1_vp, else order1.
    """
    if not variant.startswith(("order2", "order3")):
        return None
    family = variant[len("order2") :].split("_")
    names = ("order1" + "_".join(family[:n]) for n in range(len(family), 0, -1))
    return next((found for name in names if (found := table.get((name, *key))) is not None), None)


def paired_differences(workdir: Path, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """bpd of order 1 minus that of other orders of the same seed: mean and standard error over test examples."""
    arrays = {
        (run.variant, run.seed): newest[1]["bpd"].mean(axis=0)
        for run in runs
        if (newest := run_files.newest_npz(workdir / run.folder / "eval", "bpd_*.npz")) and "bpd" in newest[1]
    }
    return [
        {"variant": variant, "seed": seed, **mean_and_error(list(first - bpd))}
        for (variant, seed), bpd in arrays.items()
        if (first := _first_order(arrays, variant, seed)) is not None
    ]
