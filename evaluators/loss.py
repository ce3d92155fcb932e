# SPDX-License-Identifier: Apache-2.0
"""`eval.enable_loss`: each term of the training loss, at the configured order, over the whole test split."""

from typing import Any

import jax
import numpy as np

import evaluation
import losses
from evaluators.context import Context, Evaluator, per_example, settings_except, split
from evaluators.dequantized import Dequantizer
from task import Task

# The keys of `config.training` on which the loss of an example under given parameters cannot depend.
CANNOT_MATTER = (
    *("batch_size", "num_microbatches", "n_iters", "n_jitted_steps", "matmul_precision", "max_bad_steps"),
    *("log_freq", "eval_freq", "snapshot_freq", "snapshot_freq_for_preemption", "snapshot_minutes_for_preemption"),
    *("snapshot_sampling", "init_from", "init_optimizer", "wandb_project", "antithetic_times", "grad_shares"),
)


def evaluator(task: Task, dequantizer: Dequantizer) -> Evaluator:
    """The data are dequantised as in training, so `dequantizer` has no part in it; no dropout, no flips."""
    config = task.config
    examples = split(task, "test", limit=config.eval.num_examples)
    loss_fn = losses.get_loss_fn(
        config.training, task.sde, lambda params, state, _: task.score_fn(params, state), config.model.sigma_data
    )

    def terms_of(params, model_state, x, index):
        _, terms = loss_fn(params, model_state, x, index, jax.random.PRNGKey(config.seed))
        return terms

    terms_fn = per_example(terms_of, examples.size)

    def evaluate(context: Context) -> dict[str, Any]:
        def unit(k: int) -> dict[str, np.ndarray]:
            _, x, index = examples.batch(k, dequantize=config.data.uniform_dequantization)
            return terms_fn(context.params, context.model_state, x, index)

        terms = examples.run(context, "loss", settings_except(config.training, *CANNOT_MATTER), unit)
        context.write("loss", **terms)
        return {"loss": {name: evaluation.mean_and_stderr(values) for name, values in terms.items()}}

    return evaluate
