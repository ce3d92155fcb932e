# SPDX-License-Identifier: Apache-2.0
"""Pictures of samples: grids of images, clouds and histograms of points, and how they change over training."""

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from errors import UserError
from report.canvas import MODEL, TRUTH, Picture, panels, png
from report.run_files import RunFiles, load_npz, newest_npz, number_of, numbered

MIN_CELL, PAD, PAD_GREY = 40, 2, 200


def as_rows(x: np.ndarray) -> np.ndarray:
    """Returns points [N, D] or [N] as [N, D]."""
    return x.reshape(len(x), -1)


def tiles(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Returns the pixels [height, width (, 3)], uint8, of the PNG that `report.save_image_grid` writes."""
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
    return grid[..., 0] if channels == 1 else grid


def image_grid(images: np.ndarray, columns: int | None = None) -> bytes:
    """Returns the PNG that `report.save_image_grid` writes."""
    buffer = io.BytesIO()
    Image.fromarray(tiles(images, columns)).save(buffer, format="PNG")
    return buffer.getvalue()


def newest_samples(run: RunFiles) -> Iterator[Picture]:
    """Draws the samples of the newest evaluation, or those of training if they are of a later step."""
    paths = numbered(run.eval, "samples_*.npz")
    in_training = numbered(run.workdir / "samples", "step_*")
    step = run.results[-1].get("step", math.inf) if run.results else math.inf
    if in_training and (not paths or number_of(in_training[-1]) > step):
        paths = in_training
    for path in paths[-1:]:
        if path.suffix == ".png":
            picture, what = path.read_bytes(), "Samples in training"
        elif (samples := load_npz(path, "samples")["samples"]).ndim == 4:
            picture, what = image_grid(samples[:64]), f"The first {min(64, len(samples))} of {len(samples):,} samples"
        else:
            density = newest_npz(run.eval, "density_*.npz")
            picture, what = png(point_samples(samples, density and density[1].get("data"))), "Samples of the model"
        yield Picture("samples", picture, f"{what}. From {path.relative_to(run.workdir)}.", "Samples")


def point_samples(samples: np.ndarray, data: np.ndarray | None) -> Figure:
    """Draws samples [N, D] and true data [M, D]: one over the other if they are 1-D, else side by side."""
    clouds = [("samples of the model", as_rows(samples), MODEL)]
    if data is not None:
        clouds.append(("true data", as_rows(data), "#555555"))
    frame = clouds[-1][1]
    if frame.shape[1] == 1:
        figure, ((ax,),) = panels(1, 1, 8.0, 3.4)
        if data is not None:
            _draw_points(ax, frame, frame, len(samples), color=TRUTH, alpha=0.5, label="true data")
        label, x, color = clouds[0]
        _draw_points(ax, x, frame, len(samples), color=color, histtype="step", lw=1.6, label=label)
        ax.legend()
        return figure
    shown = min(5000, *(len(x) for _, x, _ in clouds))
    figure, axes = panels(1, len(clouds), 4.8, 4.8, layout="compressed", sharex=True, sharey=True)
    for ax, (label, x, color) in zip(axes[0], clouds, strict=True):
        _draw_points(ax, x, frame, shown, color=color)
        ax.set(title=f"{label}, {shown:,} points", aspect="equal")
    return figure


def _draw_points(ax: Axes, x: np.ndarray, frame: np.ndarray, n: int, dot: int = 4, **style: Any) -> None:
    """Draws 1-D points as a histogram with bins for n points, or two coordinates of the first n others as dots."""
    margin = 0.25 * np.ptp(frame, axis=0) + 1e-3
    low, high = frame.min(axis=0) - margin, frame.max(axis=0) + margin
    if x.shape[1] == 1:
        ax.hist(x[:, 0], bins=min(100, max(10, n // 10)), range=(low[0], high[0]), density=True, **style)
        ax.set(xlabel="x", ylabel="density (1 / unit of x)")
    else:
        ax.scatter(*x[:n, :2].T, s=dot, alpha=0.4, linewidths=0, **style)
        ax.set(xlabel="x[0]", ylabel="x[1]", xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    ax.label_outer()


def over_training(run: RunFiles, most: int = 4) -> Iterator[Picture]:
    """Draws samples of up to `most` snapshots side by side, the first and the newest among them, if there are two."""
    paths = numbered(run.workdir / "samples", "step_*")
    if len(paths) < 2:
        return
    chosen = [paths[i] for i in sorted(set(np.linspace(0, len(paths) - 1, most).round().astype(int)))]
    images = all(path.suffix == ".png" for path in chosen)
    snapshots = [_pixels(path) if images else as_rows(load_npz(path, "samples")["samples"]) for path in chosen]
    figure, axes = panels(1, len(chosen), 3.2, 3.5 if images else 3.2, sharex=not images, sharey=not images)
    for ax, path, snapshot in zip(axes[0], chosen, snapshots, strict=True):
        if images:
            ax.imshow(snapshot, interpolation="antialiased")
            ax.set_axis_off()
        else:
            _draw_points(ax, snapshot, snapshots[-1], min(5000, len(snapshot)), dot=3, color=MODEL)
        ax.set_title(f"step {number_of(path):,}")
    title = "Samples over training"
    yield Picture("samples_over_training", png(figure), f"{title}, EMA weights. From samples/step_*.", title)


def _pixels(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error
