# SPDX-License-Identifier: Apache-2.0
"""What a training step of the full-size configs takes: seconds to compile, operations, memory. Nothing is allocated.

python -m benchmarks.full_size [--config FILE,FILE] [--orders 1,2,3] [--microbatches 1,2,8] [--table]
                               [--set model.remat=True,model.dtype=bfloat16] [--accelerators_convolution]
                               [--out assets/full_size.json] [--json]

One row for each config, order and number of micro-batches, for one device with the config's whole batch, by the
compiler of this machine. A row is written to `out` at once, and a row that is there is not compiled again. --table
prints the tables of docs/full_size.md.

A step of one micro-batch is compiled as training does it. That of more, of which only the memory is wanted, is not
optimised, which does not change the plan of the buffers. In k > 1 micro-batches it holds a + b / k: by this law, from
the rows of 2 and 8, the tables have the others.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common
from models import convolution

CONFIGS = (
    "configs/vp/cifar10_ddpmpp_continuous.py",
    "configs/ve/cifar10_ncsnpp_continuous.py",
    "configs/vp/cifar10_ddpmpp_deep_continuous.py",
    "configs/ve/cifar10_ncsnpp_deep_continuous.py",
    "configs/ve/church_ncsnpp_continuous.py",
    "configs/ml/cifar10_vdm.py",
)
CARDS = (16, 24, 40, 80)  # GB
USABLE = 0.9  # of a card's memory


def measured(path: str, order: int, parts: int, options: Sequence[str]) -> dict[str, Any]:
    """The row of one step: parameters, seconds, tera-operations, GB of intermediates and of arguments."""
    config = common.config_of(path)
    config.training.score_matching_order = order
    for name, _, value in (option.partition("=") for option in options):
        config.update_from_flattened_dict({name: json.loads(value.lower()) if value in ("True", "False") else value})
    batch, size, channels = config.training.batch_size, config.data.image_size, config.data.num_channels
    x0 = jax.ShapeDtypeStruct((batch, size, size, channels), jnp.float32)
    flags = {} if parts == 1 else {"xla_backend_optimization_level": 0}
    step = common.train_step(config, batch, parts, x0=x0, **flags)
    row = {
        "batch": batch,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(step.args[0].params)),
        "trace_s": step.trace_s,
        "compile_s": step.xla_s,
        "tflop": step.gflop / 1e3,
        "intermediates_gb": step.scratch_mb / 1e3,
        "arguments_gb": step.argument_mb / 1e3,
    }
    if parts > 1:  # neither is of an optimised program, and of a loop the body counts once
        del row["compile_s"], row["tflop"]
    jax.clear_caches()
    return jax.tree.map(common.rounded, row)


def in_parts(of_2: float, of_8: float, count: int) -> float:
    """Memory of a step in `count` > 1 micro-batches, by the law."""
    growing = (of_2 - of_8) / (1 / 2 - 1 / 8)
    return of_8 + growing * (1 / count - 1 / 8)


def tables(rows: dict[str, dict[str, Any]], configs: Sequence[str]) -> str:
    """Markdown: a step of each config and order, and what fits which card."""
    lines = [
        "| config | order | parameters | trace, compile, s | TFLOP a step | state, GB | in 1 part, GB | 2 | 4 | 8 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    fits = ["| config, batch | order | " + " | ".join(f"{card} GB" for card in CARDS) + " |", "| --- " * 6 + "|"]
    for path in configs:
        name = path.removeprefix("configs/").removesuffix(".py")
        for order in (1, 2, 3):
            found = [rows.get(f"{path} order {order} in {parts}") for parts in (1, 2, 8)]
            if None in found:
                lines.append(f"| `{name}` | {order} |" + " not measured |" * 8)
                fits.append(f"| `{name}` | {order} |" + " not measured |" * 4)
                continue
            whole, (of_1, *of_2_and_8) = found[0], [row["intermediates_gb"] for row in found]
            memory = {1: of_1, **{n: in_parts(*of_2_and_8, n) for n in (2, 4, 8, 16, 32, 64)}}
            shown = " | ".join(f"{memory[n]:.1f}" for n in (1, 2, 4, 8))
            lines.append(
                f"| `{name}` | {order} | {whole['parameters'] / 1e6:.1f} M | {whole['trace_s']:.0f}, "
                f"{whole['compile_s']:.0f} | {whole['tflop']:.1f} | {whole['arguments_gb']:.2f} | {shown} |"
            )
            fit = []
            for card in CARDS:
                room = USABLE * card - whole["arguments_gb"]
                counts = [n for n, need in memory.items() if need <= room and whole["batch"] % n == 0]
                fit.append(str(counts[0]) if counts else "none")
            fits.append(f"| `{name}`, {whole['batch']} | {order} | {' | '.join(fit)} |")
    return "\n".join([*lines, "", *fits])


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--config", default=",".join(CONFIGS), help="config files, with commas between them")
    parser.add_argument("--orders", default="1,2,3")
    parser.add_argument("--microbatches", default="1,2,8")
    parser.add_argument("--set", default="", help="key=value of the config, with commas between them")
    parser.add_argument("--accelerators_convolution", action="store_true", help="JAX's derivatives of convolutions")
    parser.add_argument("--out", type=Path, default=Path("assets/full_size.json"))
    parser.add_argument("--table", action="store_true", help="compile nothing; print the tables of what is there")
    args = parser.parse_args()
    configs, options = args.config.split(","), [option for option in args.set.split(",") if option]
    rows = json.loads(args.out.read_text()) if args.out.exists() else {}
    if args.table:
        print(tables(rows, configs))
        return
    if args.accelerators_convolution:
        convolution.has_own_derivatives = lambda: False
    notes = [*options, *(["accelerators' convolution"] if args.accelerators_convolution else [])]
    for path in configs:
        for order in map(int, args.orders.split(",")):
            for parts in map(int, args.microbatches.split(",")):
                name = " ".join([f"{path} order {order} in {parts}", *notes])
                if name not in rows:
                    rows[name] = measured(path, order, parts, options)
                    args.out.write_text(json.dumps(rows, indent=1) + "\n")
                    print(f"{name}: {rows[name]}", flush=True)
    common.report(rows, args.json)


if __name__ == "__main__":
    main()
