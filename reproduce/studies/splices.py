# SPDX-License-Identifier: Apache-2.0
"""Finds the times at which one model's likelihood is better than another's, by ODEs spliced of both scores.

python -m reproduce.studies.splices [--workdir runs/reproduce] [--only vp,ve] [--num 64] [--out assets/reproduce]

For each of some times the ODE's score is that of order 1 before it and that of order 2 after it, for the pairs of
`reproduce.studies.pairs`. Its bits/dim less those of order 1 alone, on the same test images and probes, are what order
2 costs from that time on.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np

import evaluation
from evaluators.context import split
from evaluators.likelihood import bits_per_dim, log_likelihood
from models.score import ScoreFn
from report.canvas import PALETTE, STYLE, panels, plus_minus, png
from reproduce.studies import pairs
from runtime.devices import replicate
from task import Task, restored

TIMES = (0.0, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 0.6)


class Spliced(Task):
    """Task whose parameters are those of two models of the same network, and the time at which one takes over."""

    def score_fn(self, params: tuple[Any, Any, jax.Array], model_state: tuple[Any, Any], dropout_keys=None) -> ScoreFn:
        """The score of the first model at t < time and of the second from there on; for evaluation only."""
        assert dropout_keys is None
        first, second, time = params
        before, after = map(super().score_fn, (first, second), model_state)
        return lambda x, t: jnp.where((t < time).reshape(-1, *[1] * (x.ndim - 1)), before(x, t), after(x, t))


def splices(first: Path, second: Path, times: Sequence[float], num: int) -> list[dict[str, Any]]:
    """Bits/dim on the first `num` test images and their difference to the first model's, a row for each time.

    The last row is the first model alone. first, second: workdirs of runs of one network. The settings are those of the
    first's config. UserError if a run has no checkpoint or the solver gave up on an image.
    """
    (built, *model), (_, *other) = restored(first), restored(second)
    params, model_state = zip(model, other, strict=True)
    spliced = Spliced(*built)
    examples = split(spliced, "test", limit=num)
    likelihood_fn = log_likelihood(spliced, examples.size)
    copies, states = replicate(params), replicate(model_state)

    def bits(time: float) -> np.ndarray:
        rows = []
        for unit in range(examples.num_units):
            repeat, x, index = examples.batch(unit)
            rows.append(likelihood_fn((*copies, replicate(np.float32(time))), states, x, index, repeat)["logp"])
        return bits_per_dim(built, np.concatenate(rows))

    alone, result = bits(np.inf), []
    for time in [*times, None]:
        bpd, sigma = (alone, None) if time is None else (bits(time), float(built.sde.sigma(jnp.float32(time))))
        difference = evaluation.mean_and_stderr((bpd - alone)[None])
        result.append({"time": time, "sigma": sigma, "bpd": float(bpd.mean()), "minus the first": difference})
        shown = plus_minus(difference["mean"], difference["stderr"])
        print(f"  {np.inf if time is None else time:<8g} {bpd.mean():.4f}  {shown}", flush=True)
    return result


@mpl.rc_context(STYLE)
def picture(found: dict[str, list[dict[str, Any]]]) -> bytes:
    """Draws the differences against the time. The second model alone, t = 0, stands at the left end."""
    figure, ((axis,),) = panels(1, 1, 6.4, 3.6)
    for color, (name, rows) in zip(PALETTE, found.items(), strict=False):
        rows = [row for row in rows if row["time"] is not None]
        x = [row["time"] or 1e-5 for row in rows]
        mean, error = ([row["minus the first"][key] for row in rows] for key in ("mean", "stderr"))
        axis.errorbar(x, mean, error, color=color, marker="o", ms=3, lw=1.2, capsize=2, label=pairs.PAIRS[name][2])
    axis.axhline(0, color="black", lw=0.8)
    axis.set(xscale="log", xlabel="time from which the score is order 2's (left: all)")
    axis.set(ylabel="bits/dim less order 1's")
    axis.legend()
    return png(figure)


def compared(title: str, first: Path, second: Path, num: int) -> list[dict[str, Any]]:
    print(f"{title}: time, bits/dim, less order 1's", flush=True)
    return splices(first, second, TIMES, num)


def main() -> None:
    pairs.main("splices", __doc__, {"num": 64}, compared, picture)


if __name__ == "__main__":
    main()
