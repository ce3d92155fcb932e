# SPDX-License-Identifier: Apache-2.0
"""Makes continuous images of 8-bit ones for an evaluation, by uniform noise or by the variational dequantiser."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
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
    """batch(examples, unit) -> repeat, x [b, ...], index [b] and log q [b] of the noise in nats, 0 if it is uniform."""

    batch: Callable[[Split, int], tuple[int, np.ndarray, np.ndarray, np.ndarray]]
    settings: dict[str, Any]


def uniform() -> Dequantizer:
    """Adds u / 256 with u uniform in [0, 1) to images, and leaves points as they are."""

    def batch(examples: Split, unit: int):
        repeat, x, index = examples.batch(unit)
        return repeat, x, index, np.zeros(len(x), np.float32)

    return Dequantizer(batch, {"dequantization": "uniform"})


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

    def batch(examples: Split, unit: int):
        repeat, image, index = examples.batch(unit, dequantize=False, scale=False)
        x, log_q = program(examples.size)(params, {}, image, index, np.full_like(index, repeat))
        return repeat, x, index, log_q

    settings = {"network": config.deq.network, "dequantizer": digest(state.ema_params)}
    return Dequantizer(batch, {"dequantization": "variational", **settings})
