# SPDX-License-Identifier: Apache-2.0
"""The pictures of a run and one self-contained HTML page of them: `python -m report WORKDIR [WORKDIR2 ...]`.

Reads only what a run left in its workdir (`config.json`, `run.json`, `metrics.jsonl`, `samples/`, `eval/`); what is not
there is left out of the page.
"""

import base64
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from configs.check import differences, flatten
from configs.default_configs import get_default_configs
from report.canvas import STYLE, Picture, plus_minus, png
from report.run_curves import comparisons, pictures
from report.run_files import RunFiles, load
from report.sample_grids import as_rows, image_grid, point_samples

# Key of eval/report_<ckpt>.json: what it is, unit. A key that is not here is shown under its own name.
HEADLINES = {
    "bpd": ("Negative log-likelihood by the ODE", "bits/dim"),
    "bpd_variational": ("The same, variationally dequantised", "bits/dim"),
    "bpd_train": ("The same, of training images", "bits/dim"),
    "bpd_variational_train": ("The same, of training images, variationally dequantised", "bits/dim"),
    "bound": ("Variational bound on it, by the SDE", ""),
    "bound_variational": ("The bound, variationally dequantised", ""),
    "bound_train": ("The bound, of training data", ""),
    "gaussian_bpd": ("For comparison: a Gaussian fitted to the training data", "bits/dim"),
    "nll": ("Negative log-likelihood by the ODE", "nats"),
    "exact_nll": ("Negative log-likelihood by the ODE, integrated over the true density", "nats"),
    "true_entropy": ("Entropy of the true density, the lowest possible", "nats"),
    "kl": ("KL(truth || model)", "nats"),
    "kl_grid_error": ("Estimate of its error by the grid", "nats"),
    "model_mass": ("Integral of the model's density over the grid, ideally 1", ""),
    "sde_exact_nll": ("Negative log-likelihood by the SDE, integrated over the true density", "nats"),
    "sde_kl": ("KL(truth || model) of the SDE", "nats"),
    "sde_kl_grid_error": ("Estimate of its error by the grid", "nats"),
    "sde_model_mass": ("Integral of the SDE's density over the grid, ideally 1", ""),
    "nfe": ("Function evaluations of the likelihood ODE", ""),
    "nfe_variational": ("The same, variationally dequantised", ""),
    "nfe_train": ("The same, of training data", ""),
    "ode_error": ("Estimate of the likelihood ODE's error, by example", ""),
    "ode_error_variational": ("The same, variationally dequantised", ""),
    "ode_error_train": ("The same, of training data", ""),
    "loss": ("Training loss over the test split", ""),
    "sampling": ("Samples", ""),
    "inception_score": ("Inception score of the samples", ""),
    "fid": ("FID of the samples", ""),
    "kid": ("KID of the samples", ""),
    "fisher": ("Integrated over time along the ODE", ""),
}
_FACTS = ("checkpoint", "step", "dataset", "parameters")  # of a result, beside its quantities
_DETAILS = ("settings",)  # of a quantity, for the JSON file alone
# What of run.json's launches is shown, and how it is called.
ENVIRONMENT = {
    "started": "Started",
    "step": "From step",
    "command": "Command",
    "commit": "Git commit of the code",
    "python": "Python",
    "jax": "jax",
    "jaxlib": "jaxlib",
    "flax": "flax",
    "numpy": "numpy",
    "precision": "Matrix products",
    "devices": "Devices",
    "platform": "Platform",
}
TITLES = {
    "losses": "Losses",
    "samples": "Samples",
    "samples_over_training": "Samples over training",
    "density": "Density",
    "bpd": "Likelihood of the examples",
    "bpd_by_checkpoint": "Likelihood by checkpoint",
    "fisher": "Score diagnostics (Fisher curves)",
}
CSS = """body{font:16px/1.5 system-ui,sans-serif;color:#222;max-width:1100px;margin:2em auto;padding:0 1em}
body.wide{max-width:1700px}table{border-collapse:collapse;margin:1em 0}
th,td{padding:.3em .9em;text-align:left;vertical-align:top;border-bottom:1px solid #ddd;overflow-wrap:anywhere}
thead th{border-bottom:2px solid #888}td{font-variant-numeric:tabular-nums}td:first-child{min-width:11em}
.marked{background:#fff3d6}h2{margin-top:2em}h3{margin:.5em 0;font-size:1em}
.side{display:grid;gap:0 2em;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr))}
figure{margin:1em 0 2em}img{max-width:100%}figcaption{color:#555;font-size:.92em;max-width:60em}
pre{background:#f5f5f5;padding:1em;overflow:auto}"""


def save_image_grid(path: str | Path, images: np.ndarray, columns: int | None = None) -> None:
    """Writes images [N, H, W, C], C 1 or 3, floats in [0, 1] (clipped) or uint8, as one PNG, row by row.

    Each is enlarged by the smallest whole factor that makes it at least 40 pixels high and wide, with 2 pixels of grey
    around it. `columns` defaults to ceil(sqrt(N)). ValueError on another shape.
    """
    _write(Path(path), image_grid(images, columns))


@mpl.rc_context(STYLE)
def points_picture(samples: np.ndarray, data: np.ndarray) -> bytes:
    """Points [N, D] beside true data [M, D], as a PNG: histograms of 1-D ones, else their first two coordinates."""
    return png(point_samples(as_rows(samples), data))


@mpl.rc_context(STYLE)
def write_report(workdir: str | Path, title: str | None = None, eval_folder: str = "eval") -> Path:
    """Writes `workdir/report/*.png` and `report.html`, which needs no other file, and returns the latter's path.

    UserError if there is nothing of a run in `workdir`, or a file of it is damaged.
    """
    run = load(Path(workdir), eval_folder)
    shown = list(pictures(run))
    for picture in shown:
        _write(run.workdir / "report" / f"{picture.name}.png", picture.png)
    body = [
        _section("Results", _headlines(run)),
        *(_section(_title(picture.name), _figure_html(picture)) for picture in shown),
        _section("Config, where it differs from the default", _config_table({"this run": run})),
        _section("Environment", _environment_table({"": run})),
        _details(run),
    ]
    title = title or " ".join([run.workdir.resolve().name, run.dataset and f"({run.dataset})"]).strip()
    return _write(run.workdir / "report" / "report.html", _page(title, body))


@mpl.rc_context(STYLE)
def write_summary(
    path: str | Path, title: str, workdirs: Mapping[str, str | Path], rows: Sequence[Mapping[str, Any]] = ()
) -> Path:
    """Writes one self-contained HTML page over several runs, label -> workdir, and returns its path.

    First the table `rows` (each a mapping from column to value), then the newest results, pictures that compare the
    runs on the same data, also written beside the page as `<its stem>_<name>.png`, and each run's own pictures, those
    of a kind side by side; last the differences of their configs and environments.
    """
    path = Path(path)
    runs = {label: load(Path(workdir)) for label, workdir in workdirs.items()}
    columns = list(dict.fromkeys(key for row in rows for key in row))
    newest = {label: run.results[-1] for label, run in runs.items() if run.results}
    heads = [f"{label}, step {_text(result.get('step', '?'))}" for label, result in newest.items()]
    body = [
        _table(columns, [[_text(row.get(column, "")) for column in columns] for row in rows]),
        _section("Results", _table(["", *heads], list(_headline_rows(list(newest.values()))))),
    ]
    compared = list(comparisons(runs))
    for picture in compared:
        _write(path.with_name(f"{path.stem}_{picture.name}.png"), picture.png)
    body.append(_section("Compared", *map(_figure_html, compared)))
    body += _side_by_side({label: list(pictures(run)) for label, run in runs.items()})
    body.append(
        _section("Configs, where one differs from the default (marked: where they differ)", _config_table(runs))
    )
    body.append(_section("Environments", _environment_table(runs)))
    return _write(path, _page(title, body, wide=True))


def _side_by_side(shown: Mapping[str, Sequence[Picture]]) -> Iterator[str]:
    """A section for each kind of picture, with those of all runs in it."""
    for name in dict.fromkeys(picture.name for of_run in shown.values() for picture in of_run):
        cells = [
            f"<div><h3>{html.escape(label)}</h3>{_figure_html(picture)}</div>"
            for label, of_run in shown.items()
            for picture in of_run
            if picture.name == name
        ]
        yield _section(_title(name), f'<div class="side">{"".join(cells)}</div>')


def _write(path: Path, content: bytes) -> Path:
    """Writes beside and renames, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    return temporary.replace(path)


# ---- HTML


def _text(value: Any, unit: str = "") -> str:
    """A number, a mean with its standard error, or any other dictionary, as text."""
    if isinstance(value, dict) and "stderr" in value and "mean" in value:
        unit, n = value.get("unit", unit), value.get("num_examples")
        incomplete = f", incomplete: {failed:,} failed" if (failed := value.get("num_failed")) else ""
        count = f" ({n:,} examples{incomplete})" if n or incomplete else ""
        return f"{plus_minus(value['mean'], value['stderr'])} {unit}{count}"
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_text(v)}" for key, v in value.items() if key not in _DETAILS)
    if isinstance(value, float):
        return f"{value:.5g} {unit}".strip()
    return f"{value:,}" if isinstance(value, int) else str(value)


def _headline_rows(results: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """For each quantity that some result has: its name and its value in each of them."""
    for key in dict.fromkeys([*HEADLINES, *(key for result in results for key in result)]):
        if key not in _FACTS and any(key in result for result in results):
            label, unit = HEADLINES.get(key, (key.replace("_", " "), ""))
            values = [result.get(key, "") for result in results]
            if all(isinstance(value, dict) and "stderr" not in value and len(value) > 3 for value in values):
                for part in dict.fromkeys(part for value in values for part in value if part not in _DETAILS):
                    name = f"{label}: {part.replace('_', ' ')}"
                    yield [name, *(_text(value.get(part, "")) for value in values)]
            else:
                yield [label, *(_text(value, unit) for value in values)]


def results_table(results: Sequence[Mapping[str, Any]]) -> str:
    """The same rows as plain text, one column for each result, for a console."""
    head = ["", *(f"checkpoint {r['checkpoint']}, step {r['step']:,}" for r in results)]
    rows = [head, *_headline_rows(results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _headlines(run: RunFiles) -> str:
    """One column for each of the last four evaluated checkpoints."""
    results = run.results[-4:]
    columns = [f"Checkpoint {r.get('checkpoint', '?')}, step {_text(r.get('step', '?'))}" for r in results]
    return _table(["", *columns], list(_headline_rows(results)))


def _config_table(runs: Mapping[str, RunFiles]) -> str:
    """The keys of which some run's value is not the default; those of an older project that are gone now are left out.

    A row in which the runs differ is marked. A run without a config has an empty column.
    """
    default = get_default_configs()
    found = {label: differences(run.config, default) for label, run in runs.items()}
    base, known = flatten(default), {label: flatten(run.config) for label, run in runs.items()}
    keys = sorted({key for of_run in found.values() for key in of_run})
    rows = [[key, *(_value(values.get(key, "")) for values in known.values()), _value(base[key])] for key in keys]
    return _table(["Key", *runs, "Default"], rows, marked=[len(set(row[1:-1])) > 1 for row in rows])


def _value(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, (list, tuple)) else str(value)


def _environment_table(runs: Mapping[str, RunFiles]) -> str:
    """Of each run its first launch and its newest; nothing if no run has told of itself."""
    columns = {
        f"{label} launch {i + 1}".strip() if len(run.launches) > 1 else label: run.launches[i] if run.launches else {}
        for label, run in runs.items()
        for i in sorted({0, max(0, len(run.launches) - 1)})
    }
    if not any(columns.values()):
        return ""
    rows = [
        [what, *(_text(of.get(key, "not recorded")) for of in columns.values())] for key, what in ENVIRONMENT.items()
    ]
    return _table(["", *columns], rows)


def _details(run: RunFiles) -> str:
    config = html.escape(json.dumps(run.config, indent=2))
    return f"<details><summary>Whole config (config.json)</summary><pre>{config}</pre></details>" if run.config else ""


def _title(picture_name: str) -> str:
    """Of the pictures of a kind; where there is one for each unit, of the kind."""
    kind = next((name for name in sorted(TITLES, key=len, reverse=True) if picture_name.startswith(name)), "")
    return TITLES.get(kind, picture_name)


def _section(title: str, *parts: str) -> str:
    """A heading and what is below it; nothing if that is nothing."""
    body = "\n".join(filter(None, parts))
    return f"<section><h2>{html.escape(title)}</h2>\n{body}</section>" if body else ""


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[bool] = ()) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    opening = ['<tr class="marked">' if mark else "<tr>" for mark in marked or [False] * len(rows)]
    body = "".join(f"{tag}{line}</tr>" for tag, line in zip(opening, lines, strict=True))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _figure_html(picture: Picture) -> str:
    source = f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"
    caption = html.escape(picture.caption)
    return f'<figure><img alt="{picture.name}" src="{source}"><figcaption>{caption}</figcaption></figure>'


def _page(title: str, body: Sequence[str], wide: bool = False) -> bytes:
    title = html.escape(title)
    head = f'<head><meta charset="utf-8"><title>{title}</title><style>{CSS}</style></head>'
    opening = '<body class="wide">' if wide else "<body>"
    body = ["<!doctype html>", '<html lang="en">', head, f"{opening}<h1>{title}</h1>", *body, "</body></html>"]
    return "\n".join(filter(None, body)).encode()
