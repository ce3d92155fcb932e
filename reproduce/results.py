# SPDX-License-Identifier: Apache-2.0
"""Tabulates the runs of a study: numbers of each, means over seeds, differences to order 1, and pictures.

Means over seeds have standard errors over seeds. Differences are taken seed by seed, between models with the same
initial weights, data order, test examples and probes, and have standard errors over the seeds' differences. Differences
of images are paired over test examples as well.

Numbers in `<out>/<name>.json` of runs that are not in the workdir stay there, so seeds may be run on several machines.
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
from report import run_files
from reproduce.pictures import pictures
from reproduce.runner import Run

# name of a number -> its path in an evaluation's report
METRICS = {
    "nll": ("exact_nll",),
    "kl": ("kl",),
    "kl_grid_error": ("kl_grid_error",),
    "sde_kl": ("sde_kl",),
    "test_nll": ("nll", "mean"),
    "bpd": ("bpd", "mean"),
    "nfe": ("nfe", "mean"),
    "fisher_score_ode": ("fisher", "score_ode"),
    "fisher_score_true": ("fisher", "score_true"),
}
PAIRED = "bpd of order 1 minus, paired over test examples"
COMPARED = ("nll", "kl", "sde_kl", "test_nll", "bpd", "pixel_frechet")


def collect(workdir: Path, name: str, runs: Sequence[Run], out: Path) -> Iterator[Path]:
    """Writes `out/<name>.json` and `out/<name>_*.png` of the evaluated runs, and yields their paths."""
    new = [row for run in runs for row in rows_of(workdir, run)]
    if not new:
        return
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    old = json.loads(path.read_text()) if path.exists() else {}
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
    path = out / f"{name}.json"
    rows = json.loads(path.read_text())["runs"] if path.exists() else []
    there = {(row["variant"], row["seed"]) for row in rows}
    return [run for run in runs if (run.variant, run.seed) not in there]


def rows_of(workdir: Path, run: Any) -> Iterator[dict[str, Any]]:
    """Yields a row for each evaluated checkpoint: variant, seed, step and the metrics."""
    folder = workdir / run.folder
    for number, reports in _reports(folder).items():
        values = {name: value for name, path in METRICS.items() if (value := _first(reports, path)) is not None}
        if (distance := pixel_frechet(folder / "eval" / f"samples_{number}.npz", folder)) is not None:
            values["pixel_frechet"] = distance
        yield {"variant": run.variant, "seed": run.seed, "step": reports[0]["step"], "checkpoint": number, **values}


def _reports(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """The reports of every evaluation folder, by checkpoint number."""
    paths = [path for sub in ("eval", "eval_fisher") for path in run_files.numbered(folder / sub, "report_*.json")]
    numbers = sorted({run_files.number_of(path) for path in paths})
    return {n: [json.loads(path.read_text()) for path in paths if run_files.number_of(path) == n] for n in numbers}


def _first(reports: Iterable[dict[str, Any]], path: tuple[str, ...]) -> float | None:
    for report in reports:
        value: Any = report
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            return float(value)
    return None


def pixel_frechet(samples: Path, folder: Path) -> float | None:
    """Frechet distance of the pixels, in [0, 1], between samples and as many test images; None without samples.

    Its features are the pixels themselves, so it compares means and covariances of images. It is comparable with itself
    alone, at the same number of samples.
    """
    if not samples.exists() or not (folder / "config.json").exists():
        return None
    config = ml_collections.ConfigDict(json.loads((folder / "config.json").read_text()))
    dataset = datasets.load(config.data)
    if not dataset.is_image or dataset.shape[0] > 8:  # 256 pixels and more need more samples than there are
        return None
    images = run_files.load_npz(samples, "samples")["samples"].astype(np.float64)
    images = images / 255 if images.max() > 2 else images
    real = dataset.test[np.arange(len(dataset.test))].astype(np.float64) / (dataset.levels - 1)
    count = min(len(images), len(real))
    return evaluation.frechet_distance(real[:count].reshape(count, -1), images[:count].reshape(count, -1))


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, standard error over seeds and number of seeds of each metric, by variant and step."""
    result = []
    for variant, step in dict.fromkeys((row["variant"], row["step"]) for row in rows):
        here = [row for row in rows if (row["variant"], row["step"]) == (variant, step)]
        entry: dict[str, Any] = {"variant": variant, "step": step}
        for name in (*METRICS, "pixel_frechet"):
            if values := [row[name] for row in here if name in row]:
                entry[name] = mean_and_error(values)
        result.append(entry)
    return result


def mean_and_error(values: Sequence[float]) -> dict[str, Any]:
    """The standard error is None for one value."""
    n = len(values)
    stderr = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None
    return {"mean": float(np.mean(values)), "stderr": stderr, "n": n}


def differences(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Order 1 minus the other orders of its family, seed by seed and at the same step. A gain is positive."""
    table = {(row["variant"], row["seed"], row["step"]): row for row in rows}
    result = []
    for variant, step in dict.fromkeys((row["variant"], row["step"]) for row in rows):
        if not variant.startswith(("order2", "order3")):
            continue
        entry: dict[str, Any] = {"variant": variant, "step": step}
        for name in COMPARED:
            gains = [
                first[name] - row[name]
                for (other, seed, at), row in table.items()
                if (other, at) == (variant, step)
                and (first := _first_order(table, variant, seed, step)) is not None
                and name in row
                and name in first
            ]
            if gains:
                entry[name] = mean_and_error(gains)
        if len(entry) > 2:
            result.append(entry)
    return result


def _first_order(table: Mapping[tuple, Any], variant: str, *key: Any) -> Any:
    """The entry of order 1 in the variant's family: for order2_vp_w0.1 order1_vp_w0.1, else order1_vp, else order1."""
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
        if variant.startswith(("order2", "order3")) and (first := _first_order(arrays, variant, seed)) is not None
    ]
