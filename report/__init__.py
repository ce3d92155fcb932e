# SPDX-License-Identifier: Apache-2.0
"""Draws a run and writes one self-contained HTML page of it: `python -m report WORKDIR [WORKDIR2 ...]`.

A report reads only what a run left in its workdir (`config.json`, `run.json`, `metrics.jsonl`, `samples/`, `eval/`).
The page leaves out what is not there.
"""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from report import page
from report.canvas import STYLE, plus_minus, png
from report.page import results_table
from report.run_curves import comparisons, pictures
from report.run_files import RunFiles, load, newest_npz
from report.sample_grids import image_grid, point_samples

__all__ = ["points_picture", "results_table", "save_image_grid", "write_report", "write_summary"]


def save_image_grid(path: str | Path, images: np.ndarray, columns: int | None = None) -> None:
    """Writes images [N, H, W, C] as one PNG, row by row.

    C is 1 or 3. Values are uint8, or floats that are clipped to [0, 1]. Each image is enlarged by the smallest whole
    factor that makes it at least 40 pixels high and wide, with 2 pixels of grey around it. `columns` defaults to
    ceil(sqrt(N)). ValueError for another shape.
    """
    _write(Path(path), image_grid(images, columns))


@mpl.rc_context(STYLE)
def points_picture(samples: np.ndarray, data: np.ndarray) -> bytes:
    """Returns a PNG of points [N, D] and true data [M, D]: 1-D ones as histograms, others as two coordinates."""
    return png(point_samples(samples, data))


@mpl.rc_context(STYLE)
def write_report(workdir: str | Path, title: str | None = None, eval_folder: str = "eval") -> Path:
    """Writes `workdir/report/*.png` and `report.html`, which needs no other file, and returns the page's path.

    UserError if `workdir` holds nothing of a run, or a file in it is damaged.
    """
    run = load(Path(workdir), eval_folder)
    shown = list(pictures(run))
    for picture in shown:
        _write(run.workdir / "report" / f"{picture.name}.png", picture.png)
    config = html.escape(json.dumps(run.config, indent=2))
    body = [
        *(page.headline(result) for result in run.results[-1:]),
        *(page.section(picture.title, page.figure(picture)) for picture in shown),
        _results({f"Checkpoint {result.get('checkpoint', '?')}": result for result in run.results[-4:]}),
        _folded_table("Config, where it differs from the default", page.config_rows({"this run": run})),
        _folded_table("Environment", page.environment_rows({"": run})),
        f"<details><summary>Whole config (config.json)</summary><pre>{config}</pre></details>" if run.config else "",
    ]
    title = title or " ".join([run.workdir.resolve().name, run.dataset and f"({run.dataset})"]).strip()
    return _write(run.workdir / "report" / "report.html", page.document(title, body))


@mpl.rc_context(STYLE)
def write_summary(
    path: str | Path, title: str, workdirs: Mapping[str, str | Path], rows: Sequence[Mapping[str, Any]] = ()
) -> Path:
    """Writes one self-contained HTML page that compares several runs, label -> workdir, and returns its path.

    It starts with a table of the `rows`, column -> value, or else of the runs' likelihoods. Pictures that compare runs
    on the same data are also written beside the page as `<its stem>_<name>.png`.
    """
    path = Path(path)
    runs = {label: load(Path(workdir)) for label, workdir in workdirs.items()}
    rows = rows or likelihoods(runs)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    compared = list(comparisons(runs))
    for picture in compared:
        _write(path.with_name(f"{path.stem}_{picture.name}.png"), picture.png)
    shown = [(label, picture) for label, run in runs.items() for picture in pictures(run)]
    titles = dict.fromkeys(picture.title for _, picture in shown)
    config_title = "Configs, where one differs from the default (marked: where they differ)"
    body = [
        page.table([columns, *([page.as_text(row.get(column, "")) for column in columns] for row in rows)]),
        page.section("Compared", *map(page.figure, compared)),
        *(page.section(kind, page.side_by_side([p for p in shown if p[1].title == kind])) for kind in titles),
        _results({label: run.results[-1] for label, run in runs.items() if run.results}),
        _folded_table(config_title, page.config_rows(runs), mark=True),
        _folded_table("Environments", page.environment_rows(runs)),
    ]
    return _write(path, page.document(title, body, wide=True))


def likelihoods(runs: Mapping[str, RunFiles]) -> list[dict[str, str]]:
    """Returns a row for each run that has one. Differences are paired over examples, where runs have the same."""
    rows, first = [], None
    for label, run in runs.items():
        if not run.results or not (text := page.likelihood(run.results[-1])):
            continue
        row = {"": label, "negative log-likelihood": text}
        _, arrays = newest_npz(run.eval, "bpd_[0-9]*.npz") or (None, {})
        found = [sign * arrays[name] for name, sign in (("bpd", 1), ("logp", -1)) if name in arrays]
        if found:
            values = found[0].mean(axis=0)  # over repeats: [examples]
            if first is None:
                first = label, run.dataset, values
            elif first[1] == run.dataset and first[2].shape == values.shape:
                gain = values - first[2]
                row[f"difference to {first[0]}, by example"] = plus_minus(
                    gain.mean(), gain.std(ddof=1) / np.sqrt(len(gain))
                )
        rows.append(row)
    return rows


def _results(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the section with the results, one column for each."""
    head = ["", *(f"{label}, step {page.as_text(result.get('step', '?'))}" for label, result in columns.items())]
    return _folded_table("Results", [head, *page.result_rows(list(columns.values()))])


def _folded_table(title: str, rows: Sequence[Sequence[str]], mark: bool = False) -> str:
    return page.section(title, page.folded(page.table(rows, mark)))


def _write(path: Path, content: bytes) -> Path:
    """Writes to a temporary file and renames it, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    return temporary.replace(path)
