# SPDX-License-Identifier: Apache-2.0
"""Where the time of a training step goes, by part of the network and order, on the CPU.

python -m benchmarks.breakdown [--json] [--batch 16] [--orders 1,3]

The network of benchmarks.step under JAX's profiler: for each instruction of the compiled step its time on all threads,
counted with the part of the network that it is named after, mean of 3 steps. An instruction that XLA made of several
parts counts with one of them.
"""

import collections
import re
import tempfile
from pathlib import Path

import jax

from benchmarks import common

PARTS = {  # the first whose pattern is in the name
    "attention": "AttnBlock",
    "normalisation": "GroupNorm",
    "activation": "silu",
    "dropout": "Dropout",
    "convolution": "Conv|conv",
    "rest of the residual blocks": "Resnet",
    "other": "",
}
STEPS = 3


def part_of(op_name: str) -> str:
    """Of an instruction's name in the program."""
    return next(part for part, pattern in PARTS.items() if re.search(pattern, op_name))


def breakdown(program: common.Program) -> dict[str, float]:
    """Milliseconds a step on all threads, by part."""
    instruction = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?(?:op_name=\"([^\"]*)\".*)?$")
    found = (instruction.match(line) for line in program.run.as_text().splitlines())
    names = {match[1]: match[2] or "" for match in found if match}
    jax.block_until_ready(program.run(*program.args))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(STEPS):
                jax.block_until_ready(program.run(*program.args))
        (path,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
    milliseconds: collections.Counter[str] = collections.Counter(dict.fromkeys(PARTS, 0))
    for plane in profile.planes:
        for thread in plane.lines:
            for event in thread.events:
                if event.name in names and thread.name != "python":
                    milliseconds[part_of(names[event.name])] += event.duration_ns / 1e6 / STEPS
    return dict(milliseconds)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--orders", default="1,3")
    args = parser.parse_args()
    result: dict = {}
    for order in map(int, args.orders.split(",")):
        parts = breakdown(common.train_step(common.ddpmpp_config(order), args.batch))
        total = sum(parts.values())
        result[f"order {order}"] = {"milliseconds": total, "shares": {part: ms / total for part, ms in parts.items()}}
    common.report(result, args.json)


if __name__ == "__main__":
    main()
