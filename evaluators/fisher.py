# SPDX-License-Identifier: Apache-2.0
"""`eval.enable_fisher`: along the ODE, how far apart the score, that of the ODE's density and the normal one are."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import diagnostics
import evaluation
import likelihood
from evaluators.context import Context, Evaluator, fold_in_each, per_example, settings_of, split
from evaluators.dequantized import Dequantizer
from task import Task

_SETTINGS = ("hutchinson_type", "rtol", "atol", "max_steps", "fisher_num_times", "fisher_num_probes")


def evaluator(task: Task, dequantizer: Dequantizer) -> Evaluator:
    config = task.config.eval
    examples = split(task, "test", limit=config.fisher_num_examples)
    times = np.linspace(task.config.training.smallest_time, task.sde.T, config.fisher_num_times, dtype=np.float32)
    solver = settings_of(config, "rtol", "atol", "max_steps")
    mixture = task.dataset.mixture
    true_score = None if mixture is None else diagnostics.gaussian_mixture_score(task.sde, *mixture)

    def curves_of(params, model_state, x, index):
        keys = fold_in_each(jax.random.PRNGKey(task.config.seed), index)
        probe = likelihood.probes(keys, x.shape[1:], config.hutchinson_type, config.fisher_num_probes)
        of_model = task.sde, task.score_fn(params, model_state)
        curves = diagnostics.fisher_curves(*of_model, x, probe, jnp.asarray(times), true_score=true_score, **solver)
        return {name: curve.T for name, curve in curves._asdict().items() if curve is not None}  # [b, K]

    curves_fn = per_example(curves_of, examples.size)

    def evaluate(context: Context) -> dict[str, Any]:
        def unit(k: int) -> dict[str, np.ndarray]:
            _, x, index = examples.batch(k)
            return curves_fn(context.params, context.model_state, x, index)

        curves = examples.run(context, "fisher", settings_of(config, *_SETTINGS), unit)
        arrays: dict[str, np.ndarray] = {"times": times}
        summary: dict[str, Any] = {"num_examples": examples.count}
        num_failed = 0
        for name, curve in curves.items():
            values = curve[0].astype(np.float64)  # [N, K]
            kept = values[np.isfinite(values).all(axis=1)]
            num_failed = max(num_failed, len(values) - len(kept))
            arrays[name] = kept.mean(axis=0)
            arrays[f"{name}_stderr"] = kept.std(axis=0, ddof=1) / np.sqrt(len(kept))
            summary[name] = float(np.trapezoid(arrays[name], times))  # the integral over time
        context.write("fisher", **arrays)
        return {"fisher": summary | evaluation.failures(num_failed)}

    return evaluate
