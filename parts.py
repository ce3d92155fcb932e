"""What both jobs are built from: the config made into a process, data, a network and an optimiser."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import datasets
import losses
import models
import sde_lib
from configs.check import check_config, flatten
from errors import UserError
from models.score import get_score_fn

Config = Any  # an ml_collections.ConfigDict, whose keys have no types


class Parts(NamedTuple):
    """What both jobs are built from."""

    config: Config
    sde: sde_lib.SDE
    dataset: datasets.Dataset
    model: nn.Module
    optimizer: Any

    def score_fn(self, params, model_state, dropout_key=None) -> losses.ScoreFn:
        """Network to score; with a dropout key, in training mode."""
        train = dropout_key is not None
        return get_score_fn(self.sde, self.model, params, model_state, train=train, dropout_key=dropout_key)

    @property
    def inverse_scaler(self) -> Callable:
        """From the network's range to [0, 1] for images; the identity for points."""
        return datasets.get_data_inverse_scaler(self.config.data.centered and self.dataset.is_image)

    def init_state(self) -> losses.TrainState:
        """The state before the first step, on one device."""
        init_key, key = jax.random.split(jax.random.PRNGKey(self.config.seed))
        params, model_state = models.init_params(self.model, init_key, (1, *self.dataset.shape))
        return losses.TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema_params=params,
            opt_state=self.optimizer.init(params),
            model_state=model_state,
            key=key,
        )


def build(config: Config) -> Parts:
    """Checks the config and makes the parts. UserError says what is wrong with the config or the data."""
    check_config(config)
    devices = jax.device_count()
    for key in ("training.batch_size", "eval.batch_size"):
        if flatten(config)[key] % devices:
            raise UserError(f"{key}={flatten(config)[key]} is not divisible by the {devices} devices of this run")
    return Parts(
        config,
        sde_lib.from_config(config),
        datasets.load(config.data),
        models.create_model(config),
        losses.get_optimizer(config.optim),
    )


def replicate(tree):
    """One copy for each local device, on a new leading axis.

    The pmapped identity puts it where pmap's own results lie; else the first step would be compiled twice.
    """
    copies = jax.tree.map(lambda x: np.stack([x] * jax.local_device_count()), tree)
    return jax.pmap(lambda x: x)(copies) if jax.tree.leaves(copies) else copies


def first(tree):
    """The first device's copy, on the host."""
    return jax.tree.map(lambda x: np.asarray(x[0]), tree)


def shard(x: np.ndarray) -> np.ndarray:
    """[B, ...] to [local devices, B / devices, ...]."""
    return x.reshape(jax.local_device_count(), -1, *x.shape[1:])
