# SPDX-License-Identifier: Apache-2.0
"""Gradients of a training step under pmap on two devices; a program, as the devices are made when JAX starts.

The times are antithetic, so an example's depends on its place in the global batch.

Takes the order of the loss. Prints as JSON, for each option, the distance |a - b| / |b| of each device's gradient from
that of one device without the option.
"""

import functools
import json
import sys

import jax
import numpy as np
import optax
from test_losses import training_config
from test_models import random_params, tiny_config

import losses
import sde_lib
from models import create_model
from models.score import get_score_fn

SHAPE = (4, 4, 3)
CASES = {"plain": {}, "remat": {"remat": True}, "bfloat16": {"dtype": "bfloat16"}, "num_microbatches": {}}


def gradient(order, devices, num_microbatches=1, **options):
    """With dropout; from Adam's first moment after one step, one copy a device."""
    small = {"nf": 4, "ch_mult": (1,), "attn_resolutions": (), "resblock_type": "ddpm", "dropout": 0.3}
    config = tiny_config("vpsde", **small, **options)
    config.optim.grad_clip = -1.0
    model, sde = create_model(config), sde_lib.from_config(config)

    def score_fn_of(params, model_state, keys):
        return get_score_fn(sde, model, params, model_state, train=True, dropout_keys=keys)

    training = training_config(score_matching_order=order, time_sampling="velocity")
    loss_fn = losses.get_loss_fn(training, sde, score_fn_of, antithetic=8)
    optimizer = losses.get_optimizer(config.optim)
    step_fn = losses.get_step_fn(loss_fn, optimizer, 0.9, num_microbatches=num_microbatches)
    params = random_params(model, (1, *SHAPE), dtype=np.float64)
    state = losses.TrainState(np.int32(0), params, params, optimizer.init(params), {}, jax.random.PRNGKey(0))
    devices = jax.devices()[:devices]
    x0 = np.random.default_rng(0).random((len(devices), 8 // len(devices), *SHAPE))
    p_step = functools.partial(jax.pmap, axis_name="batch", devices=devices)(step_fn)
    state, _ = p_step(jax.tree.map(lambda leaf: np.stack([leaf] * len(devices)), state), x0)
    return jax.device_get(optax.tree.get(state.opt_state, "mu"))


def distance(a, b):
    return float(optax.tree.norm(jax.tree.map(np.subtract, a, b)) / optax.tree.norm(b))


if __name__ == "__main__":
    order = int(sys.argv[1])
    with jax.enable_x64(True):
        whole = jax.tree.map(lambda leaf: leaf[0], gradient(order, 1))
        found = {}
        for case, options in CASES.items():
            of_two = gradient(order, 2, num_microbatches=2 if case == "num_microbatches" else 1, **options)
            found[case] = [distance(jax.tree.map(lambda leaf, k=k: leaf[k], of_two), whole) for k in range(2)]
    print(json.dumps(found))
