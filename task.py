# SPDX-License-Identifier: Apache-2.0
"""Builds what a config describes, once for all modes: the SDE, the data, the network, the optimiser, their state."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import linen as nn

import checkpoints
import datasets
import losses
import models
import sde_lib
from configs.check import check_config, flatten
from configs.default_configs import get_default_configs
from errors import UserError
from models import flowpp
from models.score import get_score_fn

MAX_EXACT_DIM = 1024  # an exact Jacobian is refused above it

Config = Any  # an ml_collections.ConfigDict, whose keys have no types


class Task(NamedTuple):
    """The objects that a config describes."""

    config: Config
    sde: sde_lib.SDE
    dataset: datasets.Dataset
    model: nn.Module
    optimizer: Any

    def score_fn(self, params, model_state, dropout_keys=None) -> losses.ScoreFn:
        """The score of the network; in training mode if there are dropout keys, one for each example."""
        train = dropout_keys is not None
        return get_score_fn(self.sde, self.model, params, model_state, train=train, dropout_keys=dropout_keys)

    @property
    def inverse_scaler(self) -> Callable:
        """Maps images from the network's range to [0, 1]; the identity for points."""
        return datasets.get_data_inverse_scaler(self.config.data.centered and self.dataset.is_image)

    def init_state(self) -> losses.TrainState:
        """The state before the first step, on one device."""
        init_key, key = jax.random.split(jax.random.PRNGKey(self.config.seed))
        params, model_state = models.init_params(self.model, init_key, (1, *self.dataset.shape))
        return new_state(params, model_state, self.optimizer, key)


def new_state(params: Any, model_state: Any, optimizer: Any, key: Any) -> losses.TrainState:
    """The state before the first step."""
    opt_state = jax.jit(optimizer.init)(params)  # one program, not one for each shape
    step = jnp.zeros((), jnp.int32)
    return losses.TrainState(step, params, ema_params=params, opt_state=opt_state, model_state=model_state, key=key)


def dequantizer_state(task: Task, model: flowpp.Dequantizer, images: np.ndarray | None = None) -> losses.TrainState:
    """The state of the variational dequantiser, initialised from images [B, H, W, C] in [0, 1].

    Without images it has `jax.ShapeDtypeStruct`s in place of arrays.
    """
    init_key, u_key, key = jax.random.split(jax.random.PRNGKey(task.config.seed), 3)

    def init(images):
        u = jax.random.normal(u_key, images.shape)
        return new_state(flowpp.init_params(model, init_key, images, u), {}, task.optimizer, key)

    if images is None:
        return jax.eval_shape(init, jax.ShapeDtypeStruct((1, *task.dataset.shape), jnp.float32))
    return init(jnp.asarray(images))


def build(config: Config) -> Task:
    """Checks the config and makes the task. Raises UserError if the config or the data are at fault."""
    check_config(config)
    devices = jax.device_count()
    for key in ("training.batch_size", "eval.batch_size"):
        if (size := flatten(config)[key]) % devices:
            raise UserError(f"{key}={size} is not divisible by the {devices} devices of this run")
    size, count = config.training.batch_size, config.training.num_microbatches
    if size // devices % count:
        raise UserError(
            f"training.batch_size={size} on {devices} device(s) does not fall into "
            f"training.num_microbatches={count} equal parts; let that divide {size // devices}"
        )
    sde, model, optimizer = sde_lib.from_config(config), models.create_model(config), losses.get_optimizer(config.optim)
    dataset = datasets.load(config.data)
    _check_fit(config, model, dataset)
    return Task(config, sde, dataset, model, optimizer)


def restored(workdir: Path) -> tuple[Task, Any, Any]:
    """The task of a run, and EMA parameters and model state of its newest checkpoint. UserError without one."""
    path = checkpoints.find(workdir / "checkpoints", 0)
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir} has no config.json: it is not the workdir of a run of ours")
    config = get_default_configs()  # for keys that came after the run
    config.update(ml_collections.ConfigDict(json.loads((workdir / "config.json").read_text())))
    state = checkpoints.restore(path).state
    return build(config), state["ema_params"], state.get("model_state", {})


def _check_fit(config: Config, model: nn.Module, dataset: datasets.Dataset) -> None:
    """Raises UserError if the network or an option does not fit the data: images or points, number of dimensions."""
    takes_images = getattr(model, "takes_images", dataset.is_image)
    if takes_images != dataset.is_image:
        taken, given = ("images", "points") if takes_images else ("points", "images")
        raise UserError(
            f"model.name={config.model.name!r} takes {taken}, but data.dataset={config.data.dataset!r} has {given}; "
            "of ours, ncsnpp takes images and mlp points"
        )
    if not dataset.is_image and config.eval.dequantization != "uniform":
        raise UserError(
            f"eval.dequantization={config.eval.dequantization!r} with data.dataset={config.data.dataset!r}: points are "
            "continuous; set eval.dequantization=uniform"
        )
    if config.eval.dequantizer and not dataset.is_image:
        raise UserError(
            f"eval.dequantizer=True with data.dataset={config.data.dataset!r}: points are continuous; "
            "set eval.dequantizer=False"
        )
    dim, order = math.prod(dataset.shape), config.training.score_matching_order
    asked = {
        "training.exact_jacobian=True": config.training.exact_jacobian and order > 1,
        "eval.hutchinson_type='exact'": config.eval.hutchinson_type == "exact",
    }
    for what, is_asked in asked.items():
        if is_asked and dim > MAX_EXACT_DIM:
            raise UserError(
                f"{what} with the {dim} dimensions of data.dataset={config.data.dataset!r}: {dim} passes of the "
                f"network and {dim**2:,} numbers ({dim**2 / 2**18:.3g} MiB) an example; above {MAX_EXACT_DIM} "
                "dimensions use a probe (exact_jacobian=False, hutchinson_type=rademacher)"
            )
