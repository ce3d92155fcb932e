# SPDX-License-Identifier: Apache-2.0
"""Seconds, operations and scratch memory of a training step of orders 1 to 3, and their ratios to order 1.

python -m benchmarks.step [--json] [--batch 16 | --config FILE]

Same network, weights and batch in one run, run in turns, medians of 5. `--config` takes those of a config file.
"""

import jax.numpy as jnp
import numpy as np

import datasets
import task
from benchmarks import common

ORDERS = (1, 2, 3)


def of_config(path: str) -> dict[str, common.Program]:
    """Orders 1 to 3 of a config file, on examples of its training split."""
    programs = {}
    for order in ORDERS:
        config = common.config_of(path)
        config.training.score_matching_order = order
        batch = config.training.batch_size
        x0 = datasets.eval_batch(task.build(config).dataset, config.data, "train", np.arange(batch), seed=0, repeat=0)
        programs[f"order {order}"] = common.train_step(config, batch, x0=jnp.asarray(x0))
    return programs


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--config", default="", help="a config file: its network, data shape and batch")
    args = parser.parse_args()
    programs = {f"order {n}": common.train_step(common.ddpmpp_config(n), args.batch) for n in ORDERS if not args.config}
    programs |= of_config(args.config) if args.config else {}
    times = common.seconds(programs)
    rows = {
        name: {
            "seconds": times[name],
            "ratio": times[name] / times["order 1"],
            "gflop": program.gflop,
            "scratch_mb": program.scratch_mb,
            "compile_seconds": program.compile_s,
        }
        for name, program in programs.items()
    }
    common.report(rows, args.json)


if __name__ == "__main__":
    main()
