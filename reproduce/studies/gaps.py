# SPDX-License-Identifier: Apache-2.0
"""Measures at which noise a model's score differs from that of its ODE's density, which orders 2 and 3 shall mend.

python -m reproduce.studies.gaps [--workdir W] [--only vp,ve] [--num 16] [--probes 8] [--out assets/reproduce]

Measures half the weighted squared distance g² |s - s_ode|², in nats per unit of log noise, at levels of noise even in
its logarithm, for the pairs of `reproduce.studies.pairs`. Several probes an image keep their variance out of it
(`diagnostics.FisherCurves`). Noise is sigma / alpha in units of the pixels' range, to compare VE and VP.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np

import datasets
import diagnostics
import evaluation
import likelihood
from errors import UserError
from report.canvas import PALETTE, STYLE, panels, plus_minus, png
from reproduce.studies import pairs
from sde_lib import SDE
from task import restored

NOISE = tuple(float(level) for level in np.geomspace(0.006, 2.0, 12))


def times_of(sde: SDE, noise: tuple[float, ...], pixel_range: float) -> tuple[jax.Array, jax.Array]:
    """The times [K] of the levels of noise, and dt / d log(noise) [K] there."""
    times = sde.time_at_log_snr(-2 * jnp.log(jnp.asarray(noise, jnp.float32) * pixel_range))
    slope = jax.vmap(jax.grad(lambda t: -0.5 * sde.log_snr(t)))(times)
    return times, 1 / slope


def gaps(folder: Path, noise: tuple[float, ...], num: int, num_probes: int) -> np.ndarray:
    """Half the squared distances [N, K], in nats per unit of log noise, of a run's newest model on `num` test images.

    The randomness is that of the config's seed. UserError if the run has no checkpoint or the solver gave up.
    """
    built, params, model_state = restored(folder)
    config = built.config
    x = jnp.asarray(datasets.eval_batch(built.dataset, config.data, "test", np.arange(num), seed=config.seed, repeat=0))
    keys = jax.random.split(jax.random.PRNGKey(config.seed), num)
    probes = likelihood.probes(keys, x.shape[1:], config.eval.hutchinson_type, num_probes)
    times, slope = times_of(built.sde, noise, 2.0 if config.data.centered else 1.0)
    solver = {key: config.eval[key] for key in ("rtol", "atol", "max_steps")}

    @jax.jit
    def curves(params, model_state, x, probes):
        score_fn = built.score_fn(params, model_state)
        return diagnostics.fisher_curves(built.sde, score_fn, x, probes, times, **solver).score_ode

    found = np.asarray(0.5 * slope[:, None] * curves(params, model_state, x, probes), np.float64).T
    if failed := np.flatnonzero(~np.isfinite(found).all(axis=1)).tolist():
        raise UserError(f"{folder}: the solver gave up on images {failed}: raise eval.max_steps in its config.json")
    return found


def compared(title: str, first: Path, second: Path, num: int, num_probes: int) -> dict[str, Any]:
    """Curves and integrals of both models and of their difference, image by image; standard errors over images."""
    one, two = (gaps(folder, NOISE, num, num_probes) for folder in (first, second))
    result: dict[str, Any] = {"noise": list(NOISE), "num_probes": num_probes}
    labels = {"first": "order 1", "second": "order 2", "first minus second": "order 1 minus 2"}
    for (name, label), curves in zip(labels.items(), (one, two, one - two), strict=True):
        points = [evaluation.mean_and_stderr(column[None]) for column in curves.T]
        result[name] = {key: [point[key] for point in points] for key in ("mean", "stderr")}
        integrals = np.trapezoid(curves, np.log(NOISE), axis=1)  # over log noise, nats
        value = result[name]["integral"] = evaluation.mean_and_stderr(integrals[None])
        print(f"{title}, {label}: {plus_minus(value['mean'], value['stderr'])} nats", flush=True)
    return result


@mpl.rc_context(STYLE)
def picture(found: dict[str, dict[str, Any]]) -> bytes:
    """Draws the curves of both orders of each pair against the noise. Values that are not positive are left out."""
    figure, ((axis,),) = panels(1, 1, 6.4, 3.8)
    for color, (name, pair) in zip(PALETTE, found.items(), strict=False):
        for order, model, line in ((1, "first", "-"), (2, "second", "--")):
            mean, error = (np.asarray(pair[model][key]) for key in ("mean", "stderr"))
            mean = np.where(mean > 0, mean, np.nan)
            label = f"{pairs.PAIRS[name][2]}: order {order}"
            axis.errorbar(pair["noise"], mean, error, color=color, ls=line, lw=1.2, capsize=2, label=label)
    axis.set(xscale="log", yscale="log", xlabel="noise, in units of the pixels' range")
    axis.set(ylabel="½ g² |s - ∇log q|², nats / log noise")
    axis.legend(fontsize="small")
    return png(figure)


def main() -> None:
    pairs.main("gaps", __doc__, {"num": 16, "probes": 8}, compared, picture)


if __name__ == "__main__":
    main()
