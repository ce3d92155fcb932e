# SPDX-License-Identifier: Apache-2.0
"""The score networks, by the name that `config.model.name` gives them.

A new network is one function from config to module and one line in MODELS. The module's attributes `conditioning` and
`parameterization` tell `models.score.get_score_fn` how to make a score of it. Its attribute `takes_images` tells
whether it is a network of images or of points; a network of both leaves it out.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

import sde_lib
from errors import UserError
from models.mlp import MLP
from models.ncsnpp import NCSNpp


def _plain(value: Any) -> Any:
    """A value of the config as a module takes it: names in lower case, lists as tuples."""
    return value.lower() if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else value


def _ncsnpp(config: Any) -> NCSNpp:
    model, told_sigma = config.model, sde_lib.from_config(config).conditions_on_sigma
    parameterization = model.parameterization or ("score" if told_sigma else "noise")
    if told_sigma and model.embedding_type.lower() == "positional":
        raise UserError(
            "model.embedding_type='positional' embeds a time, but of this training.sde the network is told sigma; "
            "set model.embedding_type=fourier"
        )
    if model.scale_by_sigma and not (told_sigma and parameterization == "score"):
        raise UserError(
            "model.scale_by_sigma=True divides the output by the sigma that the network is told, which makes a score, "
            f"but with this training.sde it is to make a {parameterization} or is told the time; "
            "set model.scale_by_sigma=False"
        )
    fields = {field.name: field.type for field in dataclasses.fields(NCSNpp) if field.name in model}
    options: dict[str, Any] = {name: (float if kind is float else _plain)(model[name]) for name, kind in fields.items()}
    options |= {"fir_kernel": tuple(map(float, model.fir_kernel)), "name": None}
    options |= {"centered": config.data.centered, "parameterization": parameterization}
    return NCSNpp(**options, conditioning="sigma" if told_sigma else "scaled_time")


def _mlp(config: Any) -> MLP:
    model = config.model
    return MLP(
        width=model.nf,
        num_layers=model.num_layers,
        activation=model.nonlinearity.lower(),
        sigma_data=float(model.sigma_data),
        dropout=float(model.dropout),
        parameterization=model.parameterization or "velocity",
    )


MODELS: dict[str, Callable[[Any], nn.Module]] = {"ncsnpp": _ncsnpp, "mlp": _mlp}


def create_model(config: Any) -> nn.Module:
    """The network that `config` asks for; UserError if it asks for something unknown."""
    name = config.model.name.lower()
    if name not in MODELS:
        raise UserError(f"model.name={config.model.name!r} is unknown; use one of {', '.join(MODELS)}")
    return MODELS[name](config)


def init_params(model: nn.Module, key: PRNGKeyArray, x_shape: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fresh (params, model_state) for inputs of `x_shape` [B, ...]; the batch size does not matter."""
    x, time_cond = jnp.zeros((1, *x_shape[1:])), jnp.ones((1,))
    # Jitted, the forward pass that flax runs for the shapes is never computed. The program runs once: optimising it
    # would cost a CPU up to six times the compilation and change no number.
    init = jax.jit(model.init, compiler_options={"xla_backend_optimization_level": 0})
    if isinstance(key, jax.core.Tracer):  # inside another jit or eval_shape, which has its own options
        init = model.init
    variables: Any = init({"params": key}, x, time_cond)
    model_state = {name: value for name, value in variables.items() if name != "params"}
    return variables["params"], model_state
