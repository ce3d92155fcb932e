# SPDX-License-Identifier: Apache-2.0
"""Pictures of samples: grids of images, clouds and histograms of points, and how they change over training."""

import io
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from errors import UserError
from report.canvas import MODEL, TRUTH, Picture, panels, png
from report.run_files import RunFiles, load_npz, newest_npz, number_of, numbered

MIN_CELL, PAD, PAD_GREY = 40, 2, 200


def as_rows(x: np.ndarray) -> np.ndarray:
    """[N, D], also of [N]."""
    return x.reshape(len(x), -1)


def image_grid(images: np.ndarray, columns: int | None = None) -> bytes:
    """A PNG, as `report.save_image_grid` writes it."""
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


def newest_samples(run: RunFiles) -> Iterator[Picture]:
    """The newest samples: of the evaluation, unless training has drawn some at a later step."""
    paths = numbered(run.workdir / "samples", "step_*")
    step = run.results[-1].get("step", math.inf) if run.results else math.inf
    evaluated = newest_npz(run.eval, "samples_*.npz", "samples")
    if paths and (evaluated is None or number_of(paths[-1]) > step):
        if paths[-1].suffix == ".png":
            yield Picture("samples", paths[-1].read_bytes(), f"Samples in training. From {run.name(paths[-1])}.")
            return
        evaluated = newest_npz(run.workdir / "samples", "step_*.npz", "samples")
    if evaluated is not None:
        path, samples = evaluated[0], evaluated[1]["samples"]
        density = newest_npz(run.eval, "density_*.npz")
        data = None if density is None else density[1].get("data")
        image = samples.ndim == 4
        picture = image_grid(samples[:64]) if image else png(point_samples(as_rows(samples), data))
        what = f"The first {min(64, len(samples))} of {len(samples):,} samples" if image else "Samples of the model"
        yield Picture("samples", picture, f"{what}. From {run.name(path)}.")


def point_samples(samples: np.ndarray, data: np.ndarray | None) -> Figure:
    """1-D: histograms, one over the other. Otherwise the first two coordinates, side by side."""
    data = None if data is None else as_rows(data)
    frame = samples if data is None else data
    margin = 0.25 * np.ptp(frame, axis=0) + 1e-3
    low, high = frame.min(axis=0) - margin, frame.max(axis=0) + margin
    if samples.shape[1] == 1:
        figure, axes = panels(1, 1, 8.0, 3.4)
        bins = {"bins": _num_bins(len(samples)), "range": (low[0], high[0]), "density": True}
        if data is not None:
            axes[0, 0].hist(data[:, 0], color=TRUTH, alpha=0.5, label="true data", **bins)
        axes[0, 0].hist(samples[:, 0], histtype="step", color=MODEL, lw=1.6, label="samples of the model", **bins)
        axes[0, 0].set(xlabel="x", ylabel="density (1 / unit of x)")
        axes[0, 0].legend()
        return figure
    clouds = [("samples of the model", samples, MODEL)] + ([] if data is None else [("true data", data, "#555555")])
    shown = min(5000, *(len(x) for _, x, _ in clouds))
    figure, axes = panels(1, len(clouds), 4.8, 4.8, layout="compressed", sharex=True, sharey=True)
    for ax, (label, x, color) in zip(axes[0], clouds, strict=True):
        ax.scatter(*x[:shown, :2].T, s=4, alpha=0.4, color=color, linewidths=0)
        ax.set(title=f"{label}, {shown:,} points", xlabel="x[0]", ylabel="x[1]", aspect="equal")
        ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        ax.label_outer()
    return figure


def _num_bins(n: int) -> int:
    """Of a histogram of n points: enough of them in each."""
    return min(100, max(10, n // 10))


def over_training(run: RunFiles, most: int = 4) -> Iterator[Picture]:
    """Samples of up to `most` snapshots of the training side by side, the first and the newest among them.

    Nothing if fewer than two snapshots drew samples. UserError if a file cannot be read.
    """
    paths = numbered(run.workdir / "samples", "step_*")
    if len(paths) < 2:
        return
    chosen = [paths[i] for i in sorted(set(np.linspace(0, len(paths) - 1, most).round().astype(int)))]
    grids = all(path.suffix == ".png" for path in chosen)
    figure = _grids(chosen) if grids else _clouds([as_rows(load_npz(path, "samples")["samples"]) for path in chosen])
    for ax, path in zip(figure.axes, chosen, strict=True):
        ax.set_title(f"step {number_of(path):,}")
    yield Picture("samples_over_training", png(figure), "Samples over training, EMA weights. From samples/step_*.")


def _grids(paths: list[Path]) -> Figure:
    figure, axes = panels(1, len(paths), 3.2, 3.5)
    for ax, path in zip(axes[0], paths, strict=True):
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error}") from error
        ax.imshow(pixels, interpolation="antialiased")
        ax.set_axis_off()
    return figure


def _clouds(snapshots: list[np.ndarray]) -> Figure:
    """Snapshots [N, D] on the axes of the newest: histograms of 1-D points, else their first two coordinates."""
    margin = 0.25 * np.ptp(snapshots[-1], axis=0) + 1e-3
    low, high = snapshots[-1].min(axis=0) - margin, snapshots[-1].max(axis=0) + margin
    figure, axes = panels(1, len(snapshots), 3.2, 3.2, sharex=True, sharey=True)
    for ax, x in zip(axes[0], snapshots, strict=True):
        if x.shape[1] == 1:
            ax.hist(x[:, 0], bins=_num_bins(len(x)), range=(low[0], high[0]), density=True, color=MODEL)
            ax.set(xlabel="x", ylabel="density (1 / unit of x)")
        else:
            ax.scatter(*x[:5000, :2].T, s=3, alpha=0.4, color=MODEL, linewidths=0)
            ax.set(xlabel="x[0]", ylabel="x[1]", xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        ax.label_outer()
    return figure
