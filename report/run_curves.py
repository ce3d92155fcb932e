# SPDX-License-Identifier: Apache-2.0
"""The pictures of one run and those that compare several: losses, densities, likelihoods, score diagnostics."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from errors import UserError
from report.canvas import MODEL, OTHER, PALETTE, TRUTH, Picture, panels, plus_minus, png
from report.page import HEADLINES, VARIANTS
from report.run_files import RunFiles, newest_npz
from report.sample_grids import as_rows, newest_samples, over_training

TERMS = {
    "first": "First order",
    "second": "Second order",
    "third": "Third order",
    "loss": "Total",
    "grad_norm": "Gradient norm before clipping",
}
ORDERS = list(TERMS)[:3]
# The keys of eval/report_<ckpt>.json that are drawn over the checkpoints.
LIKELIHOODS = {"bpd": "ODE", "nll": "ODE", "bound": "bound by the SDE"}
# The score diagnostics (`diagnostics.FisherCurves`), averaged over examples.
SCORES = {
    "score_ode": r"model – ODE score: $|s - \nabla \log q_t|^2$",
    "score_normal": r"model – normal: $|s + x / \sigma^2|^2$",
    "ode_normal": r"ODE score – normal: $|\nabla \log q_t + x / \sigma^2|^2$",
    "score_true": r"model – truth: $|s - \nabla \log p_t|^2$",
    "ode_true": r"ODE score – truth: $|\nabla \log q_t - \nabla \log p_t|^2$",
}
DIVERGENCES = {
    "divergence_normal": r"divergence – normal's: $(v \cdot J v + D / \sigma^2)^2$",
    "grad_divergence_normal": r"its gradient (normal's is 0): $|\nabla_x (v \cdot J v)|^2$",
}
FISHER_REQUIRED = ("times", *list(SCORES)[:3], *DIVERGENCES)
FISHER_CAPTION = (
    "Score diagnostics along the ODE from data: squared distances times g², mean over examples, ± one standard error. "
    "s: the model's score; q_t: density of its ODE; J = ds/dx; v: probe; normal: the score of N(0, σ² I)."
)
DECADES = 9  # The y axis of the diagnostics spans no more: at t = 1 a distance may vanish up to rounding.
Map = tuple[np.ndarray, np.ndarray, np.ndarray]  # as `pcolormesh` takes it: x[0] [m], x[1] [n], a 2-D density [n, m]


def pictures(run: RunFiles) -> Iterator[Picture]:
    """Yields the pictures for which the run has files."""
    yield from newest_samples(run)
    if found := newest_npz(run.eval, "density_*.npz", "x", "model_logp"):
        path, arrays = found
        dim = as_rows(arrays["x"]).shape[1]
        if dim <= 2:
            figure, what = density_1d({"model": arrays}) if dim == 1 else density_2d(arrays)
            yield Picture("density", png(figure), f"{what} From {path.relative_to(run.workdir)}.", "Density")
    if found := newest_npz(run.eval, "bpd_[0-9]*.npz"):
        path, arrays = found
        figure = likelihoods(arrays["bpd"], "bits/dim") if "bpd" in arrays else likelihoods(-arrays["logp"], "nats")
        caption = "Examples, each averaged over its repeats; band: ± one standard error."
        caption += f" From {path.relative_to(run.workdir)}."
        yield Picture("bpd", png(figure), caption, "Likelihood of the examples")
    yield from over_training(run)
    if found := newest_npz(run.eval, "ledger_[0-9]*.npz"):
        path, arrays = found
        caption = "Mean over the same images, and the paired difference to the first row ± its standard error."
        yield Picture("ledger", png(ledger(arrays)), f"{caption} From {path.relative_to(run.workdir)}.", "Ledger")
    if len({result.get("step") for result in run.results}) > 1:
        yield from by_checkpoint({"": run}, "bpd_by_checkpoint")
    names = [name for name in TERMS if any(np.any(run.series(split, name)[1]) for split in ("train", "eval"))]
    if names:
        caption = "The objective's terms in training. From metrics.jsonl."
        yield Picture("losses", png(_losses(run, names)), caption, "Losses")
    if found := newest_npz(run.eval, "fisher_*.npz", *FISHER_REQUIRED):
        path, arrays = found
        figure, axes = panels(1, 2, 5.6, 4.6)
        draw_fisher(axes[0], arrays)
        caption = f"{FISHER_CAPTION} From {path.relative_to(run.workdir)}."
        yield Picture("fisher", png(figure), caption, "Score diagnostics (Fisher curves)")


def smooth(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the centred running mean of the finite values over about 1/20 of them, over fewer at the ends."""
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    window = np.ones(2 * (len(values) // 40) + 1)
    if len(values) == 0:
        return steps, values
    return steps, np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _log_if_wide(ax: Axes) -> None:
    """Makes the y axis logarithmic if all drawn values are positive and span more than a factor of 20."""
    low, high = ax.dataLim.intervaly
    if 0 < 20 * low < high:
        ax.set_yscale("log")


def _losses(run: RunFiles, names: list[str]) -> Figure:
    columns = 2 if len(names) in (2, 4) else min(3, len(names))
    figure, axes = panels(math.ceil(len(names) / columns), columns, 4.2, 3.1)
    handles = {}
    for ax, name in zip(axes.flat, names, strict=False):
        train, evaluated = run.series("train", name), run.series("eval", name)
        if len(train[0]):
            handles["train"] = ax.plot(*train, color=MODEL, alpha=0.4, lw=0.9)[0]
            handles["train, running mean"] = ax.plot(*smooth(*train), color=MODEL, lw=1.6)[0]
        if len(evaluated[0]):
            handles["eval, EMA weights"] = ax.plot(*evaluated, color=OTHER, lw=1.4, ls="--")[0]
        ax.set(title=TERMS[name], xlabel="training step", ylabel="norm" if name == "grad_norm" else "loss")
        _log_if_wide(ax)
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3)
    return figure


def density_1d(models: Mapping[str, dict[str, np.ndarray]]) -> tuple[Figure, str]:
    """Draws densities of models of the same data over the true one and, if that is known, the log-density's error.

    Returns the figure and a sentence for its caption.
    """
    first = next(iter(models.values()))
    truth = first.get("true_logp")
    figure, axes = panels(1 if truth is None else 2, 1, 8.0, 3.1, sharex=True)
    top, bottom = axes[0, 0], axes[-1, 0]
    if truth is not None:
        top.fill_between(first["x"].reshape(-1), np.exp(truth), color=TRUTH, alpha=0.5, lw=0, label="truth")
        bottom.axhline(0, color="black", lw=0.8)
    elif "data" in first:
        top.hist(first["data"].reshape(-1), bins=100, density=True, color=TRUTH, alpha=0.5, label="true data")
    for i, (label, arrays) in enumerate(models.items()):
        line = {"color": PALETTE[i % len(PALETTE)], "lw": 1.5, "ls": "-" if i < len(PALETTE) else "--"}
        top.plot(arrays["x"].reshape(-1), np.exp(arrays["model_logp"]), label=label, **line)
        if truth is not None and "true_logp" in arrays:
            error = arrays["model_logp"] - arrays["true_logp"]
            seen = arrays["true_logp"] > np.max(truth) - math.log(1000)
            bottom.plot(arrays["x"].reshape(-1), np.where(seen, error, np.nan), **line)
            bottom.set_ylabel("log model - log truth (nats)")
    top.set(ylabel="density (1 / unit of x)", ylim=(0, None))
    top.legend()
    bottom.set_xlabel("x")
    below = "" if truth is None else "; below, the log-density's error, where the truth is over 1/1000 of its peak"
    return figure, f"Density of the ODE, over the true one in grey{below}."


def density_2d(arrays: dict[str, np.ndarray]) -> tuple[Figure, str]:
    """Draws the model's density beside the true one, or beside the histogram of the data, on one colour scale.

    Returns the figure and a sentence for its caption. UserError if the grid is not square.
    """
    known = (("model", "model_logp"), ("truth", "true_logp"))
    maps = {label: on_grid(arrays["x"], arrays[key]) for label, key in known if key in arrays}
    # A scale that reached a few peaks, or a histogram's noise, would darken all the rest.
    top = max(np.percentile(density, 99.5) for *_, density in maps.values())
    if "true_logp" not in arrays and "data" in arrays:
        bins = min(math.isqrt(len(arrays["x"])), math.isqrt(len(arrays["data"]) // 4) + 1)
        maps["true data"] = histogram_2d(arrays["x"], arrays["data"], bins)
    figure, axes = panels(1, len(maps), 5.0, 4.6, layout="compressed", sharex=True, sharey=True)
    image = draw_maps(axes[0], maps, top)
    for ax in axes[0]:
        ax.set(xlabel="x[0]", ylabel="x[1]")
        ax.label_outer()
    figure.colorbar(image, ax=axes, label="density (1 / unit of area)", extend="max", shrink=0.85)
    beside = f" beside {list(maps)[1]}" if len(maps) > 1 else ""
    return figure, f"Density of the ODE{beside}. Colours end at the 99.5th percentile."


def on_grid(x: np.ndarray, logp: np.ndarray) -> Map:
    """Returns the density at the points x [n², 2] of a square grid. UserError if there is no such n."""
    n = math.isqrt(len(x))
    if n * n != len(x):
        raise UserError(f"the 2-D density grid has {len(x)} points, which is not a square number")
    return x[::n, 0], x[:n, 1], np.exp(logp).reshape(n, n).T


def histogram_2d(x: np.ndarray, data: np.ndarray, bins: int) -> Map:
    """Returns the density of the data [M, 2] in bins x bins cells of the box that the grid x [n², 2] spans."""
    density, across, upwards = np.histogram2d(*data.T, bins=bins, range=x[[0, -1]].T, density=True)
    return across, upwards, density.T


def draw_maps(axes: Sequence[Axes] | np.ndarray, maps: Mapping[str, Map], top: float) -> Any:
    """Draws each map in a panel, with its label as the title. Colours span 0 to `top`. Returns the last image."""
    for ax, (label, density) in zip(axes, maps.items(), strict=True):
        image = ax.pcolormesh(*density, vmin=0, vmax=top)
        ax.set(title=label, aspect="equal")
        ax.grid(False)
    return image


def likelihoods(values: np.ndarray, unit: str) -> Figure:
    """Draws a histogram of the N examples. Values [R, N] are averaged over their R repeats first."""
    values = np.atleast_2d(values).mean(axis=0, dtype=np.float64)
    values = values[np.isfinite(values)]
    mean, stderr = values.mean(), values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    figure, ((ax,),) = panels(1, 1, 7.5, 3.4)
    ax.hist(values, bins=max(10, min(60, len(values) // 8)), color=MODEL, alpha=0.65)
    ax.axvspan(mean - stderr, mean + stderr, color=OTHER, alpha=0.3, lw=0)
    ax.axvline(mean, color=OTHER, lw=1.6, label=f"mean {plus_minus(mean, stderr)} {unit}")
    ax.set(xlabel=f"negative log-likelihood of an example ({unit})", ylabel="number of examples")
    ax.legend()
    return figure


def ledger(arrays: Mapping[str, np.ndarray]) -> Figure:
    """Draws bits/dim [R, N] of the same images by several estimates, as differences to the first."""
    rows = {name.replace("_", " "): values.mean(axis=0, dtype=np.float64) for name, values in arrays.items()}
    first = next(iter(rows.values()))
    figure, ((ax,),) = panels(1, 1, 7.5, 0.6 + 0.35 * len(rows))
    for place, values in enumerate(rows.values()):
        difference = values - first
        stderr = difference.std(ddof=1) / math.sqrt(len(difference))
        ax.errorbar(difference.mean(), place, xerr=stderr, fmt="o", color=MODEL, capsize=3)
    ax.axvline(0, color=TRUTH, lw=1)
    ax.set_yticks(range(len(rows)), [f"{name}: {values.mean():.4f}" for name, values in rows.items()])
    ax.invert_yaxis()
    ax.set(xlabel="bits/dim minus those of the first row")
    return figure


def by_checkpoint(runs: Mapping[str, RunFiles], name: str) -> Iterator[Picture]:
    """Draws the likelihoods and bounds of runs on the same data over the training steps of their checkpoints.

    runs: label -> run. Of several runs only the likelihood of the test data is drawn, and only if two of them have it.
    """
    curves, unit = {}, ""
    for label, run in runs.items():
        for kind, variant in itertools.product(LIKELIHOODS, VARIANTS):
            key = kind + variant
            found = [(r["step"], r[key]) for r in run.results if key in r and math.isfinite(r[key]["mean"])]
            if found and (len(runs) == 1 or key in ("bpd", "nll")):
                unit = found[-1][1].get("unit", HEADLINES[kind][1])
                points = sorted((step, value["mean"], value["stderr"]) for step, value in found)
                curves[label or LIKELIHOODS[kind] + VARIANTS[variant]] = points
    if len(curves) < min(2, len(runs)):
        return
    single = all(len(points) == 1 for points in curves.values())
    figure, ((ax,),) = panels(1, 1, 7.5, 1.0 + 0.4 * len(curves) if single else 3.6)
    for place, ((label, points), color) in enumerate(zip(curves.items(), itertools.cycle(PALETTE), strict=False)):
        steps, means, stderrs = zip(*points, strict=True)
        if single:
            ax.errorbar(means, [place], xerr=stderrs, color=color, marker="o", capsize=3)
        else:
            ax.errorbar(steps, means, stderrs, color=color, marker="o", capsize=3, label=label)
    if single:
        ax.set_yticks(range(len(curves)), list(curves))
        ax.set(xlabel=f"negative log-likelihood ({unit})", ylim=(len(curves) - 0.5, -0.5))
    else:
        ax.set(xlabel="training step of the checkpoint", ylabel=f"negative log-likelihood ({unit})")
        ax.legend()
    caption = f"By checkpoint, in {unit}; bars: ± one standard error over examples. From eval/report_*.json."
    yield Picture(name, png(figure), caption, "Likelihood by checkpoint")


def draw_fisher(axes: Sequence[Axes] | np.ndarray, arrays: Mapping[str, np.ndarray]) -> None:
    """Draws the distances of scores in one panel, those of the divergence and its gradient in another, over time.

    arrays: `times` [K] and for each curve that is known `<name>` [K] and perhaps `<name>_stderr` [K].
    """
    for ax, curves in zip(axes, (SCORES, DIVERGENCES), strict=True):
        for (name, label), color, line in zip(
            curves.items(), PALETTE, ("-", "--", "-.", ":", (0, (5, 1))), strict=False
        ):
            if name in arrays:
                draw_curve(ax, arrays, name, color, ls=line, lw=1.6, label=label)
        ax.set(xlabel="t", yscale="log")
        drawn = np.concatenate([arrays[name] for name in curves if name in arrays])
        if len(positive := drawn[drawn > 0]):
            ax.set_ylim(max(positive.min(), positive.max() / 10**DECADES) / 2, positive.max() * 2)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize="small")
    axes[0].set_ylabel("g² × squared distance of scores\n(nats / unit of time)")
    axes[1].set_ylabel("g² × squared distance\n(nats per unit of time and of x², x⁴)")


def draw_curve(ax: Axes, arrays: Mapping[str, np.ndarray], name: str, color: str, **style: Any) -> None:
    """Draws a mean over time where it is positive, in a band of ± one standard error if that is known."""
    mean = np.where(arrays[name] > 0, arrays[name], np.nan)
    ax.plot(arrays["times"], mean, color=color, **style)
    if (stderr := arrays.get(f"{name}_stderr")) is not None:
        ax.fill_between(arrays["times"], mean - stderr, mean + stderr, color=color, alpha=0.2, lw=0)


def comparisons(runs: Mapping[str, RunFiles]) -> Iterator[Picture]:
    """Yields pictures that compare runs on the same data: 1-D densities, likelihoods, and the losses of each order."""
    groups: dict[str, dict[str, RunFiles]] = {}
    for label, run in runs.items():
        groups.setdefault(run.dataset, {})[label] = run
    for dataset, group in groups.items():
        suffix = re.sub(r"\W+", "_", f"_{dataset}").rstrip("_")
        found = {label: newest_npz(run.eval, "density_*.npz", "x", "model_logp") for label, run in group.items()}
        models = {label: f[1] for label, f in found.items() if f and as_rows(f[1]["x"]).shape[1] == 1}
        if len(models) > 1:
            figure, what = density_1d(models)
            caption = f"{dataset}: {what} From each run's eval/density_*.npz."
            yield Picture("density" + suffix, png(figure), caption)
        if len(group) > 1:
            yield from by_checkpoint(group, "likelihood" + suffix)
    orders = [name for name in ORDERS if any(np.any(run.series("train", name)[1]) for run in runs.values())]
    if orders:
        caption = "Training losses by order, running means. From each run's metrics.jsonl."
        yield Picture("loss", png(_compared_losses(groups, orders)), caption)


def _compared_losses(groups: Mapping[str, Mapping[str, RunFiles]], orders: list[str]) -> Figure:
    """Draws one row of panels for each data set and one column for each order."""
    single = len(groups) == len(orders) == 1
    figure, axes = panels(len(groups), len(orders), 9.0 if single else 5.4, 3.6)
    for row, (dataset, group) in zip(axes, groups.items(), strict=True):
        for ax, name in zip(row, orders, strict=True):
            for (label, run), color in zip(group.items(), itertools.cycle(PALETTE), strict=False):
                steps, values = run.series("train", name)
                if np.any(values):
                    ax.plot(*smooth(steps, values), color=color, lw=1.5, label=label)
            if not ax.get_lines():
                ax.set_axis_off()
                continue
            ax.set(title=f"{TERMS[name]}, {dataset}", xlabel="training step", ylabel="loss")
            ax.legend()
            _log_if_wide(ax)
    return figure
