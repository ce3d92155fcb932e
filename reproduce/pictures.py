# SPDX-License-Identifier: Apache-2.0
"""Draws the studies: densities, scores and trajectories of the mixture, 2-D densities, Fisher curves, samples."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import diagnostics
import sde_lib
import task
from ode import rk45
from report import run_curves, run_files
from report.canvas import PALETTE, TRUTH, panels, png
from report.sample_grids import tiles

LABELS = {"order1": "order 1", "order2": "order 2", "order3": "order 3"}  # variants that are drawn: label
EPS = 1e-5

Arrays = Mapping[str, Mapping[str, np.ndarray]]  # variant: arrays of its evaluation
Models = Mapping[str, tuple[task.Task, Any]]  # variant: task and score function


def pictures(workdir: Path, name: str, runs: Sequence[Any], result: dict[str, Any], out: Path) -> Iterator[Path]:
    """Writes the pictures that the files of seed 0 allow, and yields their paths."""
    shown = {run.variant: workdir / run.folder for run in runs if run.seed == 0 and run.variant in LABELS}

    def newest(pattern: str, eval_folder: str = "eval") -> dict[str, dict[str, np.ndarray]]:
        found = {variant: run_files.newest_npz(folder / eval_folder, pattern) for variant, folder in shown.items()}
        return {variant: of_run[1] for variant, of_run in found.items() if of_run}

    densities, drawn = newest("density_*.npz"), {}
    if densities and next(iter(densities.values()))["x"].shape[1] == 1:
        models = {}
        for variant in densities:
            built, params, model_state = task.restored(shown[variant])
            models[variant] = built, jax.jit(built.score_fn(params, model_state))
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


def mixture_densities(densities: Arrays, models: Models) -> Figure:
    """Draws densities of ODE and SDE and the score at two noise levels over the truth, a column for each order."""
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
        grid = jnp.linspace(-1.5, 1.5, 601)[:, None]
        for ax, sigma in zip(axes[1:, column], (0.05, 0.5), strict=True):
            times = built.sde.time_at_log_snr(jnp.full(len(grid), -2 * math.log(sigma)))
            ax.plot(grid, truth(grid, times), color=TRUTH, lw=3, alpha=0.7, label="truth")
            ax.plot(grid, score_fn(grid, times), color=color, lw=1.4, label="model")
            ax.set(ylabel=rf"score at $\sigma/\alpha$ = {sigma}" if column == 0 else "", xlabel="x")
    axes[0, 0].set_ylabel("density")
    return figure


def trajectories(models: Models, paths: int = 24, knots: int = 80) -> Figure:
    """Draws paths over the exact marginals: of the forward SDE, of each order's ODE from data and from the prior."""
    built = next(iter(models.values()))[0]
    sde, mixture = built.sde, built.dataset.mixture
    assert mixture is not None, "a mixture of Gaussians has one"
    log_snr = jnp.linspace(*sde.log_snr_range(EPS, jnp.float32), knots)
    times = jnp.clip(sde.time_at_log_snr(log_snr), EPS, sde.T)
    x0 = jnp.asarray(built.dataset.test[np.arange(paths)])
    prior = sde.prior_sampling(jax.random.PRNGKey(1), (paths, 1))
    figure, axes = panels(2, 1 + len(models), 3.6, 2.6, sharex=True, sharey=True)
    axes[1, 0].set_axis_off()
    drawn = [(axes[0, 0], "forward SDE", forward_sde(sde, x0, times))]
    for (variant, (_, score_fn)), (top, bottom) in zip(models.items(), axes.T[1:], strict=True):
        drawn.append((top, f"{LABELS[variant]}: ODE from data", ode_paths(sde, score_fn, x0, times)))
        drawn.append((bottom, "ODE from the prior", ode_paths(sde, score_fn, prior, times[::-1])[::-1]))
    data_std = np.sqrt(np.sum(mixture[0] * (mixture[1][:, 0] ** 2 + mixture[2][:, 0])))
    size = np.hypot(sde.alpha(times) * data_std, sde.sigma(times))  # standard deviation of x_t
    w = np.linspace(-2.5, 2.5, 200)
    density = marginal(sde, mixture, times, w, size)
    for ax, title, x in drawn:
        ax.pcolormesh(log_snr, w, density, cmap="Greys", vmax=1.2, shading="nearest", rasterized=True)
        ax.plot(log_snr, x[:, :, 0] / size[:, None], lw=0.7, color=PALETTE[0], alpha=0.8)
        ax.set(title=title, xlim=(log_snr[0], log_snr[-1]), ylim=(-2.5, 2.5), xlabel="log-SNR", ylabel="x / std of x")
        ax.grid(False)
        ax.label_outer()
    return figure


def marginal(sde: sde_lib.SDE, mixture: Any, times: jax.Array, w: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Returns the density of w = x_t / size, [w, times]."""
    weights, means, variances = (np.asarray(a, np.float64).reshape(-1, 1, 1) for a in mixture)
    alpha, sigma = (np.asarray(f(times), np.float64) for f in (sde.alpha, sde.sigma))
    mean, variance = alpha * means / size, (alpha**2 * variances + sigma**2) / size**2
    return np.sum(weights * np.exp(-0.5 * (w[:, None] - mean) ** 2 / variance) / np.sqrt(2 * np.pi * variance), axis=0)


def forward_sde(sde: sde_lib.SDE, x0: jax.Array, times: jax.Array) -> jax.Array:
    """Returns x at the times [K, B, 1] of the SDE from x0 [B, 1]."""
    alpha = sde.alpha(times)[:, None, None]
    variance = (sde.sigma(times) / sde.alpha(times)) ** 2  # x / alpha is x0 plus a Brownian motion in this time
    step = jnp.sqrt(jnp.maximum(jnp.diff(variance, prepend=0), 0))[:, None, None]
    z = jax.random.normal(jax.random.PRNGKey(0), (len(times), *x0.shape))
    return alpha * (x0 + jnp.cumsum(step * z, axis=0))


def ode_paths(sde: sde_lib.SDE, score_fn: Any, x: jax.Array, times: jax.Array) -> jax.Array:
    """Returns x at the times [K, B, 1] along the probability flow ODE from x at the first."""

    def interval(x, span):
        x, _ = rk45(lambda t, x: sde.probability_flow(x, t, score_fn(x, t)), x, *span, rtol=1e-5, atol=1e-5)
        return x, x

    _, rest = jax.lax.scan(interval, x, (times[:-1], times[1:]))
    return jnp.concatenate([x[None], rest])


def by_length(summary: Sequence[dict[str, Any]]) -> Figure:
    """Draws KL(data || model) of ODE and SDE over the steps of training, mean over seeds with its standard error."""
    figure, axes = panels(1, 2, 4.2, 3.0, sharey=True)
    for ax, (metric, title) in zip(axes[0], (("kl", "ODE"), ("sde_kl", "SDE")), strict=True):
        for (variant, label), color in zip(LABELS.items(), PALETTE, strict=False):
            if rows := [row for row in summary if row["variant"] == variant and metric in row]:
                points = [(row["step"], row[metric]["mean"], row[metric]["stderr"] or 0) for row in rows]
                label += f" ({rows[-1][metric]['n']} seeds)"
                ax.errorbar(*zip(*points, strict=True), marker="o", capsize=3, color=color, label=label)
        ax.set(title=f"{title}: KL(data || model)", xlabel="training step", yscale="log")
    axes[0, 0].set_ylabel("nats")
    axes[0, 0].legend()
    return figure


def maps(densities: Arrays) -> Figure:
    """Draws 2-D densities of the ODE beside the truth or the data's histogram, on one scale."""
    first = next(iter(densities.values()))
    if "true_logp" in first:
        data = run_curves.on_grid(first["x"], first["true_logp"])
        top = 1.3 * np.max(data[-1])
    else:
        data = run_curves.histogram_2d(first["x"], first["data"], 50)
        top = float(np.quantile(data[-1][data[-1] > 0], 0.98))
    figure, axes = panels(1, 1 + len(densities), 2.8, 3.0)
    models = {LABELS[v]: run_curves.on_grid(arrays["x"], arrays["model_logp"]) for v, arrays in densities.items()}
    run_curves.draw_maps(axes[0], {"data": data} | models, top)
    return figure


def fisher(curves: Arrays) -> Figure:
    """Draws the distances of the model's score from that of its ODE's density, and of both from the truth if known."""
    known = "score_true" in next(iter(curves.values()))
    names = ("score_ode", "score_true", "ode_true") if known else ("score_ode", "divergence_normal")
    figure, axes = panels(1, len(names), 4.2, 3.2)
    for ax, name in zip(axes[0], names, strict=True):
        for (variant, arrays), color in zip(curves.items(), PALETTE, strict=False):
            run_curves.draw_curve(ax, arrays, name, color, lw=1.5, label=LABELS[variant])
        ax.set(title=(run_curves.SCORES | run_curves.DIVERGENCES)[name], xlabel="t", yscale="log")
    axes[0, 0].set_ylabel("g² × squared distance (nats / time)")
    axes[0, 0].legend()
    return figure


def grids(samples: Arrays) -> Figure:
    """Draws the first 64 samples of each variant, from the same noise."""
    figure, axes = panels(1, len(samples), 3.2, 3.4)
    for ax, (variant, arrays) in zip(axes[0], samples.items(), strict=True):
        ax.imshow(tiles(arrays["samples"][:64], 8), cmap="gray")
        ax.set_title(LABELS.get(variant, variant))
        ax.set_axis_off()
    return figure
