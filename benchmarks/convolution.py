# SPDX-License-Identifier: Apache-2.0
"""Gradients on the CPU by our derivatives of convolution and softmax against JAX's own.

python -m benchmarks.convolution [--json] [--shapes]

Training steps of orders 1 to 3 of the network of benchmarks.step, batch 16: same weights and batch, run in turns,
medians of 5. JAX's are those of `lax.conv_general_dilated` and `jax.nn.softmax`; the results differ by rounding.
`--shapes` times instead (31 turns) the gradient of one convolution of 3x3 with respect to its weights, without a loop,
where JAX's is at its best, at shapes from 8x8 with 32 channels to CIFAR-10's 32x32 with 128.
"""

from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks import common
from models import convolution, layers, layerspp, up_or_down_sampling

SHAPES = ((128, 8, 32), (16, 16, 32), (16, 8, 64), (32, 16, 64), (32, 8, 128), (64, 32, 128))  # batch, side, channels


def plain_conv2d(x, weight, stride: int = 1, dilation: int = 1, padding="SAME"):
    """`conv2d` with JAX's derivatives, as on accelerators."""
    return convolution._convolve(x, weight, stride, dilation, padding)


def compared(programs: dict[tuple[str, str], common.Program], repeats: int) -> dict[str, dict[str, float]]:
    """Seconds and scratch memory of the programs (case, "ours") and (case, "jax"), and the ratio, by case."""
    times = common.seconds(programs, repeats)
    return {
        case: {
            "seconds": times[case, "ours"],
            "seconds_jax": times[case, "jax"],
            "ratio": times[case, "jax"] / times[case, "ours"],
            "scratch_mb": programs[case, "ours"].scratch_mb,
            "scratch_mb_jax": programs[case, "jax"].scratch_mb,
        }
        for case, side in programs
        if side == "ours"
    }


def steps() -> dict[tuple[str, str], common.Program]:
    """Orders 1 to 3."""
    programs = {}
    for order in (1, 2, 3):
        config = common.ddpmpp_config(order)
        programs[f"order {order}", "ours"] = common.train_step(config, 16)
        with (
            mock.patch.object(layers, "conv2d", plain_conv2d),
            mock.patch.object(up_or_down_sampling, "conv2d", plain_conv2d),
            mock.patch.object(layerspp, "softmax", jax.nn.softmax),
        ):
            programs[f"order {order}", "jax"] = common.train_step(config, 16)
    return programs


def shapes() -> dict[tuple[str, str], common.Program]:
    """The gradient of a convolution with respect to its weights, by shape."""
    programs = {}
    for batch, side, channels in SHAPES:
        x = jax.random.normal(jax.random.key(0), (batch, side, side, channels))
        weight = jnp.ones((3, 3, channels, channels))
        for name, convolve in (("ours", convolution.conv2d), ("jax", plain_conv2d)):

            def gradient(weight, x, convolve=convolve):
                return jax.vjp(lambda weight: convolve(x, weight), weight)[1](x)[0]

            case = f"batch {batch}, {side}x{side}, {channels} channels"
            programs[case, name] = common.compiled(gradient, weight, x)
    return programs


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--shapes", action="store_true")
    args = parser.parse_args()
    common.report(compared(shapes(), 31) if args.shapes else compared(steps(), 5), args.json)


if __name__ == "__main__":
    main()
