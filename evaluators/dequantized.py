# SPDX-License-Identifier: Apache-2.0
"""How an evaluation of 8-bit images gets continuous ones: uniform noise, or the variational dequantiser's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

import checkpoints
import datasets
import dequantization
from evaluators.context import Split, per_example
from models.flowpp import create_dequantizer
from runtime.devices import digest, replicate
from task import Task, dequantizer_state

_NOISE_KEY = 2  # apart from the probes of the likelihood and the bound


class Dequantizer(NamedTuple):
    """batch(examples, unit) -> repeat, x [b, ...], index [b] and log q of the noise [b], nats (0 if uniform)."""

    batch: Callable[[Split, int], tuple[int, np.ndarray, np.ndarray, np.ndarray]]
    settings: dict[str, Any]


def uniform() -> Dequantizer:
    """u / 256, u uniform in [0, 1), which costs nothing; points are left as they are."""

    def batch(examples: Split, unit: int):
        repeat, x, index = examples.batch(unit)
        return repeat, x, index, np.zeros(len(x), np.float32)

    return Dequantizer(batch, {"dequantization": "uniform"})


def variational(task: Task, directory: Path) -> Dequantizer:
    """The one that `--mode train_deq` left in `directory`, its EMA parameters; UserError if there is none."""
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
        def normal(i, r):
            return jax.random.normal(jax.random.fold_in(jax.random.fold_in(seed, r), i), image.shape[1:])

        x, log_q = dequantization.dequantize(model, params, image, jax.vmap(normal)(index, repeat))
        return scaler(x), log_q

    programs: dict[int, Callable] = {}  # by size of the batch

    def batch(examples: Split, unit: int):
        if examples.size not in programs:
            programs[examples.size] = per_example(dequantize, examples.size)
        repeat, image, index = examples.batch(unit, dequantize=False, scale=False)
        x, log_q = programs[examples.size](params, {}, image, index, np.full_like(index, repeat))
        return repeat, x, index, log_q

    settings = {"network": config.deq.network, "dequantizer": digest(state.ema_params)}
    return Dequantizer(batch, {"dequantization": "variational", **settings})
