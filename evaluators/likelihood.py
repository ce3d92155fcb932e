# SPDX-License-Identifier: Apache-2.0
"""`eval.enable_bpd`: the ODE's likelihood of a split, in bits/dim for images and nats for points."""

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
from evaluators import fokker_planck, quadrature
from evaluators.context import Context, Evaluator, per_example, round_up, settings_of, split, split_name
from evaluators.dequantized import Dequantizer
from task import Task

_SETTINGS = {  # what a result depends on, by eval.ode_solver
    "rk45": ("hutchinson_type", "num_probes", "rtol", "atol", "max_steps"),
    "adams": ("hutchinson_type", "num_probes", "ode_solver", "ode_steps", "ode_data_std"),
}


def log_likelihood(task: Task, size: int):
    """(params, model_state, x [b, ...], index [b], repeat [b]) -> {"logp" [b] in nats, "nfe" [b]}.

    With `eval.ode_solver=adams` also "ode_error" [b], an estimate of logp's error. The probes of an example are a
    function of seed, index and repeat alone, so that checkpoints and orders are compared on the same. logp is NaN, with
    a warning, for an example that the solver gave up on.
    """
    config = task.config.eval
    fixed = config.ode_solver == "adams"
    if fixed:
        names = "logp", "nfe", "ode_error"
        options = {"steps": config.ode_steps, "data_std": config.ode_data_std}
        solve = functools.partial(likelihood.even_grid_log_likelihood, **options)
        reason = f"with eval.ode_steps={config.ode_steps} the error is above 1 bit/dim or the state not finite"
        failure = reason, "take more steps or eval.ode_solver=rk45"
    else:
        names = "logp", "nfe"
        options = {"rtol": config.rtol, "atol": config.atol, "max_steps": config.max_steps}
        solve = functools.partial(likelihood.ode_log_likelihood, **options)
        reason = "it reached eval.max_steps or a non-finite state"
        failure = reason, "raise eval.max_steps, loosen eval.rtol/atol"
    seed, eps, kind = task.config.seed, task.config.training.smallest_time, config.hutchinson_type

    def fn(params, model_state, x, index, repeat):
        key = jax.random.PRNGKey(seed)
        keys = jax.vmap(lambda i, r: jax.random.fold_in(jax.random.fold_in(key, r), i))(index, repeat)
        probe = likelihood.probes(keys, x.shape[1:], kind, config.num_probes)
        logp, _, *rest = solve(task.sde, task.score_fn(params, model_state), x, probe, eps=eps)
        return dict(zip(names, (logp, *rest), strict=True))

    mapped = per_example(fn, size)

    def call(params, model_state, x, index, repeat):
        result = mapped(params, model_state, x, index, np.full_like(index, repeat))
        failed = ~np.isfinite(result["logp"])
        if fixed:
            failed |= result["ode_error"] > math.prod(x.shape[1:]) * math.log(2)
        if failed.any():
            count = f"{failed.sum()} of {len(x)} examples, first on number {index[failed][0]}"
            logging.warning("the likelihood ODE failed on %s: %s; %s, or train further", count, *failure)
        return result | {"logp": np.where(failed, np.nan, result["logp"])}

    return call


def result_name(kind: str, config: Any) -> str:
    """kind, and what is not the default about its data: bpd, bpd_variational, bpd_train, ..."""
    return kind + ("_variational" if config.dequantizer else "") + ("_train" if split_name(config) == "train" else "")


def bits_per_dim(task: Task, logp: np.ndarray) -> np.ndarray:
    """Any shape, nats -> bits/dim."""
    dim = math.prod(task.dataset.shape)
    flat = likelihood.bits_per_dim(jnp.asarray(logp.reshape(-1)), dim, task.inverse_scaler)
    return np.asarray(flat).reshape(logp.shape)


def evaluator(task: Task, dequantizer: Dequantizer) -> Evaluator:
    config, is_image = task.config.eval, task.dataset.is_image
    name = split_name(config)
    # a repeat differs by dequantisation noise and probe; the training split is large enough for one
    repeats = config.num_repeats if name == "test" and (is_image or config.hutchinson_type != "exact") else 1
    examples = split(task, name, limit=config.num_examples, repeats=repeats)
    log_likelihood_fn = log_likelihood(task, examples.size)
    settings = {**settings_of(config, *_SETTINGS[config.ode_solver]), **dequantizer.settings}
    density = _density(task) if not is_image and task.dataset.shape[0] <= 2 else None

    def evaluate(context: Context) -> dict[str, Any]:
        def unit(k: int) -> dict[str, np.ndarray]:
            repeat, x, index, log_q = dequantizer.batch(examples, k)
            row = log_likelihood_fn(context.params, context.model_state, x, index, repeat)
            return row | {"logp": row["logp"] - log_q}

        units = context.units("likelihood", {**examples.settings, **settings})
        rows = units.run(examples.num_units, unit, f"likelihood, {name} split")
        arrays = {key: examples.stacked(rows, key) for key in rows[0]}
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
            error = arrays["ode_error"][np.isfinite(logp)] / (
                math.prod(task.dataset.shape) * math.log(2) if is_image else 1
            )
            summary = {"mean": float(error.mean()), "max": float(error.max(initial=0))}
            result[result_name("ode_error", config)] = {**summary, "unit": "bits/dim" if is_image else "nats"}
        if is_image and config.gaussian_baseline:
            of_model = task.config.seed, name, config.num_examples  # the same images
            result["gaussian_bpd"] = evaluation.gaussian_bits_per_dim(task.dataset, task.config.data, *of_model)
        return result if density is None else result | density(context)

    return evaluate


def _density(task: Task) -> Evaluator:
    """The ODE's density on a grid and, where the data's is known, its exact NLL by quadrature; in 1-D the SDE's too."""
    config = task.config.eval
    grid, data = quadrature.density_grid(task.dataset)
    points = grid.points
    size = min(config.batch_size, round_up(len(points)))
    log_likelihood_fn = log_likelihood(task, size)
    settings = {"points": len(points), "breaks": task.dataset.breaks, "size": size}
    settings |= settings_of(config, *_SETTINGS[config.ode_solver])
    sde_density = None
    if points.shape[1] == 1:
        sde_density = _sde_density(task, points[:, 0].astype(np.float64), float(data.std()))

    def evaluate(context: Context) -> dict[str, Any]:
        def unit(k: int) -> dict[str, np.ndarray]:
            index = np.arange(k * size, min((k + 1) * size, len(points)), dtype=np.int32)
            row = log_likelihood_fn(context.params, context.model_state, points[index], index, 0)
            return {"logp": row["logp"]}

        rows = context.units("density", settings).run(math.ceil(len(points) / size), unit)
        arrays = {"x": points, "model_logp": np.concatenate([row["logp"] for row in rows]), "data": data}
        failed = int(np.sum(np.isnan(arrays["model_logp"])))
        result: dict[str, Any] = {"density": evaluation.failures(failed)} if failed else {}
        if task.dataset.log_prob is not None and not failed:
            arrays["true_logp"] = task.dataset.log_prob(points)
            result = quadrature.quadrature_nll(arrays["model_logp"], arrays["true_logp"], grid.weights, grid.thirds)
            if sde_density is not None:
                arrays["sde_logp"] = sde_logp = sde_density(context)
                of_sde = quadrature.quadrature_nll(sde_logp, arrays["true_logp"], grid.weights, grid.thirds)
                result |= {f"sde_{name}": value for name, value in of_sde.items() if name != "true_entropy"}
        context.write("density", **arrays)
        return result

    return evaluate


def _sde_density(task: Task, x: np.ndarray, data_std: float) -> Callable[[Context], np.ndarray]:
    """The log density [M], in nats, of the reverse SDE at x [M]; its score network takes the Fokker-Planck grid."""
    cells = 4000
    eps = task.config.training.smallest_time
    score = per_example(lambda params, model_state, x, t: task.score_fn(params, model_state)(x, t), round_up(cells + 1))

    def evaluate(context: Context) -> np.ndarray:
        def unit(_: int) -> dict[str, np.ndarray]:
            score_fn = functools.partial(score, context.params, context.model_state)
            options = {"eps": eps, "data_std": data_std, "cells": cells}
            return {"logp": fokker_planck.reverse_sde_log_density(task.sde, score_fn, x, **options)}

        settings = {"cells": cells, "data_std": data_std, "points": len(x)}
        return context.units("sde_density", settings).run(1, unit)[0]["logp"]

    return evaluate
