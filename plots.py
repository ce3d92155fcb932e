"""The pictures of one run, and of several at once, from the files of their workdirs; `report.py` writes them down."""

import io
import json
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

import fisher_plot
from errors import UserError

# Okabe and Ito's colours, told apart with any kind of colour vision; without yellow, too pale for a line on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MODEL, OTHER, TRUTH = PALETTE[0], PALETTE[1], "#9A9A9A"
STYLE: dict[Any, Any] = {"axes.grid": True, "figure.dpi": 130, "grid.alpha": 0.3, "legend.frameon": False}
TERMS = {
    "first": "First order",
    "second": "Second order",
    "third": "Third order",
    "loss": "Total",
    "grad_norm": "Gradient norm before clipping",
}
MIN_CELL, PAD, PAD_GREY = 40, 2, 200


class Run(NamedTuple):
    """What a workdir holds, the arrays apart; `results` has the evaluated checkpoints, the newest last."""

    workdir: Path
    eval: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    results: list[dict[str, Any]]

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


class Picture(NamedTuple):
    """A PNG, the name of its file and its caption."""

    name: str
    png: bytes
    caption: str


# ---- files


def load(workdir: Path, eval_folder: str = "eval") -> Run:
    folder = workdir / eval_folder
    try:
        config = json.loads((workdir / "config.json").read_text()) if (workdir / "config.json").exists() else {}
        results = [json.loads(path.read_text()) for path in _numbered(folder, "report_*.json")]
        log = workdir / "metrics.jsonl"
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        # A stopped run may have left half a line.
        metrics = [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise UserError(f"a JSON file of {workdir} is damaged: {error}") from error
    if not (config or metrics or results or _numbered(folder, "*.npz") or _numbered(workdir / "samples", "*")):
        raise UserError(f"nothing to report in {workdir}: no config.json, metrics.jsonl, samples/ or {eval_folder}/")
    return Run(workdir, folder, config, metrics, results)


def _numbered(folder: Path, pattern: str) -> list[Path]:
    """The files `<name>_<number>.<suffix>` that match, by their number."""
    return sorted((p for p in folder.glob(pattern) if re.search(r"_\d+\.\w+$", p.name)), key=_number_of)


def _number_of(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def _newest_npz(folder: Path, pattern: str, *required: str) -> tuple[Path, dict[str, np.ndarray]] | None:
    paths = _numbered(folder, pattern)
    if not paths:
        return None
    try:
        with np.load(paths[-1]) as file:
            return paths[-1], {name: file[name] for name in {*file.files, *required}}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {paths[-1]}: {error}") from error


# ---- pictures of one run


def pictures(run: Run) -> Iterator[Picture]:
    """The pictures that the files of the run allow."""
    names = [name for name in TERMS if any(np.any(run.series(split, name)[1]) for split in ("train", "eval"))]
    if names:
        yield Picture("losses", _png(_losses(run, names)), "The objective's terms in training. From metrics.jsonl.")
    yield from _samples(run)
    if found := _newest_npz(run.eval, "density_*.npz", "x", "model_logp"):
        path, arrays = found
        dim = _rows(arrays["x"]).shape[1]
        if dim <= 2:
            figure, what = density_1d({"model": arrays}) if dim == 1 else density_2d(arrays)
            yield Picture("density", _png(figure), f"{what} From {run.name(path)}.")
    if found := _newest_npz(run.eval, "bpd_[0-9]*.npz"):
        path, arrays = found
        values, unit = (arrays["bpd"], "bits/dim") if "bpd" in arrays else (-arrays["logp"], "nats")
        caption = f"Examples, each averaged over its repeats; band: ± one standard error. From {run.name(path)}."
        yield Picture("bpd", _png(likelihoods(values, unit)), caption)
    if found := _newest_npz(run.eval, "fisher_*.npz", *fisher_plot.REQUIRED):
        path, arrays = found
        figure, axes = _panels(1, 2, 5.6, 4.6)
        fisher_plot.draw(axes[0], arrays, PALETTE)
        yield Picture("fisher", _png(figure), f"{fisher_plot.CAPTION} From {run.name(path)}.")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _panels(rows: int, columns: int, width: float, height: float, layout: Any = "constrained", **kwargs):
    """A figure and its axes [rows, columns]; width and height of one panel, in inches."""
    figure = Figure(figsize=(columns * width, rows * height), layout=layout)
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def _rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1)  # [N, D], also of [N]


def image_grid(images: np.ndarray, columns: int | None = None) -> bytes:
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images must be [N, H, W, 1 or 3], none of them 0, not {list(images.shape)}")
    if images.dtype != np.uint8:
        images = np.round(np.clip(np.nan_to_num(images), 0, 1) * 255).astype(np.uint8)
    factor = max(1, math.ceil(MIN_CELL / min(images.shape[1:3])))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    n, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    grid = np.full((rows * (height + PAD) + PAD, columns * (width + PAD) + PAD, channels), PAD_GREY, np.uint8)
    for i, image in enumerate(images):
        y, x = PAD + i // columns * (height + PAD), PAD + i % columns * (width + PAD)
        grid[y : y + height, x : x + width] = image
    buffer = io.BytesIO()
    Image.fromarray(grid[..., 0] if channels == 1 else grid).save(buffer, format="PNG")
    return buffer.getvalue()


def smooth(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centred running mean of the finite values over some 1/20 of them, over fewer at the ends."""
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    window = np.ones(2 * (len(values) // 40) + 1)
    if len(values) == 0:
        return steps, values
    return steps, np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _log_if_wide(ax: Axes) -> None:
    """A logarithmic y axis where all that is drawn is positive and spans more than a factor of 20."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in ax.get_lines()])
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) and drawn.min() > 0 and drawn.max() > 20 * drawn.min():
        ax.set_yscale("log")


def _losses(run: Run, names: list[str]) -> Figure:
    columns = 2 if len(names) in (2, 4) else min(3, len(names))
    figure, axes = _panels(math.ceil(len(names) / columns), columns, 4.2, 3.1)
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


def _samples(run: Run) -> Iterator[Picture]:
    """The newest samples: of the evaluation, unless training has drawn some at a later step."""
    paths = _numbered(run.workdir / "samples", "step_*")
    step = run.results[-1].get("step", math.inf) if run.results else math.inf
    evaluated = _newest_npz(run.eval, "samples_*.npz", "samples")
    if paths and (evaluated is None or _number_of(paths[-1]) > step):
        if paths[-1].suffix == ".png":
            yield Picture("samples", paths[-1].read_bytes(), f"Samples in training. From {run.name(paths[-1])}.")
            return
        evaluated = _newest_npz(run.workdir / "samples", "step_*.npz", "samples")
    if evaluated is not None:
        path, samples = evaluated[0], evaluated[1]["samples"]
        density = _newest_npz(run.eval, "density_*.npz")
        data = None if density is None else density[1].get("data")
        image = samples.ndim == 4
        png = image_grid(samples[:64]) if image else _png(_point_samples(_rows(samples), data))
        what = f"The first {min(64, len(samples))} of {len(samples):,} samples" if image else "Samples of the model"
        yield Picture("samples", png, f"{what}. From {run.name(path)}.")


def _point_samples(samples: np.ndarray, data: np.ndarray | None) -> Figure:
    """1-D: histograms, one over the other. Otherwise the first two coordinates, side by side."""
    data = None if data is None else _rows(data)
    frame = samples if data is None else data
    margin = 0.25 * np.ptp(frame, axis=0) + 1e-3
    low, high = frame.min(axis=0) - margin, frame.max(axis=0) + margin
    if samples.shape[1] == 1:
        figure, axes = _panels(1, 1, 8.0, 3.4)
        bins = {"bins": 100, "range": (low[0], high[0]), "density": True}
        if data is not None:
            axes[0, 0].hist(data[:, 0], color=TRUTH, alpha=0.5, label="true data", **bins)
        axes[0, 0].hist(samples[:, 0], histtype="step", color=MODEL, lw=1.6, label="samples of the model", **bins)
        axes[0, 0].set(xlabel="x", ylabel="density (1 / unit of x)")
        axes[0, 0].legend()
        return figure
    clouds = [("samples of the model", samples, MODEL)] + ([] if data is None else [("true data", data, "#555555")])
    shown = min(5000, *(len(x) for _, x, _ in clouds))
    figure, axes = _panels(1, len(clouds), 4.8, 4.8, layout="compressed", sharex=True, sharey=True)
    for ax, (label, x, color) in zip(axes[0], clouds, strict=True):
        ax.scatter(*x[:shown, :2].T, s=4, alpha=0.4, color=color, linewidths=0)
        ax.set(title=f"{label}, {shown:,} points", xlabel="x[0]", ylabel="x[1]", aspect="equal")
        ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        ax.label_outer()
    return figure


def density_1d(models: Mapping[str, dict[str, np.ndarray]]) -> tuple[Figure, str]:
    """Densities of models of the same data over the true one and, where that is known, the error of the logarithm."""
    first = next(iter(models.values()))
    truth = first.get("true_logp")
    figure, axes = _panels(1 if truth is None else 2, 1, 8.0, 3.1, sharex=True)
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
    """The model's density beside the true one, or else beside the histogram of the data, on one colour scale."""
    x, n = arrays["x"], math.isqrt(len(arrays["x"]))
    if n * n != len(x):
        raise UserError(f"the 2-D density grid has {len(x)} points, which is not a square number")
    half = (x[-1] - x[0]) / (2 * max(1, n - 1))  # of a cell: the grid's points are the middles of the pixels
    (left, lower), (right, upper) = x[0] - half, x[-1] + half
    maps = {"model": np.exp(arrays["model_logp"]).reshape(n, n)}
    if "true_logp" in arrays:
        maps["truth"] = np.exp(arrays["true_logp"]).reshape(n, n)
    # A few peaks, or a histogram's noise, would darken all the rest.
    top = max(np.percentile(density, 99.5) for density in maps.values())
    if "true_logp" not in arrays and "data" in arrays:
        bins, box = min(n, math.isqrt(len(arrays["data"]) // 4) + 1), [[left, right], [lower, upper]]
        maps["true data"] = np.histogram2d(*arrays["data"].T, bins=bins, range=box, density=True)[0]
    figure, axes = _panels(1, len(maps), 5.0, 4.6, layout="compressed", sharex=True, sharey=True)
    for ax, (label, density) in zip(axes[0], maps.items(), strict=True):
        image = ax.imshow(density.T, origin="lower", extent=(left, right, lower, upper), vmin=0, vmax=top)
        ax.set(title=label, xlabel="x[0]", ylabel="x[1]")
        ax.grid(False)
        ax.label_outer()
    figure.colorbar(image, ax=axes, label="density (1 / unit of area)", extend="max", shrink=0.85)
    beside = f" beside {list(maps)[1]}" if len(maps) > 1 else ""
    return figure, f"Density of the ODE{beside}. Colours end at the 99.5th percentile."


def likelihoods(values: np.ndarray, unit: str) -> Figure:
    """values [R, N]: histogram over the N examples."""
    values = np.atleast_2d(values).mean(axis=0, dtype=np.float64)
    values = values[np.isfinite(values)]
    mean, stderr = values.mean(), values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    figure, axes = _panels(1, 1, 7.5, 3.4)
    ax = axes[0, 0]
    ax.hist(values, bins=max(10, min(60, len(values) // 8)), color=MODEL, alpha=0.65)
    ax.axvspan(mean - stderr, mean + stderr, color=OTHER, alpha=0.3, lw=0)
    ax.axvline(mean, color=OTHER, lw=1.6, label=f"mean {plus_minus(mean, stderr)} {unit}")
    ax.set(xlabel=f"negative log-likelihood of an example ({unit})", ylabel="number of examples")
    ax.legend()
    return figure


# ---- pictures of several runs


def comparisons(runs: Mapping[str, Run]) -> Iterator[Picture]:
    """Runs on the same data at once: their 1-D densities and their first-order losses."""
    groups: dict[str, dict[str, Run]] = {}
    for label, run in runs.items():
        groups.setdefault(run.dataset, {})[label] = run
    for dataset, group in groups.items():
        found = {label: _newest_npz(run.eval, "density_*.npz", "x", "model_logp") for label, run in group.items()}
        models = {label: f[1] for label, f in found.items() if f and _rows(f[1]["x"]).shape[1] == 1}
        if len(models) > 1:
            figure, what = density_1d(models)
            name = re.sub(r"\W+", "_", f"density_{dataset}").strip("_")
            yield Picture(name, _png(figure), f"{dataset}: {what} From each run's eval/density_*.npz.")
    figure, axes = _panels(1, len(groups), 9.0 if len(groups) == 1 else 5.4, 3.6)
    for ax, (dataset, group) in zip(axes[0], groups.items(), strict=True):
        for (label, run), color in zip(group.items(), PALETTE * len(group), strict=False):
            ax.plot(*smooth(*run.series("train", "first")), color=color, lw=1.5, label=label)
        ax.set(title=dataset, xlabel="training step", ylabel="first-order loss")
        ax.legend()
        _log_if_wide(ax)
    if any(len(run.series("train", "first")[0]) for run in runs.values()):
        yield Picture("loss", _png(figure), "First-order training loss, running mean. From each run's metrics.jsonl.")


def plus_minus(mean: float, stderr: float) -> str:
    """The mean and its standard error to the error's second digit."""
    if not (math.isfinite(mean) and math.isfinite(stderr) and stderr > 0):
        return f"{mean:.5g}"
    digits = max(0, 1 - math.floor(math.log10(stderr)))
    return f"{mean:.{digits}f} ± {stderr:.{digits}f}"
