# SPDX-License-Identifier: Apache-2.0
"""`eval.enable_sampling`: samples of the model and, of images (`eval.enable_metrics`), their IS, FID and KID."""

import math
from typing import Any

import jax
import numpy as np

import evaluation
import report
import sampling
from errors import UserError
from evaluators.context import Context, Evaluator, round_up, settings_except
from evaluators.dequantized import Dequantizer
from parts import Parts, shard

# What of `config.sampling` the one kind of sampler does not read.
CANNOT_MATTER = {
    "ode": ("predictor", "corrector", "n_steps_each", "probability_flow", "snr"),
    "pc": ("rtol", "atol"),
}


def sampler(parts: Parts):
    """(params, model_state, keys [b, ...]) -> samples [b, ...], evaluations of the score [b], over local devices.

    A sample is a function of its key (with Langevin's corrector: of all keys), not of the number of devices.
    """
    sample = sampling.get_sampling_fn(
        parts.config.sampling, parts.sde, parts.dataset.shape, parts.inverse_scaler, axis_name="batch"
    )

    def fn(params, model_state, keys):
        return sample(parts.score_fn(params, model_state), keys)

    p_fn = jax.pmap(fn, axis_name="batch", devices=jax.local_devices())

    def call(params, model_state, keys):
        x, nfe = p_fn(params, model_state, shard(np.asarray(keys)))
        return np.asarray(x).reshape(-1, *x.shape[2:]), np.asarray(nfe).reshape(-1)

    return call


def sample_keys(seed: int, index: np.ndarray) -> np.ndarray:
    """[b, 2], of samples number `index`."""
    return np.asarray(jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.PRNGKey(seed), index))


def count_failed(samples: np.ndarray) -> int:
    """Samples that the solver gave up on."""
    return int(np.sum(~np.isfinite(samples).reshape(len(samples), -1).all(axis=1)))


def evaluator(parts: Parts, dequantizer: Dequantizer) -> Evaluator:
    config, is_image = parts.config.eval, parts.dataset.is_image
    size, count = min(config.batch_size, round_up(config.num_samples)), config.num_samples
    draw = sampler(parts)
    name = _name(parts.config.sampling)
    settings = settings_except(parts.config.sampling, *CANNOT_MATTER[parts.config.sampling.method.lower()])
    metrics = _metrics(parts) if is_image and config.enable_metrics else None  # before hours of sampling: is all there?

    def evaluate(context: Context) -> dict[str, Any]:
        def unit(k: int) -> dict[str, np.ndarray]:
            # always a whole round: Langevin's step size is a mean over it
            keys = sample_keys(parts.config.seed + 1, np.arange(k * size, (k + 1) * size))
            x, nfe = draw(context.params, context.model_state, keys)
            if failed := count_failed(x):
                raise UserError(
                    f"the sampling ODE failed on {failed} of {len(x)} samples: it reached its step limit or a "
                    "non-finite state; loosen sampling.rtol/atol, or train further"
                )
            return {"samples": np.round(np.clip(x, 0, 1) * 255).astype(np.uint8) if is_image else x, "nfe": nfe}

        units = context.units("samples", {"size": size, **settings})
        rows = units.run(math.ceil(count / size), unit, "sampling")
        samples, nfe = (np.concatenate([row[key] for row in rows])[:count] for key in ("samples", "nfe"))
        context.write("samples", samples=samples)
        if is_image and jax.process_index() == 0:
            report.save_image_grid(context.file("samples", "png"), samples[:64])
        facts = {"method": name, "num_samples": len(samples), "nfe": float(nfe.mean())}
        result: dict[str, Any] = {"sampling": {**facts, "settings": settings}}
        if metrics is not None:
            result |= metrics(context, samples, {"size": size, "count": count, **settings})
        return result

    return evaluate


def _name(sampling_config: Any) -> str:
    """For a table: 'ode', or 'pc' with predictor and corrector."""
    parts = (sampling_config.predictor, sampling_config.corrector)
    return "ode" if sampling_config.method.lower() == "ode" else f"pc ({' and '.join(parts)})"


def _metrics(parts: Parts):
    """(context, samples uint8 [N, H, W, C], what they are) -> IS, FID and KID, features computed in units."""
    config = parts.config.eval
    features = evaluation.load_features(config.inception_path)
    statistics = evaluation.load_statistics(
        evaluation.statistics_path(parts.config.data, config.stats_path), parts.config.data
    )

    def compute(context: Context, samples: np.ndarray, facts: dict[str, Any]) -> dict[str, Any]:
        size = facts["size"]

        def unit(k: int) -> dict[str, np.ndarray]:
            images = samples[k * size : (k + 1) * size]
            pool_3, logits = features.fn(images, config.inception_batch_size)
            return {"pool_3": pool_3, "logits": logits}

        units = context.units("features", {**facts, "features": features.hash})
        rows = units.run(math.ceil(len(samples) / size), unit, "features of the samples")
        pool_3, logits = (np.concatenate([row[key] for row in rows]) for key in ("pool_3", "logits"))
        return evaluation.sample_metrics(features, statistics, pool_3, logits, config)

    return compute
