# SPDX-License-Identifier: Apache-2.0
"""Makes continuous images of whole levels for an evaluation: by uniform, truncated normal or variational noise."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

import checkpoints
import datasets
import dequantization
from evaluators.context import Split, fold_in_each, per_example
from models.flowpp import create_dequantizer
from runtime.devices import digest, replicate
from task import Task, dequantizer_state

_NOISE_KEY = 2  # apart from the probes of the likelihood and the bound


class Dequantizer(NamedTuple):
    """batch(examples, unit, draw) -> repeat, x [b, ...], index [b] and log q [b] in nats.

    log q is the density of the noise relative to uniform noise on the levels' cells. at_start: x is x_eps, a sample of
    the process at its first time and not of the data.
    """

    batch: Callable[[Split, int, int], tuple[int, np.ndarray, np.ndarray, np.ndarray]]
    settings: dict[str, Any]
    at_start: bool = False


def name_of(config: Any) -> str:
    """`eval.dequantization`, or variational if `eval.dequantizer`."""
    return "variational" if config.dequantizer else config.dequantization


def create(task: Task, deq_directory: Path) -> Dequantizer:
    """The dequantisation that `config.eval` asks for."""
    name = name_of(task.config.eval)
    if name == "variational":
        return variational(task, deq_directory)
    return truncated_normal(task) if name == "truncated_normal" else uniform()


def uniform() -> Dequantizer:
    """Adds u / levels with u uniform in [0, 1) to images, and leaves points as they are."""

    def batch(examples: Split, unit: int, draw: int):
        repeat, x, index = examples.batch(unit, draw)
        return repeat, x, index, np.zeros(len(x), np.float32)

    return Dequantizer(batch, {"dequantization": "uniform"})


def truncated_normal(task: Task) -> Dequantizer:
    """Takes the levels k / (levels - 1) to the first time of the process (`dequantization.truncated_normal`).

    The noise is made of the same uniform numbers as that of `uniform`.
    """
    config, levels = task.config, task.dataset.levels
    scaler = datasets.get_data_scaler(config.data.centered)
    step = scaler(1.0) - scaler(0.0)  # of the range of the levels
    half, eps = 0.5 * step / (levels - 1), config.training.smallest_time
    margin = levels * 2.0**-25  # half the distance of the numbers u: at 0 and 1 the noise would have no bounds

    def dequantize(_, __, image01, x01):
        level = jnp.round(image01 * (levels - 1))
        u = jnp.clip(x01 * levels - level, margin, 1 - margin)
        x, log_q = dequantization.truncated_normal(task.sde, scaler(image01), u, half, eps)
        return x, log_q + math.prod(image01.shape[1:]) * math.log(step / levels)

    program = functools.cache(functools.partial(per_example, dequantize))

    def batch(examples: Split, unit: int, draw: int):
        repeat, image, index = examples.batch(unit, draw, dequantize=False, scale=False)
        _, noisy, _ = examples.batch(unit, draw, scale=False)
        x, log_q = program(examples.size)({}, {}, image, noisy)
        return repeat, x, index, log_q

    return Dequantizer(batch, {"dequantization": "truncated_normal"}, at_start=True)


def variational(task: Task, directory: Path) -> Dequantizer:
    """The dequantiser that `--mode train_deq` left in `directory`, its EMA parameters. UserError if there is none."""
    config = task.config
    path = checkpoints.find(directory / "checkpoints", config.deq.ckpt_id)
    model = create_dequantizer(config.deq.network)
    target = dequantizer_state(task, model)
    state = checkpoints.into(target, checkpoints.restore(path, target).state, path)
    logging.info("variational dequantiser: %s", path)
    params = replicate(state.ema_params, jax.local_devices())
    scaler = datasets.get_data_scaler(config.data.centered)
    seed = jax.random.fold_in(jax.random.PRNGKey(config.seed), _NOISE_KEY)

    def dequantize(params, _, image, index, repeat):
        normal = functools.partial(jax.random.normal, shape=image.shape[1:])
        u = jax.vmap(normal)(fold_in_each(seed, repeat, index))
        x, log_q = dequantization.dequantize(model, params, image, u, levels=task.dataset.levels)
        return scaler(x), log_q

    program = functools.cache(functools.partial(per_example, dequantize))  # one for each size of the batch

    def batch(examples: Split, unit: int, draw: int):
        repeat, image, index = examples.batch(unit, draw, dequantize=False, scale=False)
        number = np.full_like(index, examples.number_of_noise(repeat, draw))
        x, log_q = program(examples.size)(params, {}, image, index, number)
        return repeat, x, index, log_q

    settings = {"network": config.deq.network, "dequantizer": digest(state.ema_params)}
    return Dequantizer(batch, {"dequantization": "variational", **settings})
