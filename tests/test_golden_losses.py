# SPDX-License-Identifier: Apache-2.0
"""Loss terms, their parameter gradients and whole optimiser steps against numbers recorded from the public code.

Near t = 0 (|log alpha| <= 1e-3) the public VP takes a series for sigma, up to 5e-4 off. `PublicVPSDE` puts that branch
back for these comparisons alone; where no recorded t lies there, our own VP is compared as it is.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_utils import GOLDEN, golden_config, load_golden, load_params, relative_error
from quick import jit
from test_golden_likelihood import PublicVPSDE

import checkpoints
import losses
import sde_lib
from configs.default_configs import get_default_configs
from models import create_model
from models.score import get_score_fn

CASES = {"vp": ("lw0_iw0", "lw1_iw0", "lw1_iw1"), "ve": ("lw0_iw0", "lw1_iw0")}  # the public VE has no importance


def in_series(t):
    """Where the public VP's branch acts."""
    return np.abs(np.asarray(sde_lib.VPSDE().log_alpha(jnp.asarray(t)))) <= 1e-3


def set_up(arrays, public=False):
    """sde, (params) -> score function."""
    config = golden_config(arrays)
    model, sde = create_model(config), sde_lib.from_config(config)
    if public:
        sde = PublicVPSDE(beta_min=config.model.beta_min, beta_max=config.model.beta_max, N=config.model.num_scales)
    return sde, lambda params: get_score_fn(sde, model, params, {})


def draws_of(arrays, prefix):
    return losses.Draws(*(jnp.asarray(arrays[prefix + key]) for key in ("t", "z", "v")))


def fixed_draws(draws):
    """The training loss with given t, z, v; inside a jitted function, while it is traced."""
    return mock.patch.object(losses, "draw", lambda *args, **kwargs: draws)


def relative_norm(actual, expected):
    """|actual - expected| / |expected| over all leaves."""

    def norm(tree):
        return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))

    actual, expected = (jax.tree.map(np.float64, tree) for tree in (actual, expected))
    return float(norm(jax.tree.map(np.subtract, actual, expected)) / norm(expected))


def counts(state):
    """The step, Adam's count and the warm-up's."""
    return state.step, *(count for _, count in optax.tree_utils.tree_get_all_with_path(state.opt_state, "count"))


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_terms_of_every_order_and_weighting(name):
    arrays = load_golden(f"loss_{name}.npz")
    params = load_params(arrays)
    sde, score_fn_of = set_up(arrays, public=name == "vp")
    evaluate = jit(lambda x0, draws: losses.dsm_losses(sde, score_fn_of(params), x0, *draws, 3))
    for case in CASES[name]:
        draws = draws_of(arrays, f"{case}/")
        if name == "vp":  # the branch acts in the one case only whose times are drawn by importance
            ours = sde_lib.VPSDE().sigma(draws.t)
            np.testing.assert_array_equal(ours == sde.sigma(draws.t), ~in_series(draws.t))
            assert in_series(draws.t).any() == (case == "lw1_iw1")
        terms = evaluate(jnp.asarray(arrays["data"]), draws)
        config = get_default_configs().training
        config.update(likelihood_weighting="lw1" in case, importance_weighting="iw1" in case)
        first = losses.get_weighting(config)(sde, draws.t) * terms.first
        for key, term in zip(("loss1", "loss2_trace", "loss2_frob", "loss3"), (first, *terms[1:]), strict=True):
            np.testing.assert_allclose(term, arrays[f"{case}/{key}_per_sample"], rtol=1e-4, err_msg=f"{case} {key}")
        total = jnp.mean(first + terms.second_trace + terms.second_frobenius + terms.third)
        np.testing.assert_allclose(total, arrays[f"{case}/order3"][0], rtol=1e-4)


@pytest.mark.parametrize("order", [1, *(pytest.param(order, marks=pytest.mark.slow) for order in (2, 3))])
@pytest.mark.parametrize("name", ["vp", "ve"])
def test_parameter_gradients(name, order):
    arrays = load_golden(f"loss_{name}.npz")
    config = golden_config(arrays)
    config.training.score_matching_order = order
    draws, x0 = draws_of(arrays, "lw0_iw0/"), jnp.asarray(arrays["data"])
    sde, score_fn_of = set_up(arrays)
    assert name == "ve" or not in_series(draws.t).any()
    loss_fn = losses.get_loss_fn(config.training, sde, lambda params, state, key: score_fn_of(params))

    @jit
    def loss_and_grad(params):
        with fixed_draws(draws):
            return jax.value_and_grad(loss_fn, has_aux=True)(params, {}, x0, jnp.arange(4), jax.random.PRNGKey(0))

    (loss, _), grad = loss_and_grad(load_params(arrays))
    expected = load_params(load_golden(f"lossgrad_{name}_order{order}.npz"), "grad:")
    np.testing.assert_allclose(loss, arrays[f"lw0_iw0/order{order}"][0], rtol=1e-4)
    assert relative_norm(grad, expected) < 1e-4


@pytest.mark.parametrize("name", ["vp", pytest.param("ve", marks=pytest.mark.slow)])
def test_recorded_optimiser_steps_give_the_recorded_checkpoint(name):
    arrays = load_golden(f"ckpt_{name}_steps.npz")
    config = golden_config(arrays)
    assert config.training.score_matching_order == int(arrays["order"])
    assert name == "ve" or not any(in_series(arrays[f"step{i}_t"]).any() for i in range(3))
    sde, score_fn_of = set_up(arrays)
    optimizer = losses.get_optimizer(config.optim)
    loss_fn = losses.get_loss_fn(config.training, sde, lambda params, state, key: score_fn_of(params))
    step_fn = losses.get_step_fn(loss_fn, optimizer, config.model.ema_rate, axis_name=None)

    @jit
    def step(state, x0, draws):
        with fixed_draws(draws):
            return step_fn(state, x0)

    params = load_params(arrays, "init_params:")
    state = losses.TrainState(
        jnp.zeros((), jnp.int32), params, params, jit(optimizer.init)(params), {}, jax.random.PRNGKey(0)
    )
    for i in range(3):
        state, metrics = step(state, jnp.asarray(arrays[f"step{i}_data"]), draws_of(arrays, f"step{i}_"))
        ours = [metrics[key] for key in ("loss", "first", "second", "third", "grad_norm")]
        recorded = [*arrays[f"step{i}_losses"], arrays[f"step{i}_grad_norm"]]
        np.testing.assert_allclose(ours, recorded, rtol=1e-4)

    path = GOLDEN / f"ckpt_{name}" / "checkpoint_3"
    saved = checkpoints.into(state, checkpoints.load_legacy(path), path)
    final = load_params(arrays, "final_params:")
    assert relative_norm(saved.params, final) == 0
    assert relative_norm(state.params, final) < 1e-5
    assert relative_norm(state.ema_params, saved.ema_params) < 1e-5
    moved, wanted = (
        jax.tree.map(np.subtract, jax.device_get(new), jax.device_get(params)) for new in (state.params, final)
    )
    assert relative_norm(moved, wanted) < 2e-4  # the steps themselves, a thousandth of the parameters
    for leaf, expected in zip(jax.tree.leaves(state.params), jax.tree.leaves(final), strict=True):
        assert relative_error(leaf, expected) < 1e-4
    for moment in ("mu", "nu"):  # mu is a sum of the three clipped gradients
        ours, theirs = (optax.tree_utils.tree_get(s.opt_state, moment) for s in (state, saved))
        assert relative_norm(ours, theirs) < 1e-4
    for ours, theirs in zip(counts(state), counts(saved), strict=True):
        assert int(ours) == int(theirs) == 3
