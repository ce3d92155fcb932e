"""From the output of a network to the score."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float, PRNGKeyArray

from sde_lib import SDE

ScoreFn = Callable[[Array, Array], Array]

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
    dropout_key: PRNGKeyArray | None = None,
) -> ScoreFn:
    """The score x [B, ...], t [B] -> [B, ...] of a network with the given parameters.

    `model.conditioning`, a key of CONDITIONS, says what it is told of t; `model.predicts_score`, whether its output is
    the score or minus sigma times the score.
    `train` switches dropout on; it needs `dropout_key` then, and every call of the returned function has the same mask.
    """
    variables = {"params": params, **model_state}
    rngs = {} if dropout_key is None else {"dropout": dropout_key}

    def score_fn(x: Float[Array, "B *shape"], t: Float[Array, "B"]) -> Float[Array, "B *shape"]:
        output: Any = model.apply(variables, x, CONDITIONS[model.conditioning](sde, t), train=train, rngs=rngs)
        if model.predicts_score:
            return output
        return -output / sde.sigma(t).reshape(t.shape + (1,) * (x.ndim - 1))

    return score_fn
