# SPDX-License-Identifier: Apache-2.0
"""The score networks, by the name that `config.model.name` gives them.

A new network is one function from config to module and one line in MODELS. The module says by its attributes
`conditioning` and `predicts_score` how `models.score.get_score_fn` makes a score of it and, by `takes_images`, whether
it is one of images or of points; one of both leaves that out.
"""

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


def _ncsnpp(config: Any) -> NCSNpp:
    model = config.model
    for key, only in (("normalization", "GroupNorm"), ("attention_type", "ddpm"), ("data_init", False)):
        if model[key] != only:
            raise UserError(f"model.{key}={model[key]!r} is unknown; use {only}")
    return NCSNpp(
        nf=model.nf,
        ch_mult=tuple(model.ch_mult),
        num_res_blocks=model.num_res_blocks,
        attn_resolutions=tuple(model.attn_resolutions),
        conditioning="sigma" if sde_lib.from_config(config).conditions_on_sigma else "scaled_time",
        centered=config.data.centered,
        nonlinearity=model.nonlinearity.lower(),
        dropout=float(model.dropout),
        resamp_with_conv=model.resamp_with_conv,
        conditional=model.conditional,
        fir=model.fir,
        fir_kernel=tuple(float(tap) for tap in model.fir_kernel),
        skip_rescale=model.skip_rescale,
        resblock_type=model.resblock_type.lower(),
        progressive=model.progressive.lower(),
        progressive_input=model.progressive_input.lower(),
        progressive_combine=model.progressive_combine.lower(),
        embedding_type=model.embedding_type.lower(),
        fourier_scale=float(model.fourier_scale),
        trainable_embedding=model.trainable_embedding,
        init_scale=float(model.init_scale),
        conv_size=model.conv_size,
        scale_by_sigma=model.scale_by_sigma,
        remat=model.remat,
        dtype=model.dtype.lower(),
    )


def _mlp(config: Any) -> MLP:
    model = config.model
    return MLP(
        sde=sde_lib.from_config(config),
        sigma_data=float(model.sigma_data),
        width=model.nf,
        num_layers=model.num_layers,
        activation=model.nonlinearity.lower(),
        dropout=float(model.dropout),
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
