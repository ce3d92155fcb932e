# SPDX-License-Identifier: Apache-2.0
"""The terms of the loss with bfloat16 feature maps against float32, on a trained network.

python -m benchmarks.precision --workdir W --config configs/digits/ve_ncsnpp.py [--json] [--examples 128] [--draws 16]

Same parameters (the EMA of W's newest checkpoint), test images, times, noise and probes on both sides; parameters and
losses are float32 on both. A change is a part of float32's mean, its error that of paired draws. Memory and time of
bfloat16 are an accelerator's matter: the CPU computes it in float32.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import checkpoints
import datasets
import losses
import task
from benchmarks import common

EARLY = 0.125  # times at which the noise is small


def terms(config, state, x0, draws: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Times [N] and each term [N], for N = examples times draws."""
    built = task.build(config)
    sde, eps = built.sde, config.training.smallest_time

    @jax.jit
    def of(params, key):
        t_key, z_key, v_key = jax.random.split(key, 3)
        t = jax.random.uniform(t_key, (len(x0),), minval=eps, maxval=sde.T)
        z, v = jax.random.normal(z_key, x0.shape), jax.random.rademacher(v_key, x0.shape, x0.dtype)
        return t, losses.dsm_losses(sde, built.score_fn(params, state.get("model_state", {})), x0, t, z, v, 3)._asdict()

    drawn = [of(state["ema_params"], jax.random.PRNGKey(number)) for number in range(draws)]
    return jax.tree.map(lambda *values: np.concatenate(values), *drawn)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--workdir", required=True, help="a trained run")
    parser.add_argument("--config", required=True, help="its config file")
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--draws", type=int, default=16)
    args = parser.parse_args()
    config = common.config_of(args.config)
    dataset = task.build(config).dataset
    index = np.arange(min(args.examples, len(dataset.test)))
    x0 = jnp.asarray(datasets.eval_batch(dataset, config.data, "test", index, seed=config.seed, repeat=0))
    state = checkpoints.restore(checkpoints.find(Path(args.workdir) / "checkpoints", 0)).state
    results = {}
    for dtype in ("float32", "bfloat16"):
        config.model.dtype = dtype
        t, results[dtype] = terms(config, state, x0, args.draws)
    early = t < EARLY
    rows = {}
    for name, plain in results["float32"].items():
        change = results["bfloat16"][name] - plain
        mean = plain.mean()
        rows[name] = {
            "float32": mean,
            "change": change.mean() / mean,
            "stderr": change.std(ddof=1) / np.sqrt(len(t)) / mean,
            f"part of it at t < {EARLY}": np.where(early, change, 0).mean() / mean,
        }
    common.report(jax.tree.map(float, rows), args.json)


if __name__ == "__main__":
    main()
