# SPDX-License-Identifier: Apache-2.0
"""The evaluations of a checkpoint by `--mode eval`. Each is one file, one function and one line of `EVALUATORS`.

An evaluator is made once from the task of a run, so that it compiles once. It is called with a `Context` for each
checkpoint and returns what goes into the report, by name. Its work is cut into units (see `evaluators.units`) that a
restart does not repeat and that several hosts share.
"""

from collections.abc import Callable

from evaluators import discrete, fisher, likelihood, loss, samples
from evaluators.context import Evaluator
from evaluators.dequantized import Dequantizer
from task import Task

# The switch in `config.eval`, and the evaluator that it turns on.
EVALUATORS: dict[str, Callable[[Task, Dequantizer], Evaluator]] = {
    "enable_loss": loss.evaluator,
    "enable_bpd": likelihood.evaluator,
    "bound": likelihood.bound_evaluator,
    "discrete_bound": discrete.bound_evaluator,
    "ledger": discrete.ledger_evaluator,
    "enable_sampling": samples.evaluator,
    "enable_fisher": fisher.evaluator,
}
