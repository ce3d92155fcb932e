# SPDX-License-Identifier: Apache-2.0
"""Draws the studies: densities, scores and trajectories of the mixture, 2-D densities, Fisher curves, samples."""

import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.image
import numpy as np

import diagnostics
import sde_lib
import task
from ode import rk45
from report import fisher_curves, run_files
from report.canvas import PALETTE, STYLE, TRUTH, panels, png
from report.sample_grids import image_grid
from reproduce.restored import restored

ORDERS = ("order1", "order2", "order3")
LABELS = {"order1": "order 1", "order2": "order 2", "order3": "order 3"}
EPS = 1e-5


@mpl.rc_context(STYLE)
def pictures(workdir: Path, name: str, runs: Sequence[Any], result: dict[str, Any], out: Path) -> Iterator[Path]:
    """Writes the pictures that the files of seed 0 allow, and yields their paths."""
    shown = {run.variant: workdir / run.folder for run in runs if run.seed == 0 and run.variant in ORDERS}
    shown = {variant: folder for variant, folder in shown.items() if (folder / "eval").exists()}
    if not shown:
        return

    def newest(name: str, eval_folder: str = "eval") -> dict[str, dict[str, np.ndarray]]:
        found = {variant: run_files.newest_npz(folder / eval_folder, name) for variant, folder in shown.items()}
        return {variant: of_run[1] for variant, of_run in found.items() if of_run}

    densities, drawn = newest("density_*.npz"), {}
    if densities and next(iter(densities.values()))["x"].shape[1] == 1:
        models = {variant: load_model(shown[variant]) for variant in densities}
        drawn["densities"] = mixture_densities(densities, models)
        drawn["trajectories"] = trajectories(models)
        drawn["lengths"] = by_length(result["summary"])
    elif densities:
        drawn["densities"] = maps(densities)
    if curves := newest("fisher_*.npz", "eval_fisher"):
        drawn["fisher"] = fisher(curves)
    if samples := newest("samples_*.npz"):
        drawn["samples"] = grids(samples)
    for kind, figure in drawn.items():
        path = out / f"{name}_{kind}.png"
        path.write_bytes(png(figure))
        yield path


def load_model(folder: Path) -> tuple[task.Task, Any]:
    """The task of a run and the score function of its newest checkpoint's EMA parameters."""
    built, params, model_state = restored(folder)
    return built, jax.jit(built.score_fn(params, model_state))


def mixture_densities(densities: dict[str, dict[str, np.ndarray]], models: dict[str, tuple[task.Task, Any]]):
    """Densities of ODE and SDE and the score at two noise levels, over the truth; one column for each order."""
    figure, axes = panels(3, len(densities), 4.2, 2.4, sharex="row", sharey="row")
    for column, (variant, arrays) in enumerate(densities.items()):
        x, color = arrays["x"][:, 0], PALETTE[column]
        top = axes[0, column]
        top.fill_between(x, np.exp(arrays["true_logp"]), color=TRUTH, alpha=0.5, lw=0, label="truth")
        top.plot(x, np.exp(arrays["model_logp"]), color=color, lw=1.4, label="ODE")
        if "sde_logp" in arrays:
            top.plot(x, np.exp(arrays["sde_logp"]), color="black", lw=1, ls="--", label="SDE")
        top.set(title=LABELS[variant], xlim=(-1.3, 1.3))
        top.legend(loc="upper right")
        built, score_fn = models[variant]
        truth = diagnostics.gaussian_mixture_score(built.sde, *(built.dataset.mixture or ()))
        for row, sigma in ((1, 0.05), (2, 0.5)):
            grid = jnp.linspace(-1.5, 1.5, 601)[:, None]
            times = built.sde.time_at_log_snr(jnp.full(len(grid), -2 * math.log(sigma)))
            axes[row, column].plot(grid, truth(grid, times), color=TRUTH, lw=3, alpha=0.7, label="truth")
            axes[row, column].plot(grid, score_fn(grid, times), color=color, lw=1.4, label="model")
            axes[row, column].set(ylabel=rf"score at $\sigma/\alpha$ = {sigma}" if column == 0 else "", xlabel="x")
    axes[0, 0].set_ylabel("density")
    return figure


def trajectories(models: dict[str, tuple[task.Task, Any]], paths: int = 24, knots: int = 80):
    """Paths over the exact marginal densities: the forward SDE, then each order's ODE from data and from the prior."""
    built = next(iter(models.values()))[0]
    sde, mixture = built.sde, built.dataset.mixture
    assert mixture is not None, "a mixture of Gaussians has one"
    data_std = float(np.sqrt(np.sum(mixture[0] * (mixture[1][:, 0] ** 2 + mixture[2][:, 0]))))
    start, end = sde.log_snr_range(EPS, jnp.float32)
    times = jnp.clip(sde.time_at_log_snr(jnp.linspace(start, end, knots)), EPS, sde.T)
    at = np.asarray(jnp.linspace(start, end, knots))
    x0 = jnp.asarray(built.dataset.test[np.arange(paths)])
    prior = sde.prior_sampling(jax.random.PRNGKey(1), (paths, 1))
    figure, axes = panels(2, 1 + len(models), 3.6, 2.6, sharex=True, sharey=True)
    _draw_paths(axes[0, 0], sde, mixture, at, times, forward_sde(sde, x0, times), data_std, "forward SDE")
    axes[1, 0].set_axis_off()
    for column, (variant, (_, score_fn)) in enumerate(models.items(), 1):
        from_data = ode_paths(sde, score_fn, x0, times)
        from_prior = ode_paths(sde, score_fn, prior, times[::-1])[::-1]
        _draw_paths(axes[0, column], sde, mixture, at, times, from_data, data_std, f"{LABELS[variant]}: ODE from data")
        _draw_paths(axes[1, column], sde, mixture, at, times, from_prior, data_std, "ODE from the prior")
    return figure


def _draw_paths(ax, sde, mixture, at, times, paths, data_std, title) -> None:
    w = np.linspace(-2.5, 2.5, 200)
    size = np.hypot(sde.alpha(times) * data_std, sde.sigma(times))  # standard deviation of x_t
    ax.pcolormesh(
        at, w, marginal(sde, mixture, times, w, size), cmap="Greys", vmax=1.2, shading="nearest", rasterized=True
    )
    ax.plot(at, np.asarray(paths)[:, :, 0] / size[:, None], lw=0.7, color=PALETTE[0], alpha=0.8)
    ax.set(title=title, ylim=(-2.5, 2.5), xlabel="log-SNR", ylabel="x / std of x")
    ax.set_xlim(at[0], at[-1])
    ax.grid(False)
    ax.label_outer()


def marginal(sde, mixture, times, w: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Density of w = x_t / size, [w, times]."""
    weights, means, variances = (np.asarray(a, np.float64).reshape(-1, 1, 1) for a in mixture)
    alpha, sigma = (np.asarray(f(times), np.float64) for f in (sde.alpha, sde.sigma))
    mean, variance = alpha * means / size, (alpha**2 * variances + sigma**2) / size**2
    return np.sum(weights * np.exp(-0.5 * (w[:, None] - mean) ** 2 / variance) / np.sqrt(2 * np.pi * variance), axis=0)


def forward_sde(sde: sde_lib.SDE, x0: jax.Array, times: jax.Array) -> jax.Array:
    """x at the times [K, B, 1], by exact transitions from x0 [B, 1]."""
    alpha, sigma = sde.alpha(times), sde.sigma(times)
    ratio = alpha[1:] / alpha[:-1]
    std = jnp.sqrt(jnp.maximum(sigma[1:] ** 2 - (ratio * sigma[:-1]) ** 2, 0))
    z = jax.random.normal(jax.random.PRNGKey(0), (len(times), *x0.shape))

    def step(x, k):
        x = ratio[k] * x + std[k] * z[k + 1]
        return x, x

    first = alpha[0] * x0 + sigma[0] * z[0]
    _, rest = jax.lax.scan(step, first, jnp.arange(len(times) - 1))
    return jnp.concatenate([first[None], rest])


def ode_paths(sde: sde_lib.SDE, score_fn: Any, x: jax.Array, times: jax.Array) -> jax.Array:
    """x at the times [K, B, 1] along the probability flow ODE from x at the first."""

    def interval(x, span):
        x, _ = rk45(lambda t, x: sde.probability_flow(x, t, score_fn(x, t)), x, *span, rtol=1e-5, atol=1e-5)
        return x, x

    _, rest = jax.lax.scan(interval, x, (times[:-1], times[1:]))
    return jnp.concatenate([x[None], rest])


def by_length(summary: Sequence[dict[str, Any]]):
    """KL(data || model) of ODE and SDE over the steps of training, mean over seeds with its standard error."""
    figure, axes = panels(1, 2, 4.2, 3.0, sharey=True)
    for ax, (metric, title) in zip(axes[0], (("kl", "ODE"), ("sde_kl", "SDE")), strict=True):
        for variant, color in zip(ORDERS, PALETTE, strict=False):
            rows = [row for row in summary if row["variant"] == variant and metric in row]
            if rows:
                values = [row[metric] for row in rows]
                errors = [value["stderr"] or 0 for value in values]
                label = f"{LABELS[variant]} ({values[-1]['n']} seeds)"
                means = [value["mean"] for value in values]
                ax.errorbar(
                    [row["step"] for row in rows], means, errors, marker="o", capsize=3, color=color, label=label
                )
        ax.set(title=f"{title}: KL(data || model)", xlabel="training step", yscale="log")
    axes[0, 0].set_ylabel("nats")
    axes[0, 0].legend()
    return figure


def maps(densities: dict[str, dict[str, np.ndarray]]):
    """2-D densities of the ODE beside the truth or the data's histogram, on one scale."""
    first = next(iter(densities.values()))
    n = math.isqrt(len(first["x"]))
    grid = first["x"][::n, 0], first["x"][:n, 1]
    if "true_logp" in first:
        truth, *edges = np.exp(first["true_logp"]).reshape(n, n), *grid
    else:
        box = [axis[[0, -1]] for axis in grid]
        truth, *edges = np.histogram2d(*first["data"].T, bins=50, range=box, density=True)
    top = 1.3 * np.max(truth) if "true_logp" in first else float(np.quantile(truth[truth > 0], 0.98))
    figure, axes = panels(1, 1 + len(densities), 2.8, 3.0)
    models = {LABELS[v]: (*grid, np.exp(a["model_logp"]).reshape(n, n)) for v, a in densities.items()}
    for ax, (title, (*places, image)) in zip(axes[0], ({"data": (*edges, truth)} | models).items(), strict=True):
        ax.pcolormesh(*places, image.T, vmin=0, vmax=top, cmap="viridis")
        ax.set(title=title, aspect="equal")
        ax.grid(False)
    return figure


def fisher(curves: dict[str, dict[str, np.ndarray]]):
    """Distances of the model's score from that of its ODE's density, and of both from the truth if known, by order."""
    known = "score_true" in next(iter(curves.values()))
    names = ("score_ode", "score_true", "ode_true") if known else ("score_ode", "divergence_normal")
    figure, axes = panels(1, len(names), 4.2, 3.2)
    for ax, name in zip(axes[0], names, strict=True):
        for (variant, arrays), color in zip(curves.items(), PALETTE, strict=False):
            mean, stderr = arrays[name], arrays[f"{name}_stderr"]
            ax.plot(arrays["times"], mean, color=color, lw=1.5, label=LABELS[variant])
            ax.fill_between(arrays["times"], mean - stderr, mean + stderr, color=color, alpha=0.2, lw=0)
        ax.set(title={**fisher_curves.SCORES, **fisher_curves.DIVERGENCES}[name], xlabel="t", yscale="log")
    axes[0, 0].set_ylabel("g² × squared distance (nats / time)")
    axes[0, 0].legend()
    return figure


def grids(samples: dict[str, dict[str, np.ndarray]], side: int = 8):
    """The first samples of each order, from the same noise."""
    figure, axes = panels(1, len(samples), 3.2, 3.4)
    for ax, (variant, arrays) in zip(axes[0], samples.items(), strict=True):
        grid = mpl.image.imread(io.BytesIO(image_grid(arrays["samples"][: side * side], side)))
        ax.imshow(grid, cmap="gray")
        ax.set(title=LABELS[variant])
        ax.set_axis_off()
    return figure
