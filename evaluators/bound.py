# SPDX-License-Identifier: Apache-2.0
"""`eval.bound`: the variational bound on the likelihood of the reverse SDE, on the data of `eval.enable_bpd`."""

from typing import Any

import jax
import numpy as np

import evaluation
import likelihood
from evaluators.context import Context, Evaluator, fold_in_each, per_example, settings_of, split, split_name
from evaluators.dequantized import Dequantizer
from evaluators.likelihood import bits_per_dim, result_name
from task import Task

_SETTINGS = ("dsm", "offset", "bound_importance_weighting", "bound_num_times", "hutchinson_type")
_BOUND_KEY = 1  # apart from the probes of the ODE's likelihood


def evaluator(task: Task, dequantizer: Dequantizer) -> Evaluator:
    config, is_image = task.config.eval, task.dataset.is_image
    split_of, name = split_name(config), result_name("bound", config)
    repeats = config.num_repeats if split_of == "test" else 1
    examples = split(task, split_of, limit=config.num_examples, repeats=repeats)
    settings = {**settings_of(config, *_SETTINGS), **dequantizer.settings}
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
            offset=config.offset,
            hutchinson_type=config.hutchinson_type,
        )

    bound_fn = per_example(bound_of, examples.size)

    def evaluate(context: Context) -> dict[str, Any]:
        def unit(k: int) -> dict[str, np.ndarray]:
            repeat, x, index, log_q = dequantizer.batch(examples, k)
            bound = bound_fn(context.params, context.model_state, x, index, np.full_like(index, repeat))
            return {"bound": bound - log_q}

        arrays = examples.run(context, "bound", settings, unit)
        if is_image:
            arrays["bpd"] = bits_per_dim(task, arrays["bound"])
        context.write(name, **arrays)
        value = evaluation.mean_and_stderr(arrays["bpd"] if is_image else -arrays["bound"])
        return {name: {**value, "unit": "bits/dim" if is_image else "nats", "settings": settings}}

    return evaluate
