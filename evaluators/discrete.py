# SPDX-License-Identifier: Apache-2.0
"""`eval.discrete_bound`, `eval.ledger`: bits/dim of the discrete images themselves, by every way that there is."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import datasets
import evaluation
import likelihood
from evaluators.context import (
    Context,
    Evaluator,
    Split,
    fold_in_each,
    of_split,
    per_example,
    settings_of,
    split,
    split_name,
)
from evaluators.dequantized import Dequantizer, name_of, truncated_normal, uniform
from evaluators.likelihood import SOLVER_SETTINGS, bits_per_dim, log_likelihood, log_mean
from task import Task

IMPORTANCE_SAMPLES = (1, 5, 20)  # of the ledger's rows
_BOUND_SETTINGS = ("bound_importance_weighting", "bound_num_times")
_BOUND_KEY = 3  # apart from the other uses of the seed


def _parts_of(task: Task, examples: Split) -> Callable[[Context, int], dict[str, np.ndarray]]:
    """(context, unit) -> the parts [b] of `likelihood.discrete_bound`, in bits/dim, of the unit's images."""
    config, levels = task.config, task.dataset.levels
    scaler = datasets.get_data_scaler(config.data.centered)
    seed = jax.random.fold_in(jax.random.PRNGKey(config.seed), _BOUND_KEY)
    per_dim = math.prod(task.dataset.shape) * math.log(2)

    def fn(params, model_state, image01, index, repeat):
        bound = likelihood.discrete_bound(
            task.sde,
            task.score_fn(params, model_state),
            scaler(image01),
            scaler(jnp.arange(levels) / (levels - 1)),
            fold_in_each(seed, repeat, index),
            eps=config.training.smallest_time,
            num_time_samples=config.eval.bound_num_times,
            importance_weighting=config.eval.bound_importance_weighting,
        )
        return {name: value / per_dim for name, value in bound._asdict().items()}

    mapped = per_example(fn, examples.size)

    def parts(context: Context, unit: int) -> dict[str, np.ndarray]:
        repeat, image, index = examples.batch(unit, dequantize=False, scale=False)
        return mapped(context.params, context.model_state, image, index, np.full_like(index, repeat))

    return parts


def _with_parts(parts: dict[str, np.ndarray]) -> dict[str, Any]:
    """The bound's mean and standard error, and the means of its parts, in bits/dim."""
    value = evaluation.mean_and_stderr(np.sum(list(parts.values()), axis=0))
    return {**value, "unit": "bits/dim", "parts": {name: float(part.mean()) for name, part in parts.items()}}


def bound_evaluator(task: Task, dequantizer: Dequantizer) -> Evaluator:
    """The SDE's bound on -log2 P(image), which needs no dequantisation, so `dequantizer` has no part in it."""
    config = task.config.eval
    repeats = config.num_repeats if split_name(config) == "test" else 1
    examples = split(task, split_name(config), limit=config.num_examples, repeats=repeats)
    parts_of, settings = _parts_of(task, examples), settings_of(config, *_BOUND_SETTINGS)
    name = of_split("discrete_bound", config)

    def evaluate(context: Context) -> dict[str, Any]:
        parts = examples.run(context, "discrete_bound", settings, lambda k: parts_of(context, k))
        context.write(name, **parts)
        return {name: {**_with_parts(parts), "settings": settings}}

    return evaluate


def ledger_evaluator(task: Task, dequantizer: Dequantizer) -> Evaluator:
    """Bits/dim of the same images by every dequantisation, at 1, 5 and 20 importance samples, and by the SDE's bound.

    Uniform and truncated normal noise are made of the same numbers, and the probes of the ODE are the same in all
    rows. Two repeats or more tell what noise and probes add to a standard error. With
    `eval.dequantization=variational` there are its rows, too.
    """
    config = task.config.eval
    repeats = max(2, config.num_repeats)
    examples = split(task, split_name(config), limit=config.num_examples, repeats=repeats)
    dequantizers = {"uniform": uniform(), "truncated_normal": truncated_normal(task)}
    if name_of(config) == "variational":
        dequantizers["variational"] = dequantizer
    log_likelihood_fn, parts_of = log_likelihood(task, examples.size), _parts_of(task, examples)
    settings = settings_of(config, *SOLVER_SETTINGS[config.ode_solver], *_BOUND_SETTINGS)
    settings |= {"repeats": repeats, "variational": dequantizer.settings if "variational" in dequantizers else {}}

    def evaluate(context: Context) -> dict[str, Any]:
        def log_ratio(of: Dequantizer, k: int, draw: int) -> np.ndarray:
            repeat, x, index, log_q = of.batch(examples, k, draw)
            return log_likelihood_fn(context.params, context.model_state, x, index, repeat)["logp"] - log_q

        def unit(k: int) -> dict[str, np.ndarray]:
            rows = {}
            for name, of in dequantizers.items():
                ratios = np.stack([log_ratio(of, k, draw) for draw in range(IMPORTANCE_SAMPLES[-1])])
                for count in IMPORTANCE_SAMPLES:
                    rows[f"{name}_{count}"] = bits_per_dim(task, log_mean(ratios[:count]))
            return {**rows, **parts_of(context, k)}

        arrays = examples.run(context, "ledger", settings, unit)
        parts = {name: arrays.pop(name) for name in likelihood.DiscreteBound._fields}
        arrays["discrete_bound"] = np.sum(list(parts.values()), axis=0)
        context.write(of_split("ledger", config), **arrays)
        first, *others = arrays
        rows = {name: {**evaluation.mean_and_stderr(values), "unit": "bits/dim"} for name, values in arrays.items()}
        rows["discrete_bound"] = _with_parts(parts)
        differences = {name: evaluation.mean_and_stderr(arrays[name] - arrays[first]) for name in others}
        ledger, minus = of_split("ledger", config), of_split(f"ledger_minus_{first}", config)
        return {ledger: {**rows, "settings": settings}, minus: differences}

    return evaluate
