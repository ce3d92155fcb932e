# SPDX-License-Identifier: Apache-2.0
"""The score networks, by the name that `config.model.name` gives them.

A new network is one function from config to module and one line in MODELS. For the module's attributes `conditioning`
and `parameterization` see `models.score.get_score_fn`. `takes_images` tells whether it takes images or points; a
network that takes both has no such attribute.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

import sde_lib
from errors import UserError
from models.mlp import MLP
from models.ncsnpp import NCSNpp


def _ncsnpp(config: Any) -> NCSNpp:
    model, takes_log_snr = config.model, config.model.time_condition == "log_snr"
    takes_sigma = sde_lib.from_config(config).conditions_on_sigma and not takes_log_snr
    parameterization = model.parameterization or ("score" if takes_sigma else "noise")
    if takes_sigma and model.embedding_type.lower() == "positional":
        raise UserError(
            "model.embedding_type='positional' embeds a time, but with this training.sde the network takes sigma; "
            "set model.embedding_type=fourier"
        )
    if takes_log_snr and model.embedding_type.lower() == "fourier":
        raise UserError(
            "model.time_condition='log_snr' is scaled for a positional embedding; set model.embedding_type=positional"
        )
    if model.scale_by_sigma and not (takes_sigma and parameterization == "score"):
        raise UserError(
            "model.scale_by_sigma=True divides the output by the sigma that the network takes, which makes a score, "
            f"but with this training.sde the network is to make a {parameterization} or takes the time; "
            "set model.scale_by_sigma=False"
        )
    types: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(NCSNpp) if field.name in model}
    del types["name"]  # flax's own field
    options: dict[str, Any] = {key: (str.lower if kind is str else kind)(model[key]) for key, kind in types.items()}
    options |= {"fir_kernel": tuple(map(float, model.fir_kernel)), "parameterization": parameterization}
    return NCSNpp(
        **options,
        centered=config.data.centered or parameterization == "velocity",  # whose input has unit variance about 0
        conditioning="log_snr" if takes_log_snr else "sigma" if takes_sigma else "scaled_time",
    )


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
    """Makes the network that `config` asks for. UserError if its name is unknown or its options contradict the SDE."""
    name = config.model.name.lower()
    if name not in MODELS:
        raise UserError(f"model.name={config.model.name!r} is unknown; use one of {', '.join(MODELS)}")
    return MODELS[name](config)


def init_params(model: nn.Module, key: PRNGKeyArray, x_shape: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fresh (params, model_state) for inputs of `x_shape` [B, ...]; the batch size does not matter."""
    model_state = fresh_variables(model, key, jnp.zeros((1, *x_shape[1:])), jnp.ones((1,)))
    return model_state.pop("params"), model_state


def fresh_variables(model: nn.Module, key: PRNGKeyArray, *inputs: Array) -> dict[str, Any]:
    """`model.init` on the inputs as one program, so that unused parts of the forward pass are not computed."""
    # To optimise a program that runs once takes up to six times the compilation and changes no number.
    init = jax.jit(model.init, compiler_options={"xla_backend_optimization_level": 0})
    if any(isinstance(x, jax.core.Tracer) for x in (key, *inputs)):  # another jit or eval_shape has its own options
        init = model.init
    return dict(init({"params": key}, *inputs))
