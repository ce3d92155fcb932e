# SPDX-License-Identifier: Apache-2.0
"""Seconds, operations and scratch memory of a training step of orders 1 to 3, ours and the public code's.

python -m benchmarks.step [--json] [--batch 16 | --config FILE]

Same network, weights and batch in one run, run in turns, medians of 5. `--config` takes those of a config file. The
public code's step is rebuilt in today's JAX: JAX's derivatives of convolution and softmax, the terms in one graph (as
ours), clipping, Adam and EMA, and no guard against steps that are not finite. "In a loop" are steps inside `lax.scan`,
as both codes train (`training.n_jitted_steps`).
"""

from contextlib import nullcontext
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import datasets
import losses
import task
from benchmarks import common
from models import convolution, layerspp

ORDERS = (1, 2, 3)
LOOP = 2  # steps


def public_step_fn(config):
    """The public code's step (state, x0) -> (state, loss)."""
    loss_fn, optimizer, rate = common.loss_fn_of(config), losses.get_optimizer(config.optim), config.model.ema_rate

    def step_fn(state, x0):
        key, index = jax.random.fold_in(state.key, state.step), jnp.arange(len(x0))
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, state.model_state, x0, index, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = jax.tree.map(lambda mean, new: rate * mean + (1 - rate) * new, state.ema_params, params)
        return state.replace(step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state), loss

    return step_fn


def compiled(step_fn, state: losses.TrainState, x0: jax.Array, public: bool, loop: bool) -> common.Program:
    """A step, or `LOOP` of them inside `lax.scan`; public: with JAX's derivatives."""

    def several(state, x0):
        return jax.lax.scan(step_fn, state, jnp.broadcast_to(x0, (LOOP, *x0.shape)))

    with (
        mock.patch.object(convolution, "has_own_derivatives", return_value=False) if public else nullcontext(),
        mock.patch.object(layerspp, "softmax", jax.nn.softmax) if public else nullcontext(),
    ):
        return common.compiled(several if loop else step_fn, state, x0)


def examples(config, path: str, batch: int) -> jax.Array:
    """Examples of the training split of a config file, or else noise in the place of images."""
    if not path:
        return common.images(config, batch)
    index = np.arange(config.training.batch_size)
    return jnp.asarray(datasets.eval_batch(task.build(config).dataset, config.data, "train", index, seed=0, repeat=0))


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--config", default="", help="a config file: its network, data shape and batch")
    args = parser.parse_args()
    programs: dict[str, common.Program] = {}
    for order in ORDERS:
        config = common.config_of(args.config) if args.config else common.ddpmpp_config(order)
        config.training.score_matching_order = order
        x0 = examples(config, args.config, args.batch)
        programs[f"order {order}"] = ours = common.train_step(config, len(x0), x0=x0)
        public = public_step_fn(config)
        programs[f"order {order}, public"] = compiled(public, *ours.args, public=True, loop=False)
        if order == 1:
            step_fn = losses.get_step_fn(
                common.loss_fn_of(config), losses.get_optimizer(config.optim), config.model.ema_rate, None
            )
            programs["order 1, in a loop"] = compiled(step_fn, *ours.args, public=False, loop=True)
            programs["order 1, public, in a loop"] = compiled(public, *ours.args, public=True, loop=True)
    times = common.seconds(programs)
    times |= {name: time / LOOP for name, time in times.items() if name.endswith("in a loop")}
    rows = {
        name: {
            "seconds": times[name],
            "to order 1": times[name] / times["order 1"],
            "to ours": times[name] / times[name.split(",")[0]],
            "gflop": program.gflop,
            "scratch_mb": program.scratch_mb,
            "compile_seconds": program.compile_s,
        }
        for name, program in programs.items()
    }
    common.report(rows, args.json)


if __name__ == "__main__":
    main()
