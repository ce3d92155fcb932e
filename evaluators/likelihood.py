# SPDX-License-Identifier: Apache-2.0
"""`eval.enable_bpd`, `eval.bound`: likelihoods of a split by ODE and SDE, in bits/dim of images and nats of points."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

import evaluation
import likelihood
from evaluators.baselines import baselines
from evaluators.context import (
    Context,
    Evaluator,
    fold_in_each,
    of_split,
    per_example,
    round_up,
    settings_of,
    split,
    split_name,
)
from evaluators.density import density_grid, quadrature_nll, reverse_sde_log_density
from evaluators.dequantized import Dequantizer, name_of
from task import Task

SOLVER_SETTINGS = {  # the keys that a result depends on, by eval.ode_solver
    "rk45": ("hutchinson_type", "num_probes", "rtol", "atol", "max_steps"),
    "adams": ("hutchinson_type", "num_probes", "ode_solver", "ode_steps", "ode_data_std"),
}
_BOUND_SETTINGS = ("dsm", "offset", "bound_importance_weighting", "bound_num_times", "hutchinson_type")
_BOUND_KEY = 1  # apart from the probes of the ODE's likelihood


def log_likelihood(task: Task, size: int):
    """(params, model_state, x [b, ...], index [b], repeat [b]) -> {"logp" [b] in nats, "nfe" [b]}.

    With `eval.ode_solver=adams` also "ode_error" [b], an estimate of logp's error. The probes of an example are a
    function of seed, index and repeat alone, so checkpoints and orders are compared on the same ones. If the solver
    gives up on an example its logp is NaN, and a warning says so.
    """
    config, key = task.config.eval, jax.random.PRNGKey(task.config.seed)
    if config.ode_solver == "adams":
        options = {"steps": config.ode_steps, "data_std": config.ode_data_std}
        solve = functools.partial(likelihood.even_grid_log_likelihood, **options)
        reason = f"with eval.ode_steps={config.ode_steps} the error is above 1 bit/dim or the state not finite"
        remedy = "take more steps or eval.ode_solver=rk45"
    else:
        options = settings_of(config, "rtol", "atol", "max_steps")
        solve = functools.partial(likelihood.ode_log_likelihood, **options)
        reason = "it reached eval.max_steps or a non-finite state"
        remedy = "raise eval.max_steps, loosen eval.rtol/atol"

    def fn(params, model_state, x, index, repeat):
        keys = fold_in_each(key, repeat, index)
        probe = likelihood.probes(keys, x.shape[1:], config.hutchinson_type, config.num_probes)
        eps = task.config.training.smallest_time
        logp, _, *rest = solve(task.sde, task.score_fn(params, model_state), x, probe, eps=eps)
        return {"logp": logp, **dict(zip(("nfe", "ode_error"), rest, strict=False))}

    mapped = per_example(fn, size)

    def call(params, model_state, x, index, repeat):
        result = mapped(params, model_state, x, index, np.full_like(index, repeat))
        failed = ~np.isfinite(result["logp"])
        if "ode_error" in result:
            failed |= result["ode_error"] > math.prod(x.shape[1:]) * math.log(2)
        if failed.any():
            count = f"{failed.sum()} of {len(x)} examples, first on number {index[failed][0]}"
            logging.warning("the likelihood ODE failed on %s: %s; %s, or train further", count, reason, remedy)
        return result | {"logp": np.where(failed, np.nan, result["logp"])}

    return call


def result_name(kind: str, config: Any) -> str:
    """`kind` with what is not the default about its data: bpd, bpd_variational, bpd_train, ..."""
    return of_split(kind + ("_variational" if name_of(config) == "variational" else ""), config)


def bits_per_dim(task: Task, logp: np.ndarray) -> np.ndarray:
    """Bits/dim of log densities in nats, of any shape."""
    flat = jnp.asarray(logp.reshape(-1))
    dataset = task.dataset
    bpd = likelihood.bits_per_dim(flat, math.prod(dataset.shape), task.inverse_scaler, dataset.levels)
    return np.asarray(bpd).reshape(logp.shape)


def evaluator(task: Task, dequantizer: Dequantizer) -> Evaluator:
    config, is_image = task.config.eval, task.dataset.is_image
    name = split_name(config)
    # Repeats differ by dequantisation noise and probe. The training split is large enough for one.
    repeats = config.num_repeats if name == "test" and (is_image or config.hutchinson_type != "exact") else 1
    examples = split(task, name, limit=config.num_examples, repeats=repeats)
    log_likelihood_fn = log_likelihood(task, examples.size)
    settings = {**settings_of(config, *SOLVER_SETTINGS[config.ode_solver]), **dequantizer.settings}
    if config.importance_samples > 1:
        settings["importance_samples"] = config.importance_samples
    of_images = baselines(task.dataset, name, config.num_examples) if is_image else {}
    density = _density(task) if not is_image and task.dataset.shape[0] <= 2 else None

    def evaluate(context: Context) -> dict[str, Any]:
        def unit(k: int) -> dict[str, np.ndarray]:
            rows = []
            for draw in range(config.importance_samples):
                repeat, x, index, log_q = dequantizer.batch(examples, k, draw)
                row = log_likelihood_fn(context.params, context.model_state, x, index, repeat)
                rows.append(row | {"logp": row["logp"] - log_q})
            draws = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            result = {"logp": log_mean(draws["logp"]), "nfe": draws["nfe"].sum(axis=0)}
            return result | ({"ode_error": draws["ode_error"].max(axis=0)} if "ode_error" in draws else {})

        arrays = examples.run(context, "likelihood", settings, unit)
        logp, nfe = arrays["logp"], arrays["nfe"]
        if is_image:
            arrays["bpd"] = bits_per_dim(task, logp)
            value = evaluation.mean_and_stderr(arrays["bpd"])
        else:
            value = {**evaluation.mean_and_stderr(-logp), "unit": "nats"}
        context.write(result_name("bpd", config), **arrays)
        result: dict[str, Any] = {
            result_name("bpd" if is_image else "nll", config): {**value, "settings": settings},
            result_name("nfe", config): {"min": int(nfe.min()), "mean": float(nfe.mean()), "max": int(nfe.max())},
        }
        if "ode_error" in arrays:
            unit_size = math.prod(task.dataset.shape) * math.log(2) if is_image else 1  # in nats
            error = arrays["ode_error"][np.isfinite(logp)] / unit_size
            summary = {"mean": float(error.mean()), "max": float(error.max(initial=0))}
            result[result_name("ode_error", config)] = {**summary, "unit": "bits/dim" if is_image else "nats"}
        if is_image:
            result["baselines"] = of_images
            if value["mean"] > of_images["histogram"]:
                bpd, histogram = value["mean"], of_images["histogram"]
                text = f"{bpd:.3f} bits/dim are more than a histogram of each pixel takes, {histogram:.3f}"
                logging.warning("%s: train further, or look at the data", text)
                result["note"] = text
        elif task.dataset.log_prob is not None:
            x = getattr(task.dataset, name)[np.arange(logp.shape[1])]
            excess = task.dataset.log_prob(x.astype(np.float64)) - logp
            result[result_name("kl_of_examples", config)] = {**evaluation.mean_and_stderr(excess), "unit": "nats"}
        if is_image and config.gaussian_baseline:
            same_images = task.config.seed, name, config.num_examples
            result["gaussian_bpd"] = evaluation.gaussian_bits_per_dim(task.dataset, task.config.data, *same_images)
        return result if density is None else result | density(context)

    return evaluate


def log_mean(logp: np.ndarray) -> np.ndarray:
    """log of the mean of exp(logp [K, b]) over the K importance samples; NaN where one of them failed."""
    most = logp.max(axis=0).astype(np.float64)
    return (most + np.log(np.mean(np.exp(logp - most), axis=0))).astype(logp.dtype)


def bound_evaluator(task: Task, dequantizer: Dequantizer) -> Evaluator:
    """`eval.bound`: the variational bound on the likelihood of the reverse SDE, on the same data."""
    config, is_image = task.config.eval, task.dataset.is_image
    split_of, name = split_name(config), result_name("bound", config)
    repeats = config.num_repeats if split_of == "test" else 1
    examples = split(task, split_of, limit=config.num_examples, repeats=repeats)
    settings = {**settings_of(config, *_BOUND_SETTINGS), **dequantizer.settings}
    seed = jax.random.fold_in(jax.random.PRNGKey(task.config.seed), _BOUND_KEY)

    def bound_of(params, model_state, x, index, repeat):
        return likelihood.likelihood_bound(
            task.sde,
            task.score_fn(params, model_state),
            x,
            fold_in_each(seed, repeat, index),
            eps=task.config.training.smallest_time,
            num_time_samples=config.bound_num_times,
            importance_weighting=config.bound_importance_weighting,
            denoising=config.dsm,
            offset=config.offset and not dequantizer.at_start,
            hutchinson_type=config.hutchinson_type,
        )

    bound_fn = per_example(bound_of, examples.size)

    def evaluate(context: Context) -> dict[str, Any]:
        def unit(k: int) -> dict[str, np.ndarray]:
            repeat, x, index, log_q = dequantizer.batch(examples, k, 0)
            bound = bound_fn(context.params, context.model_state, x, index, np.full_like(index, repeat))
            return {"bound": bound - log_q}

        arrays = examples.run(context, "bound", settings, unit)
        if is_image:
            arrays["bpd"] = bits_per_dim(task, arrays["bound"])
        context.write(name, **arrays)
        value = evaluation.mean_and_stderr(arrays["bpd"] if is_image else -arrays["bound"])
        return {name: {**value, "unit": "bits/dim" if is_image else "nats", "settings": settings}}

    return evaluate


def _density(task: Task) -> Evaluator:
    """The ODE's density on a grid and, if the data's is known, its exact NLL by quadrature; in 1-D the SDE's too."""
    config = task.config.eval
    grid, data = density_grid(task.dataset)
    points = grid.points
    size = min(config.batch_size, round_up(len(points)))
    log_likelihood_fn = log_likelihood(task, size)
    of_solver = settings_of(config, *SOLVER_SETTINGS[config.ode_solver])
    settings = {"points": len(points), "breaks": task.dataset.breaks, "size": size, **of_solver}
    sde_density = _sde_density(task, points[:, 0], float(data.std())) if points.shape[1] == 1 else None

    def evaluate(context: Context) -> dict[str, Any]:
        def unit(k: int) -> dict[str, np.ndarray]:
            index = np.arange(k * size, min((k + 1) * size, len(points)), dtype=np.int32)
            row = log_likelihood_fn(context.params, context.model_state, points[index], index, 0)
            return {"logp": row["logp"]}

        rows = context.run("density", settings, math.ceil(len(points) / size), unit)
        arrays = {"x": points, "model_logp": np.concatenate([row["logp"] for row in rows]), "data": data}
        failed = int(np.sum(np.isnan(arrays["model_logp"])))
        result: dict[str, Any] = {"density": evaluation.failures(failed)} if failed else {}
        if task.dataset.log_prob is not None and not failed:
            arrays["true_logp"] = task.dataset.log_prob(points)
            result = quadrature_nll(arrays["model_logp"], arrays["true_logp"], grid.weights, grid.thirds)
            if sde_density is not None:
                arrays["sde_logp"] = sde_logp = sde_density(context)
                of_sde = quadrature_nll(sde_logp, arrays["true_logp"], grid.weights, grid.thirds)
                result |= {f"sde_{name}": value for name, value in of_sde.items() if name != "true_entropy"}
        context.write("density", **arrays)
        return result

    return evaluate


def _sde_density(task: Task, x: np.ndarray, data_std: float) -> Callable[[Context], np.ndarray]:
    """The log density [M], in nats, of the reverse SDE at x [M]. One batch of the network is the Fokker-Planck grid."""
    cells = 4000
    options = {"eps": task.config.training.smallest_time, "data_std": data_std, "cells": cells}
    score = per_example(lambda params, model_state, x, t: task.score_fn(params, model_state)(x, t), round_up(cells + 1))

    def evaluate(context: Context) -> np.ndarray:
        def unit(_: int) -> dict[str, np.ndarray]:
            score_fn = functools.partial(score, context.params, context.model_state)
            logp = reverse_sde_log_density(task.sde, score_fn, x.astype(np.float64), **options)
            return {"logp": logp}

        settings = {"cells": cells, "data_std": data_std, "points": len(x)}
        return context.run("sde_density", settings, 1, unit)[0]["logp"]

    return evaluate
