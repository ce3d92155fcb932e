# SPDX-License-Identifier: Apache-2.0
"""From the output of a network to the score."""

import contextlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from sde_lib import SDE, ScoreFn

# what a network is told about the time t, by its `conditioning`
CONDITIONS: dict[str, Callable[[SDE, Array], Array]] = {
    "time": lambda sde, t: t,
    "scaled_time": lambda sde, t: 999 * t,
    "sigma": lambda sde, t: sde.sigma(t),
}


def get_score_fn(
    sde: SDE,
    model: nn.Module,
    params: Mapping[str, Any],
    model_state: Mapping[str, Any],
    train: bool = False,
    dropout_keys: Shaped[Array, "B *key"] | None = None,
) -> ScoreFn:
    """The score x [B, ...], t [B] -> [B, ...] of a network with the given parameters.

    `model.conditioning`, a key of CONDITIONS, says what it is told of t; `model.predicts_score`, whether its output is
    the score or minus sigma times the score.
    `train` switches dropout on; it needs `dropout_keys` then, one for each example. An example's masks are a function
    of its key alone, so they do not depend on how a batch is spread over devices, and every call has the same.
    """
    variables = {"params": params, **model_state}

    def score_fn(x: Float[Array, "B *shape"], t: Float[Array, "B"]) -> Float[Array, "B *shape"]:
        with nn.intercept_methods(_masks_of(dropout_keys)) if train else contextlib.nullcontext():
            output: Any = model.apply(variables, x, CONDITIONS[model.conditioning](sde, t), train=train)
        if model.predicts_score:
            return output
        return -output / sde.sigma(t).reshape(t.shape + (1,) * (x.ndim - 1))

    return score_fn


def _masks_of(keys: Array | None) -> Callable:
    """Gives every `nn.Dropout` of a network masks from one key for each example, where flax has one for the batch."""

    def interceptor(next_fn, args, kwargs, context):
        module = context.module
        if not isinstance(module, nn.Dropout) or kwargs["deterministic"] or module.rate == 0:
            return next_fn(*args, **kwargs)
        if keys is None:
            raise ValueError("a network with dropout in training mode needs dropout_keys")
        (x,), layer, keep = args, zlib.crc32("/".join(module.path).encode()), 1 - module.rate

        def mask(key):
            return jax.random.bernoulli(jax.random.fold_in(key, layer), keep, x.shape[1:])

        return jnp.where(jax.vmap(mask)(keys), x / keep, 0)

    return interceptor
