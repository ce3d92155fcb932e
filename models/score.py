# SPDX-License-Identifier: Apache-2.0
"""The score function made from the output of a network."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from models.layers import dropout
from sde_lib import SDE, ScoreFn, batch_mul

# A network's `conditioning` -> the function of the time t that the network takes.
CONDITIONS: dict[str, Callable[[SDE, Array], Array]] = {
    "time": lambda sde, t: t,
    "scaled_time": lambda sde, t: 999 * t,
    "sigma": lambda sde, t: sde.sigma(t),
    "log_snr": lambda sde, t: sde.log_snr(t),
}


def get_score_fn(
    sde: SDE,
    model: nn.Module,
    params: Mapping[str, Any],
    model_state: Mapping[str, Any],
    train: bool = False,
    dropout_keys: Shaped[Array, "B *key"] | None = None,
) -> ScoreFn:
    """Makes the score x [B, ...], t [B] -> [B, ...] of a network F with the given parameters.

    `model.conditioning`, a key of CONDITIONS, names the function of t that F takes. `model.parameterization` names what
    F predicts (in the notation of `losses`):

        "score":     s = F(x, t)
        "noise":     s = -F(x, t) / sigma
        "velocity":  s = -x / v - alpha S F(x / sqrt(v), t) / (sigma sqrt(v)),  v = alpha^2 S^2 + sigma^2

    S = `model.sigma_data` is the standard deviation of the data. A velocity network has inputs and targets of unit
    variance at every t, for every process, and F = 0 is exact for N(0, S^2 I). The form is that of Karras et al. 2022,
    arXiv 2206.00364, section 5, for any alpha; for VP and S = 1 it is v-prediction.

    `train` switches dropout on and needs `dropout_keys`, one for each example. An example's masks are a function of its
    key alone, the same in every call.
    """
    variables = {"params": params, **model_state}

    def apply(x, t) -> Any:
        with nn.intercept_methods(_masks_of(dropout_keys)) if train else contextlib.nullcontext():
            return model.apply(variables, x, CONDITIONS[model.conditioning](sde, t), train=train)

    def score_fn(x: Float[Array, "B *shape"], t: Float[Array, "B"]) -> Float[Array, "B *shape"]:
        if model.parameterization == "score":
            return apply(x, t)
        sigma = sde.sigma(t)
        if model.parameterization == "noise":
            return batch_mul(-1 / sigma, apply(x, t))
        signal = model.sigma_data * sde.alpha(t)
        std = jnp.sqrt(jnp.square(signal) + jnp.square(sigma))
        correction = batch_mul(signal / (sigma * std), apply(batch_mul(1 / std, x), t))
        return -batch_mul(1 / jnp.square(std), x) - correction

    return score_fn


def _masks_of(keys: Array | None) -> Callable:
    """Gives every `nn.Dropout` of a network its masks from one key for each example; flax has one for the batch."""

    def interceptor(next_fn, args, kwargs, context):
        module = context.module
        if not isinstance(module, nn.Dropout) or kwargs["deterministic"]:
            return next_fn(*args, **kwargs)
        if keys is None:
            raise ValueError("a network with dropout in training mode needs dropout_keys")
        return dropout(args[0], module.rate, keys, "/".join(module.path))

    return interceptor
