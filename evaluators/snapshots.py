# SPDX-License-Identifier: Apache-2.0
"""Samples of the model, drawn in training with each snapshot."""

import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

import losses
import report
from evaluators.context import fold_in_each
from evaluators.samples import is_whole, sampler
from runtime.devices import all_devices
from runtime.records import write_npz
from task import Task


def sample_saver(task: Task, workdir: Path) -> Callable[[losses.TrainState, int], bytes | None]:
    """(state, step) -> a picture of 64 images or 1,000 points, as a PNG.

    The images are also written to `samples/step_<step>.png`, or the points to `.npz`. Every host draws its share, so
    that none waits for another. The first one writes, and the others get None.
    """
    count = 64 if task.dataset.is_image else 1000
    draw = sampler(task, all_devices())
    padded = math.ceil(count / jax.device_count()) * jax.device_count()

    def save_samples(state: losses.TrainState, step: int) -> bytes | None:
        index = np.arange(padded).reshape(jax.process_count(), -1)[jax.process_index()]
        key = jax.random.fold_in(jax.random.PRNGKey(task.config.seed), step)
        samples, _ = draw(state.ema_params, state.model_state, fold_in_each(key, index))
        if jax.process_count() > 1:
            samples = np.concatenate(multihost_utils.process_allgather(samples))
        if jax.process_index() != 0:
            return None
        samples, path = samples[:count], workdir / "samples" / f"step_{step:08d}"
        if failed := int(np.sum(~is_whole(samples))):
            logging.warning("the sampler failed on %d of %d samples of step %d", failed, len(samples), step)
        if task.dataset.is_image:
            report.save_image_grid(path.with_suffix(".png"), samples)
            return path.with_suffix(".png").read_bytes()
        write_npz(path.with_suffix(".npz"), samples=samples)
        test = task.dataset.test[np.arange(min(5000, len(task.dataset.test)))]
        return report.points_picture(samples[is_whole(samples)], test)

    return save_samples
