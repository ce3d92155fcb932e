# SPDX-License-Identifier: Apache-2.0
"""`eval.enable_fisher`: how far score, score of the ODE's own density and normal score are apart along the ODE."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import diagnostics
import evaluation
import likelihood
from evaluators.context import Context, Evaluator, per_example, settings_of, split
from evaluators.dequantized import Dequantizer
from parts import Parts

_SETTINGS = ("hutchinson_type", "rtol", "atol", "max_steps", "fisher_num_times", "fisher_num_probes")


def evaluator(parts: Parts, dequantizer: Dequantizer) -> Evaluator:
    config = parts.config.eval
    examples = split(parts, "test", limit=config.fisher_num_examples)
    times = np.linspace(parts.config.training.smallest_time, parts.sde.T, config.fisher_num_times, dtype=np.float32)
    solver = {"rtol": config.rtol, "atol": config.atol, "max_steps": config.max_steps}
    mixture = parts.dataset.mixture
    true_score = None if mixture is None else diagnostics.gaussian_mixture_score(parts.sde, *mixture)

    def probes_of(shape, index):
        key = jax.random.fold_in(jax.random.PRNGKey(parts.config.seed), index)
        return likelihood.probes(key, shape, config.hutchinson_type, config.fisher_num_probes)

    def curves_of(params, model_state, x, index):
        probe = None
        if config.hutchinson_type != "exact":
            probe = jax.vmap(functools.partial(probes_of, x.shape[1:]), out_axes=1)(index)  # [P, b, ...]
            probe = probe[0] if config.fisher_num_probes == 1 else probe
        score_fn = parts.score_fn(params, model_state)
        curves = diagnostics.fisher_curves(
            parts.sde, score_fn, x, probe, jnp.asarray(times), true_score=true_score, **solver
        )._asdict()
        return {name: curve.T for name, curve in curves.items() if curve is not None}  # [b, K]

    curves_fn = per_example(curves_of, examples.size)

    def evaluate(context: Context) -> dict[str, Any]:
        def unit(k: int) -> dict[str, np.ndarray]:
            _, x, index = examples.batch(k)
            return curves_fn(context.params, context.model_state, x, index)

        settings = {**examples.settings, **settings_of(config, *_SETTINGS)}
        rows = context.units("fisher", settings).run(examples.num_units, unit, "score diagnostics")
        arrays: dict[str, np.ndarray] = {"times": times}
        summary: dict[str, Any] = {"num_examples": examples.count}
        num_failed = 0
        for name in rows[0]:
            values = np.concatenate([row[name] for row in rows]).astype(np.float64)  # [N, K]
            kept = values[np.isfinite(values).all(axis=1)]
            num_failed = max(num_failed, len(values) - len(kept))
            arrays[name] = kept.mean(axis=0)
            arrays[f"{name}_stderr"] = kept.std(axis=0, ddof=1) / np.sqrt(len(kept))
            summary[name] = float(np.trapezoid(arrays[name], times))  # the integral over time
        context.write("fisher", **arrays)
        return {"fisher": summary | evaluation.failures(num_failed)}

    return evaluate
