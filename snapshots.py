# SPDX-License-Identifier: Apache-2.0
"""What a snapshot of the training shows beside its checkpoint: samples of the model."""

import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

import losses
import report
from evaluators.samples import is_whole, sampler
from parts import Parts, replicate
from runtime.records import write_npz


def sample_saver(parts: Parts, workdir: Path) -> Callable[[losses.TrainState, int], bytes]:
    """(state, step) -> a picture of 64 images or 1,000 points, as a PNG; writes `samples/step_<step>` too.

    Of images that file is the picture, of points it has the samples.
    """
    count = 64 if parts.dataset.is_image else 1000
    draw = sampler(parts)
    devices = jax.local_devices()
    padded = math.ceil(count / len(devices)) * len(devices)

    def save_samples(state: losses.TrainState, step: int) -> bytes:
        params, model_state = jax.tree.map(lambda x: x.addressable_data(0)[0], (state.ema_params, state.model_state))
        keys = jax.random.fold_in(jax.random.PRNGKey(parts.config.seed), step)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(keys, jnp.arange(padded))
        samples, _ = draw(replicate(params, devices), replicate(model_state, devices), keys)
        samples, path = samples[:count], workdir / "samples" / f"step_{step:08d}"
        if failed := int(np.sum(~is_whole(samples))):
            logging.warning("the sampler failed on %d of %d samples of step %d", failed, len(samples), step)
        if parts.dataset.is_image:
            report.save_image_grid(path.with_suffix(".png"), samples)
            return path.with_suffix(".png").read_bytes()
        write_npz(path.with_suffix(".npz"), samples=samples)
        shown = samples[is_whole(samples)]
        return report.points_picture(shown, parts.dataset.test[np.arange(min(5000, len(parts.dataset.test)))])

    return save_samples
