"""The pictures of a run and one self-contained HTML page of them: `python -m report WORKDIR [WORKDIR2 ...]`.

Reads only what a run left in its workdir (`config.json`, `metrics.jsonl`, `samples/`, `eval/`); what is not there is
left out of the page.
"""

import base64
import html
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from errors import UserError
from plots import STYLE, Picture, Run, comparisons, image_grid, load, pictures, plus_minus

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
    "model_mass": ("Integral of the model's density over the grid, ideally 1", ""),
    "nfe": ("Function evaluations of the likelihood ODE", ""),
    "nfe_variational": ("The same, variationally dequantised", ""),
    "nfe_train": ("The same, of training data", ""),
    "loss": ("Training loss over the test split", ""),
    "sampling": ("Samples", ""),
    "inception_score": ("Inception score of the samples", ""),
    "fid": ("FID of the samples", ""),
    "kid": ("KID of the samples", ""),
    "fisher": ("Integrated over time along the ODE", ""),
}
_FACTS = ("checkpoint", "step", "dataset", "parameters")  # of a result, beside its quantities
_DETAILS = ("settings",)  # of a quantity, for the JSON file alone
CSS = """body{font:16px/1.5 system-ui,sans-serif;color:#222;max-width:1100px;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;margin:1em 0}th,td{padding:.3em .9em;text-align:left;border-bottom:1px solid #ddd}
thead th{border-bottom:2px solid #888}td{font-variant-numeric:tabular-nums}h2{margin-top:2em}
figure{margin:1.5em 0 2.5em}img{max-width:100%}figcaption{color:#555;font-size:.92em;max-width:60em}
pre{background:#f5f5f5;padding:1em;overflow:auto}"""


def save_image_grid(path: str | Path, images: np.ndarray, columns: int | None = None) -> None:
    """Writes images [N, H, W, C], C 1 or 3, floats in [0, 1] (clipped) or uint8, as one PNG, row by row.

    Each is enlarged by the smallest whole factor that makes it at least 40 pixels high and wide, with 2 pixels of grey
    around it. `columns` defaults to ceil(sqrt(N)). ValueError on another shape.
    """
    _write(Path(path), image_grid(images, columns))


@mpl.rc_context(STYLE)
def write_report(workdir: str | Path, title: str | None = None, eval_folder: str = "eval") -> Path:
    """Writes `workdir/report/*.png` and `report.html`, which needs no other file, and returns the latter's path.

    UserError if there is nothing of a run in `workdir`, or a file of it is damaged.
    """
    run = load(Path(workdir), eval_folder)
    shown = list(pictures(run))
    for picture in shown:
        _write(run.workdir / "report" / f"{picture.name}.png", picture.png)
    config = html.escape(json.dumps(run.config, indent=2))
    details = f"<details><summary>Configuration (config.json)</summary><pre>{config}</pre></details>"
    body = [_headlines(run), *map(_figure_html, shown), details if run.config else ""]
    title = title or " ".join([run.workdir.resolve().name, run.dataset and f"({run.dataset})"]).strip()
    return _write(run.workdir / "report" / "report.html", _page(title, body))


@mpl.rc_context(STYLE)
def write_summary(
    path: str | Path, title: str, workdirs: Mapping[str, str | Path], rows: Sequence[Mapping[str, Any]]
) -> Path:
    """Writes one self-contained HTML page over several runs, label -> workdir, and returns its path.

    First the table `rows` (each a mapping from column to value), then pictures that compare the runs on the same data,
    also written beside the page as `<its stem>_<name>.png`, then each run's own.
    """
    path = Path(path)
    runs = {label: load(Path(workdir)) for label, workdir in workdirs.items()}
    columns = list(dict.fromkeys(key for row in rows for key in row))
    body = [_table(columns, [[_text(row.get(column, "")) for column in columns] for row in rows])]
    for picture in comparisons(runs):
        _write(path.with_name(f"{path.stem}_{picture.name}.png"), picture.png)
        body.append(_figure_html(picture))
    for label, run in runs.items():
        body += [f"<h2>{html.escape(label)}</h2>", _headlines(run), *map(_figure_html, pictures(run))]
    return _write(path, _page(title, body))


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
        return f"{plus_minus(value['mean'], value['stderr'])} {unit}" + (f" ({n:,} examples)" if n else "")
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
                for part in dict.fromkeys(part for value in values for part in value):
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


def _headlines(run: Run) -> str:
    """One column for each of the last four evaluated checkpoints."""
    results = run.results[-4:]
    columns = [f"Checkpoint {r.get('checkpoint', '?')}, step {_text(r.get('step', '?'))}" for r in results]
    return _table(["", *columns], list(_headline_rows(results)))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _figure_html(picture: Picture) -> str:
    source = f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"
    caption = html.escape(picture.caption)
    return f'<figure><img alt="{picture.name}" src="{source}"><figcaption>{caption}</figcaption></figure>'


def _page(title: str, body: Sequence[str]) -> bytes:
    title = html.escape(title)
    head = f'<head><meta charset="utf-8"><title>{title}</title><style>{CSS}</style></head>'
    body = ["<!doctype html>", '<html lang="en">', head, f"<body><h1>{title}</h1>", *body, "</body></html>"]
    return "\n".join(filter(None, body)).encode()


def main(workdirs: Sequence[str]) -> None:
    """Reports on each workdir and compares several in the first one's `report/comparison.html`; prints the paths."""
    if not workdirs:
        raise UserError("usage: python -m report WORKDIR [WORKDIR2 ...]")
    for workdir in workdirs:
        print(write_report(workdir))
    if len(workdirs) > 1:
        names = [Path(workdir).resolve().name for workdir in workdirs]
        labels = names if len(set(names)) == len(names) else list(workdirs)
        newest = [(load(Path(workdir)).results or [{}])[-1] for workdir in workdirs]
        rows = [{"": label, **dict(zip(labels, cells, strict=True))} for label, *cells in _headline_rows(newest)]
        path = Path(workdirs[0]) / "report" / "comparison.html"
        print(write_summary(path, f"Comparison of {len(labels)} runs", dict(zip(labels, workdirs, strict=True)), rows))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as user_error:
        sys.exit(f"error: {user_error}")
