# SPDX-License-Identifier: Apache-2.0
"""Seconds of a training step of orders 1 to 3, and of the ways to the third order's gradient.

python -m benchmarks.step [--json] [--batch 16] [--flags | --jitted 4 | --config FILE]

The third order in one graph (the public code's way: reverse mode over reverse mode over a jvp) is set against the two
passes of Lu et al. 2022's loss: the residual r without parameter gradients, then the gradient of 2 r . grad_x(v.Jv),
written as 2 v . d/dr d/dv s by two nested jvps. Same network, weights and batch in one run, run in turns, medians of 5.
`--flags` measures orders 1 and 2 with other compiler settings; `--jitted N` N steps in one call against one by one;
`--config` orders 1 to 3 of a config file.
"""

import functools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import datasets
import losses
import task
from benchmarks import common
from losses import sg
from sde_lib import batch_mul

FLAGS = {
    "fast_math": {"xla_cpu_enable_fast_math": True},
    "memory_scheduler": {"xla_cpu_enable_concurrency_optimized_scheduler": False},
    "vector_width_512": {"xla_cpu_prefer_vector_width": 512},
}


def two_passes(sde, score_fn, x0, t, z, v, order, exact) -> losses.DSMLosses:
    """`losses.dsm_losses` of order 3 with a probe; the gradient of its third term takes two passes."""
    assert order == 3 and not exact
    batch, dim = x0.shape[0], math.prod(x0.shape[1:])
    mean, std = sde.marginal_prob(x0, t)
    sigma = std[:, None]
    x, z, v = (a.reshape(batch, dim) for a in (mean + batch_mul(std, z), z, v))

    def score(x):
        return score_fn(x.reshape(x0.shape), t).reshape(batch, dim)

    s, jv, grad_vjv = jax.tree.map(sg, losses._probe_derivatives(score, x, v, 3))
    c = z + sigma * s
    cv, vv, vjv = (losses._inner(*pair) for pair in ((c, v), (v, v), (v, jv)))
    residual = sigma**3 * grad_vjv + cv**2 * c - (sigma**2 * vjv + vv) * c - 2 * cv * (sigma**2 * jv + v)
    (s, jv), (_, second) = jax.jvp(lambda x: jax.jvp(score, (x,), (v,)), (x,), (residual,))  # d/dv s; d/dr d/dv s
    first_and_second = losses._probe_losses(sigma, c, v, jv, None)
    surrogate = 2 * (sigma**3 * losses._inner(v, second))[:, 0] / dim**3
    third = jnp.mean(jnp.square(residual), axis=-1) / dim**2 + surrogate - sg(surrogate)
    first = jnp.mean(jnp.square(sigma * s + z), axis=-1)
    return losses.DSMLosses(first, *first_and_second[:2], third)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--config", default="", help="a config file: its network, data shape and batch, orders 1 to 3")
    parser.add_argument("--flags", action="store_true")
    parser.add_argument("--jitted", type=int, default=0, metavar="N", help="training.n_jitted_steps of orders 1 and 2")
    args = parser.parse_args()
    if args.config:
        programs = of_config(args.config)
        common.report(rows_of(programs, common.seconds(programs)), args.json)
        return
    if args.jitted:
        common.report(jitted(args.batch, args.jitted), args.json)
        return
    programs = {f"order {n}": common.train_step(common.ddpmpp_config(n), args.batch) for n in (1, 2)}
    if args.flags:
        programs |= with_flags(args.batch)
    else:
        programs["order 3"] = common.train_step(common.ddpmpp_config(3), args.batch)
        with mock.patch.object(losses, "dsm_losses", two_passes):
            programs["order 3, two passes"] = common.train_step(common.ddpmpp_config(3), args.batch)
    rows: dict = rows_of(programs, common.seconds(programs))
    if not args.flags:
        rows["gradient difference of the two passes"] = _difference(programs)
    common.report(rows, args.json)


def rows_of(programs: dict[str, common.Program], times: dict[str, float]) -> dict[str, dict[str, float]]:
    """What is printed of each."""
    return {
        name: {
            "seconds": times[name],
            "ratio": times[name] / times["order 1"],
            "gflop": program.gflop,
            "scratch_mb": program.scratch_mb,
            "compile_seconds": program.compile_s,
        }
        for name, program in programs.items()
    }


def of_config(path: str) -> dict[str, common.Program]:
    """Orders 1 to 3 of a config file, on examples of its training split."""
    programs = {}
    for order in (1, 2, 3):
        config = common.config_of(path)
        config.training.score_matching_order = order
        batch = config.training.batch_size
        x0 = datasets.eval_batch(task.build(config).dataset, config.data, "train", np.arange(batch), seed=0, repeat=0)
        programs[f"order {order}"] = common.train_step(config, batch, x0=jnp.asarray(x0))
    return programs


def _difference(programs: dict[str, common.Program]) -> float:
    """|g - g'| / |g| of Adam's first moment, (1 - beta1) g after the first step, of the two ways to order 3."""
    states = [programs[name].run(*programs[name].args)[0] for name in ("order 3", "order 3, two passes")]
    one, two = (optax.tree.get(state.opt_state, "mu") for state in states)
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, one, two)) / optax.tree.norm(one))


def jitted(batch: int, count: int) -> dict[str, float]:
    """Seconds a step of orders 1 and 2, one a call and `count` in a scan, and the ratio."""
    programs = {}
    for order in (1, 2):
        config = common.ddpmpp_config(order)
        one = common.train_step(config, batch)
        state, x0 = one.args
        loss_fn, optimizer = common.loss_fn_of(config), losses.get_optimizer(config.optim)
        step_fn = losses.get_step_fn(loss_fn, optimizer, config.model.ema_rate, axis_name=None)
        many = jnp.broadcast_to(x0, (count, *x0.shape))
        programs[order, 1] = one
        programs[order, count] = common.compiled(functools.partial(jax.lax.scan, step_fn), state, many)
    times = common.seconds(programs)
    rows = {f"order {order}, {n} a call": seconds / n for (order, n), seconds in times.items()}
    return rows | {f"ratio, order {n}": times[n, count] / count / times[n, 1] for n in (1, 2)}


def with_flags(batch: int) -> dict[str, common.Program]:
    """Orders 1 and 2 under each compiler setting."""
    return {
        f"order {order}, {name}": common.train_step(common.ddpmpp_config(order), batch, **options)
        for name, options in FLAGS.items()
        for order in (1, 2)
    }


if __name__ == "__main__":
    main()
