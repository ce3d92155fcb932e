# SPDX-License-Identifier: Apache-2.0
"""The parts of a self-contained HTML page, and the results, configs and environments of runs as rows of text."""

import base64
import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from configs.check import differences, flatten
from configs.default_configs import get_default_configs
from report.canvas import Picture, plus_minus
from report.run_files import RunFiles

CSS = """body{font:16px/1.5 system-ui,sans-serif;color:#222;max-width:1100px;margin:2em auto;padding:0 1em}
body.wide{max-width:1700px}table{border-collapse:collapse;margin:1em 0}
th,td{padding:.3em .9em;text-align:left;vertical-align:top;border-bottom:1px solid #ddd;overflow-wrap:break-word}
thead th{border-bottom:2px solid #888}td{font-variant-numeric:tabular-nums}td:first-child{min-width:11em}
.marked{background:#fff3d6}h2{margin-top:2em}h3{margin:.5em 0;font-size:1em}
.side{display:grid;gap:0 2em;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr))}
figure{margin:1em 0 2em}img{max-width:100%}figcaption{color:#555;font-size:.92em;max-width:60em}
pre{background:#f5f5f5;padding:1em;overflow:auto}.scroll{overflow-x:auto}
.headline{font-size:1.3em;margin:.5em 0}.headline small{display:block;font-size:.75em;color:#555}
summary{cursor:pointer;color:#555}
@media(max-width:600px){body{margin:1em auto;padding:0 .6em}th,td{padding:.3em .5em}td:first-child{min-width:7em}}
@media(prefers-color-scheme:dark){body{background:#15171a;color:#ddd}th,td{border-color:#3a3d42}
figcaption,summary,.headline small{color:#aaa}pre{background:#22252a}.marked{background:#3d3519}
img{background:#fff;border-radius:4px}}"""
# Key of eval/report_<ckpt>.json: label, unit. A key that is not here is shown under its own name.
HEADLINES = {
    "bpd": ("Negative log-likelihood by the ODE", "bits/dim"),
    "bound": ("Variational bound on it, by the SDE", "bits/dim"),
    "discrete_bound": ("Bound on the levels' negative log-likelihood, by the SDE", "bits/dim"),
    "ledger": ("Ledger", "bits/dim"),
    "ledger_minus_uniform_1": ("Ledger, minus uniform 1", "bits/dim"),
    "baselines": ("For comparison, bits/dim of the same images", ""),
    "gaussian_bpd": ("For comparison: a Gaussian fitted to the training data", "bits/dim"),
    "nll": ("Negative log-likelihood by the ODE", "nats"),
    "exact_nll": ("Negative log-likelihood by the ODE, integrated over the true density", "nats"),
    "true_entropy": ("Entropy of the true density, the lowest possible", "nats"),
    "kl": ("KL(truth || model)", "nats"),
    "kl_grid_error": ("Estimate of its error by the grid", "nats"),
    "kl_of_examples": ("KL(truth || model), mean over the examples", "nats"),
    "model_mass": ("Integral of the model's density over the grid, ideally 1", ""),
    "sde_exact_nll": ("Negative log-likelihood by the SDE, integrated over the true density", "nats"),
    "sde_kl": ("KL(truth || model) of the SDE", "nats"),
    "sde_kl_grid_error": ("Estimate of its error by the grid", "nats"),
    "sde_model_mass": ("Integral of the SDE's density over the grid, ideally 1", ""),
    "nfe": ("Function evaluations of the likelihood ODE", ""),
    "ode_error": ("Estimate of the likelihood ODE's error, by example", ""),
    "loss": ("Training loss over the test split", ""),
    "sampling": ("Samples", ""),
    "inception_score": ("Inception score of the samples", ""),
    "fid": ("FID of the samples", ""),
    "kid": ("KID of the samples", ""),
    "fisher": ("Integrated over time along the ODE", ""),
}
# Suffix of a likelihood's key: suffix of its label.
VARIANTS = {
    "": "",
    "_variational": ", variational dequantisation",
    "_train": ", training data",
    "_variational_train": ", training data, variational dequantisation",
}
_LABELS = {
    key + end: (label + words, unit) for key, (label, unit) in HEADLINES.items() for end, words in VARIANTS.items()
}
_FACTS = ("checkpoint", "step", "dataset", "parameters")  # the keys of a result that are no quantities
# Key of a launch in run.json: label.
ENVIRONMENT = {
    "started": "Started",
    "step": "From step",
    "command": "Command",
    "commit": "Git commit of the code",
    "python": "Python",
    **{name: name for name in ("jax", "jaxlib", "flax", "numpy")},
    "precision": "Matrix products",
    "devices": "Devices",
    "platform": "Platform",
}


def section(title: str, *parts: str) -> str:
    """Returns a heading with the parts below it, or nothing if they are empty."""
    body = "\n".join(filter(None, parts))
    return f"<section><h2>{html.escape(title)}</h2>\n{body}</section>" if body else ""


def folded(*parts: str) -> str:
    """Returns the parts behind a line to click on, or nothing if they are empty."""
    body = "".join(parts)
    return f"<details><summary>show</summary>{body}</details>" if body else ""


def likelihood(result: Mapping[str, Any]) -> str:
    """Returns the negative log-likelihood of a result with its unit, or nothing without one."""
    return next((as_text(result[key], _LABELS[key][1]) for key in ("bpd", "nll") if key in result), "")


def headline(result: Mapping[str, Any]) -> str:
    """Returns the likelihood of a result and what it is worth, or nothing without one."""
    if not (found := likelihood(result)):
        return ""
    baselines = {**result.get("baselines", {}), **_fitted_gaussian(result)}
    others = ", ".join(f"{name} {value:.3f}" for name, value in baselines.items())
    worth = f"<small>{html.escape(f'On the same examples: {others}')}</small>" if others else ""
    return f'<p class="headline">{html.escape(found)}{worth}</p>'


def _fitted_gaussian(result: Mapping[str, Any]) -> dict[str, float]:
    return {"a fitted Gaussian": result["gaussian_bpd"]} if "gaussian_bpd" in result else {}


def table(rows: Sequence[Sequence[str]], mark: bool = False) -> str:
    """Returns a table whose head is the first row, or nothing if no other row follows.

    `mark` highlights the rows whose cells differ, apart from the first and the last cell.
    """
    if len(rows) < 2:
        return ""
    head, *body = rows
    lines = [_row("td", row, mark and len(set(row[1:-1])) > 1) for row in body]
    return f'<div class="scroll"><table><thead>{_row("th", head)}</thead><tbody>{"".join(lines)}</tbody></table></div>'


def _row(tag: str, cells: Sequence[str], marked: bool = False) -> str:
    opening = '<tr class="marked">' if marked else "<tr>"
    return opening + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def figure(picture: Picture) -> str:
    image = f'<img alt="{picture.name}" src="data:image/png;base64,{base64.b64encode(picture.png).decode()}">'
    return f"<figure>{image}<figcaption>{html.escape(picture.caption)}</figcaption></figure>"


def side_by_side(pictures: Sequence[tuple[str, Picture]]) -> str:
    """Returns labelled figures in columns."""
    cells = [f"<div><h3>{html.escape(label)}</h3>{figure(picture)}</div>" for label, picture in pictures]
    return f'<div class="side">{"".join(cells)}</div>'


def document(title: str, body: Sequence[str], wide: bool = False) -> bytes:
    title = html.escape(title)
    head = f'<head><meta charset="utf-8"><title>{title}</title><style>{CSS}</style></head>'
    opening = '<body class="wide">' if wide else "<body>"
    lines = ["<!doctype html>", '<html lang="en">', head, f"{opening}<h1>{title}</h1>", *body, "</body></html>"]
    return "\n".join(filter(None, lines)).encode()


def as_text(value: Any, unit: str = "") -> str:
    """Writes a number, a mean with its standard error, or another dictionary without its `settings`."""
    if isinstance(value, dict) and "stderr" in value:
        unit, n = value.get("unit", unit), value.get("num_examples")
        failed = f", incomplete: {value['num_failed']:,} failed" if "num_failed" in value else ""
        count = "" if n is None else f" ({n:,} examples{failed})"
        count += f", ± {value['stderr_over_repeats']:.2g} by noise" if "stderr_over_repeats" in value else ""
        return f"{plus_minus(value['mean'], value['stderr'])} {unit}{count}"
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {as_text(v)}" for key, v in value.items() if key != "settings")
    if isinstance(value, float):
        return f"{value:.5g} {unit}".strip()
    return f"{value:,}" if isinstance(value, int) else str(value)


def result_rows(results: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """Yields a row for each quantity that some result has: its label and its value in each result."""
    for key in dict.fromkeys([*_LABELS, *(key for result in results for key in result)]):
        if key in _FACTS or not any(key in result for result in results):
            continue
        label, unit = _LABELS.get(key, (key.replace("_", " "), ""))
        values = [result.get(key, "") for result in results]
        if all(isinstance(value, dict) and "stderr" not in value and len(value) > 3 for value in values):
            for part in dict.fromkeys(part for value in values for part in value if part != "settings"):
                yield [f"{label}: {part.replace('_', ' ')}", *(as_text(value.get(part, "")) for value in values)]
        else:
            yield [label, *(as_text(value, unit) for value in values)]


def results_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Writes the results as plain text for a console, one column for each."""
    head = ["", *(f"checkpoint {r['checkpoint']}, step {r['step']:,}" for r in results)]
    rows = [head, *result_rows(results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def config_rows(runs: Mapping[str, RunFiles]) -> list[list[str]]:
    """Returns a head and a row for each key whose value in some run is not the default.

    Keys that the project no longer has are left out. A run without a config has empty cells.
    """
    default = get_default_configs()
    keys = sorted({key for run in runs.values() for key in differences(run.config, default)})
    configs = [flatten(config) for config in (*(run.config for run in runs.values()), default)]
    values = {key: [config.get(key, "") for config in configs] for key in keys}  # JSON has lists for tuples
    rows = [[key, *(str(tuple(v) if isinstance(v, list) else v) for v in of_key)] for key, of_key in values.items()]
    return [["Key", *runs, "Default"], *rows]


def environment_rows(runs: Mapping[str, RunFiles]) -> list[list[str]]:
    """Returns a head and a row for each fact. The columns are the first and the newest launch of each run."""
    columns = {}
    for label, run in runs.items():
        for i in sorted({0, max(0, len(run.launches) - 1)}):
            name = f"{label} launch {i + 1}".strip() if len(run.launches) > 1 else label
            columns[name] = run.launches[i] if run.launches else {}
    if not any(columns.values()):
        return []
    texts = {key: [as_text(launch.get(key, "not recorded")) for launch in columns.values()] for key in ENVIRONMENT}
    return [["", *columns], *([label, *texts[key]] for key, label in ENVIRONMENT.items())]
