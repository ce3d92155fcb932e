# SPDX-License-Identifier: Apache-2.0
"""The gradient of one convolution of 3x3 with respect to its weights on the CPU, by our derivatives and by JAX's.

python -m benchmarks.convolution [--json]

At shapes from 8x8 with 32 channels to CIFAR-10's 32x32 with 128, without a loop, where JAX's is at its best. Run in
turns, medians of 31; the results differ by rounding. Whole training steps: benchmarks.step.
"""

import jax
import jax.numpy as jnp

from benchmarks import common
from models.convolution import _convolve, conv2d

SHAPES = ((128, 8, 32), (16, 16, 32), (16, 8, 64), (32, 16, 64), (32, 8, 128), (64, 32, 128))  # batch, side, channels
SIDES = {"ours": conv2d, "jax": lambda x, weight: _convolve(x, weight, 1, 1, "SAME")}


def gradients() -> dict[tuple[str, str], common.Program]:
    """Compiled, by shape and side."""
    programs = {}
    for batch, side, channels in SHAPES:
        x = jax.random.normal(jax.random.key(0), (batch, side, side, channels))
        weight = jnp.ones((3, 3, channels, channels))
        for name, convolve in SIDES.items():

            def gradient(weight, x, convolve=convolve):
                return jax.vjp(lambda weight: convolve(x, weight), weight)[1](x)[0]

            shape = f"batch {batch}, {side}x{side}, {channels} channels"
            programs[shape, name] = common.compiled(gradient, weight, x)
    return programs


def main() -> None:
    args = common.parser(__doc__).parse_args()
    programs = gradients()
    times = common.seconds(programs, 31)
    rows = {
        shape: {
            "seconds": times[shape, "ours"],
            "seconds_jax": times[shape, "jax"],
            "ratio": times[shape, "jax"] / times[shape, "ours"],
            "scratch_mb": programs[shape, "ours"].scratch_mb,
            "scratch_mb_jax": programs[shape, "jax"].scratch_mb,
        }
        for shape, side in programs
        if side == "ours"
    }
    common.report(rows, args.json)


if __name__ == "__main__":
    main()
