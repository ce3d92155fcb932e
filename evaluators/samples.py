# SPDX-License-Identifier: Apache-2.0
"""`eval.enable_sampling`: samples of the model and, if they are images (`eval.enable_metrics`), IS, FID and KID."""

import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

import datasets
import evaluation
import losses
import report
import sampling
from evaluators import inception
from evaluators.context import Context, Evaluator, fold_in_each, round_up, settings_except
from evaluators.dequantized import Dequantizer
from runtime.devices import all_devices, on_this_host, shard
from runtime.records import write_npz
from task import Task

# The keys of `config.sampling` that a kind of sampler does not read.
CANNOT_MATTER = {
    "ode": ("predictor", "corrector", "n_steps_each", "probability_flow", "snr"),
    "pc": ("rtol", "atol"),
}

# Why a sample fails, and what to do.
FAILURE = {
    "ode": "its ODE reached the step limit or a state that is not finite; loosen sampling.rtol/atol",
    "pc": "its state is not finite; raise model.num_scales or lower sampling.snr",
}


def sampler(task: Task, devices: list | None = None):
    """(params, model_state, keys [b, ...]) -> samples [b, ...], evaluations of the score [b], all of this host.

    devices: those that draw together, by default this host's. If they are several hosts', each host gives its own keys.
    A sample is a function of its key (with Langevin's corrector: of all keys), not of the number of devices.
    """
    config, shape = task.config.sampling, task.dataset.shape
    sample = sampling.get_sampling_fn(config, task.sde, shape, task.inverse_scaler, axis_name="batch")

    def fn(params, model_state, keys):
        with jax.default_matmul_precision(config.matmul_precision):
            return sample(task.score_fn(params, model_state), keys)

    p_fn = jax.pmap(fn, axis_name="batch", devices=devices or jax.local_devices())

    def call(params, model_state, keys):
        x, nfe = p_fn(params, model_state, shard(np.asarray(keys)))
        return on_this_host(x), on_this_host(nfe)

    return call


def is_whole(samples: np.ndarray) -> np.ndarray:
    """Whether each sample [b] is finite, so that the sampler did not give up on it."""
    return np.all(np.isfinite(samples.reshape(len(samples), -1)), axis=1)


def evaluator(task: Task, dequantizer: Dequantizer) -> Evaluator:
    config, is_image = task.config.eval, task.dataset.is_image
    size, count = min(config.batch_size, round_up(config.num_samples)), config.num_samples
    draw = sampler(task)
    sampling_config = task.config.sampling
    method = sampling_config.method.lower()
    pc = f"pc ({sampling_config.predictor} and {sampling_config.corrector})"
    name = "ode" if method == "ode" else pc
    settings = settings_except(sampling_config, *CANNOT_MATTER[method])
    as_pixels = functools.partial(
        datasets.to_8_bits, levels=task.dataset.levels, dequantized=task.config.data.uniform_dequantization
    )
    metrics = _metrics(task) if is_image and config.enable_metrics else None  # before hours of sampling: is all there?

    def evaluate(context: Context) -> dict[str, Any]:
        def unit(k: int) -> dict[str, np.ndarray]:
            # The last unit has `size` samples as well, because Langevin's step size is a mean over them.
            keys = fold_in_each(jax.random.PRNGKey(task.config.seed + 1), np.arange(k * size, (k + 1) * size))
            x, nfe = draw(context.params, context.model_state, keys)
            whole = is_whole(x)
            if not whole.all():
                failed = f"{np.sum(~whole)} of {len(x)} samples"
                logging.warning("the sampler (%s) failed on %s: %s, or train further", name, failed, FAILURE[method])
            x = as_pixels(x[whole]) if is_image else x[whole]
            return {"samples": x, "nfe": nfe, "whole": whole}

        rows = context.run("samples", {"size": size, **settings}, math.ceil(count / size), unit, "sampling")

        def samples(k: int) -> np.ndarray:
            """The samples of unit k. The last unit may have drawn more than were asked for, which are left out."""
            row = rows[k]
            return row["samples"][: np.sum(row["whole"][: count - k * size])]

        nfe, whole = (np.concatenate([row[key] for row in rows])[:count] for key in ("nfe", "whole"))
        num_samples = int(whole.sum())
        context.write_rows("samples", num_samples, map(samples, range(len(rows))))
        if is_image and num_samples and jax.process_index() == 0:
            shown = itertools.islice((image for k in range(len(rows)) for image in samples(k)), 64)
            report.save_image_grid(context.file("samples", "png"), np.stack(list(shown)))
        facts = {"method": name, "num_samples": num_samples, **evaluation.failures(count - num_samples)}
        result: dict[str, Any] = {"sampling": {**facts, "nfe": float(nfe.mean()), "settings": settings}}
        if metrics is not None:
            result |= metrics(context, samples, len(rows), {"size": size, "count": count, **settings})
        return result

    return evaluate


def _metrics(task: Task):
    """(context, k -> samples uint8 [b, H, W, C] of unit k, number of units, their settings) -> IS, FID and KID."""
    config, data = task.config.eval, task.config.data
    evaluation.check_levels(task.dataset)
    features = inception.load_features(config.inception_path)
    statistics = evaluation.load_statistics(evaluation.statistics_path(data, config.stats_path), data)

    def compute(context: Context, samples: Callable, num_units: int, facts: dict[str, Any]) -> dict[str, Any]:
        def unit(k: int) -> dict[str, np.ndarray]:
            pool_3, logits = features.fn(samples(k), config.inception_batch_size)
            return {"pool_3": pool_3, "logits": logits}

        rows = context.run("features", {**facts, "features": features.hash}, num_units, unit, "features of the samples")
        pool_3, logits = (np.concatenate([row[key] for row in rows]) for key in ("pool_3", "logits"))
        return evaluation.sample_metrics(features, statistics, pool_3, logits, config)

    return compute


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
