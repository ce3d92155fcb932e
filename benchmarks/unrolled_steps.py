# SPDX-License-Identifier: Apache-2.0
"""Training steps of the digits on the CPU: inside `jax.lax.scan` against the same steps without a loop.

python -m benchmarks.unrolled_steps [--json]

Same network, weights and batch in one run; the last line is the ratio of the median seconds a step.
"""

import argparse
import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import losses
from configs.default_digits_configs import get_digits_configs
from runtime.devices import replicate
from task import build


def unrolled(step_fn, state, xs):
    """`jax.lax.scan` without the loop."""
    outputs = []
    for x in xs:
        state, output = step_fn(state, x)
        outputs.append(output)
    return state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def seconds_a_step(scan, step_fn, state, batch, repeats: int = 5) -> float:
    """Median over `repeats` calls of one step, after a first call that compiles."""
    p_step = jax.pmap(functools.partial(scan, step_fn), axis_name="batch")
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(p_step(state, batch))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    task = build(get_digits_configs())
    loss_fn = losses.get_loss_fn(task.config.training, task.sde, task.score_fn)
    step_fn = losses.get_step_fn(loss_fn, task.optimizer, task.config.model.ema_rate)
    state = replicate(task.init_state())
    batch = np.random.default_rng(0).random((1, 1, 128, 8, 8, 1), np.float32)
    result = {
        "scan_seconds": seconds_a_step(jax.lax.scan, step_fn, state, batch),
        "unrolled_seconds": seconds_a_step(unrolled, step_fn, state, batch),
    }
    result["ratio"] = result["scan_seconds"] / result["unrolled_seconds"]
    if args.json:
        print(json.dumps(result))
    else:
        print(f"scan {result['scan_seconds']:.3f} s, unrolled {result['unrolled_seconds']:.3f} s a step")
        print(f"ratio {result['ratio']:.1f}")


if __name__ == "__main__":
    main()
