# SPDX-License-Identifier: Apache-2.0
"""Networks and scores against numbers recorded from the public code; options; the MLP; derivatives; dropout."""

import dataclasses
import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import golden_config, load_golden, load_params, relative_error
from quick import jit

import sde_lib
from configs.check import check_config
from configs.default_configs import get_default_configs
from errors import UserError
from models import create_model, init_params
from models.score import CONDITIONS, get_score_fn

RECORDED = ["vp16", "subvp16", "ve16", "church16", "v_ve_progres", "v_ve_catcomb", "v_vp_ddpmblk", "v_linearve"]


@pytest.mark.parametrize("name", RECORDED)
def test_output_and_score_as_recorded(name):
    recorded = load_golden(f"model_{name}.npz")
    config = golden_config(recorded)
    model, sde, params = create_model(config), sde_lib.from_config(config), load_params(recorded)
    x, t, labels = (jnp.array(recorded[key]) for key in ("x", "t", "labels"))

    @jit
    def raw_and_score(params):
        return model.apply({"params": params}, x, labels), get_score_fn(sde, model, params, {})(x, t)

    raw, score = raw_and_score(params)
    assert relative_error(raw, recorded["raw"]) < 2e-5
    assert relative_error(score, recorded["score"]) < 2e-5


def tiny_config(sde="vesde", **model) -> Any:
    """A network that traces and compiles fast, with any `model.` keys overwritten."""
    config: Any = get_default_configs()
    config.training.sde = sde
    config.model.update(nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,))
    if sde != "vesde":
        config.model.update(embedding_type="positional", scale_by_sigma=False)
    config.model.update(model)
    return config


def random_params(model, x_shape, scale=0.3, dtype: Any = np.float32):
    """Parameters of a network, all N(0, scale^2), so that no path is dead as it is in a fresh one."""
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(x_shape), jnp.ones(x_shape[0]))["params"]
    rng = np.random.RandomState(7)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.randn(*leaf.shape), dtype), params)


@pytest.mark.parametrize(
    "options",
    [
        dict(resblock_type="ddpm", resamp_with_conv=False, progressive="residual", skip_rescale=False),
        dict(resblock_type="ddpm", fir=False, progressive="output_skip", progressive_input="input_skip"),
        dict(conditional=False, progressive_input="none", conv_size=1, nonlinearity="elu", input_frequencies=(6, 7)),
        dict(conv_size=5, fir_kernel=(1, 2, 1), trainable_embedding=True, scale_by_sigma=False),
        dict(sde="vpsde", embedding_type="fourier", progressive="residual", fir=False, progressive_combine="cat"),
    ],
)
def test_every_option_traces_to_the_input_shape(options):
    config = tiny_config(**options)
    model = create_model(config)
    x, t = jnp.zeros((2, 8, 8, 3)), jnp.ones(2)
    variables = jax.eval_shape(model.init, jax.random.key(0), x, t)
    assert jax.eval_shape(model.apply, variables, x, t).shape == x.shape
    kernel = variables["params"]["ResnetBlock" + {"ddpm": "DDPMpp", "biggan": "BigGANpp"}[model.resblock_type] + "_0"]
    assert kernel["Conv_0"]["kernel"].shape[:2] == (config.model.conv_size,) * 2
    assert ("Dense_0" in variables["params"]) == config.model.conditional


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("progressive", "foo", "none, output_skip, residual"),
        ("progressive_input", "output_skip", "none, input_skip, residual"),
        ("progressive_combine", "mean", "sum, cat"),
        ("resblock_type", "resnet", "biggan, ddpm"),
        ("embedding_type", "learned", "fourier, positional"),
        ("nonlinearity", "gelu", "elu, relu, lrelu, swish"),
        ("normalization", "BatchNorm", "GroupNorm"),
        ("attention_type", "linear", "ddpm"),
        ("data_init", True, "False"),
        ("name", "unet", "ncsnpp, mlp"),
    ],
)
def test_unknown_option_is_refused_by_name(key, value, allowed):
    with pytest.raises(UserError) as error:
        config = tiny_config(**{key: value})
        check_config(config)
        create_model(config)
    one_of = "one of " if "," in allowed or key != "name" else ""
    assert re.fullmatch(f"model.{key}={value!r} is (unknown|not supported); use {one_of}{allowed}", str(error.value))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(embedding_type="positional"), "model.embedding_type='positional'.*set model.embedding_type=fourier"),
        (dict(sde="vpsde", scale_by_sigma=True), "model.scale_by_sigma=True.*set model.scale_by_sigma=False"),
        (dict(sde="linearvesde", scale_by_sigma=True), "model.scale_by_sigma=True.*set model.scale_by_sigma=False"),
        (dict(sde="powervesde", scale_by_sigma=True, told=False), "set model.scale_by_sigma=False"),
        (dict(sde="powervesde", told=True), "set model.embedding_type=fourier"),
    ],
)
def test_contradicting_options_are_refused(options, message, monkeypatch):
    told = options.pop("told", None)  # a newcomer's process
    monkeypatch.setitem(sde_lib.SDES, "powervesde", lambda model: Power(told=told))
    with pytest.raises(UserError, match=message) as error:
        create_model(tiny_config(**options))
    assert "\n" not in str(error.value)


@dataclasses.dataclass(frozen=True)
class Power(sde_lib.SDE):
    """sigma = (1 + 2 t)^3."""

    told: bool = False

    @property
    def conditions_on_sigma(self):
        return self.told

    def log_alpha(self, t):
        return jnp.zeros_like(t)

    def sigma(self, t):
        return (1 + 2 * t) ** 3


@pytest.mark.parametrize("told", [False, True])
def test_a_new_process_may_tell_the_network_sigma(monkeypatch, told):
    """Divided by the sigma that it is told, the output is the score; that of 999 t still wants the division."""
    sde, t = Power(told=told), jnp.array([0.2, 0.9])
    monkeypatch.setitem(sde_lib.SDES, "powervesde", lambda model: sde)
    model = create_model(tiny_config("powervesde", embedding_type="fourier", scale_by_sigma=told))
    told_of_t = [1.4**3, 2.8**3] if told else [199.8, 899.1]
    np.testing.assert_allclose(CONDITIONS[model.conditioning](sde, t), told_of_t, rtol=1e-5)
    assert model.parameterization == ("score" if told else "noise")


def test_uneven_channels_are_refused():
    with pytest.raises(UserError, match="9 channels"):
        init_params(create_model(tiny_config(nf=9)), jax.random.key(0), (1, 8, 8, 3))


def test_fresh_network_predicts_almost_nothing_and_init_is_a_function_of_the_key():
    """init_scale 0 leaves an output of order 1e-5, as 1e-10 stands for the variance scale 0."""
    model = create_model(tiny_config("vpsde", ch_mult=(1,), attn_resolutions=()))
    params, model_state = init_params(model, jax.random.key(3), (128, 8, 8, 3))
    assert model_state == {}
    again, _ = init_params(model, jax.random.key(3), (2, 8, 8, 3))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    traced, _ = jax.eval_shape(lambda key: init_params(model, key, (2, 8, 8, 3)), jax.random.key(3))
    assert jax.tree.map(jnp.shape, traced) == jax.tree.map(jnp.shape, params)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    out = jit(model.apply)({"params": params}, x, jnp.array([1.0, 900.0]))
    assert 0 < np.abs(out).max() < 1e-3


def test_dropout_masks_are_functions_of_the_examples_keys():
    config = tiny_config("vpsde", dropout=0.5, ch_mult=(1,))
    model, sde = create_model(config), sde_lib.from_config(config)
    params = random_params(model, (2, 8, 8, 3))
    x, t = jax.random.normal(jax.random.key(1), (2, 8, 8, 3)), jnp.array([0.3, 0.7])

    @jit
    def score(x, t, keys):
        score_fn = get_score_fn(sde, model, params, {}, train=True, dropout_keys=keys)
        return score_fn(x, t), score_fn(x, t)

    keys = jax.random.split(jax.random.key(5), 2)
    first, second = score(x, t, keys)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(score(x[1:], t[1:], keys[1:])[0], first[1:], rtol=2e-5, atol=1e-6)  # alone or in a batch
    assert relative_error(score(x, t, jax.random.split(jax.random.key(6), 2))[0], first) > 1e-3
    assert relative_error(score(x[:1], t[:1], keys[1:])[0], first[:1]) > 1e-3
    with pytest.raises(ValueError, match="needs dropout_keys"):
        get_score_fn(sde, model, params, {}, train=True)(x, t)


def test_dropout_keeps_the_mean():
    """Entries are 0 with probability `rate` and otherwise 1 / (1 - rate) times as large; two layers differ."""

    class Net(nn.Module):
        conditioning, parameterization = "time", "score"

        @nn.compact
        def __call__(self, x, t, train):
            return nn.Dropout(0.2)(x, deterministic=not train) - nn.Dropout(0.6)(x, deterministic=not train)

    sde, x = sde_lib.VPSDE(), jnp.ones((4, 10_000))
    keys = jax.random.split(jax.random.key(0), 4)
    out = np.asarray(get_score_fn(sde, Net(), {}, {}, train=True, dropout_keys=keys)(x, jnp.ones(4)))
    values, counts = np.unique(out.round(4), return_counts=True)
    np.testing.assert_allclose(values, [-2.5, 1.25 - 2.5, 0, 1.25], atol=1e-4)
    np.testing.assert_allclose(counts / out.size, [0.2 * 0.4, 0.8 * 0.4, 0.2 * 0.6, 0.8 * 0.6], atol=0.01)


@pytest.mark.parametrize(
    "sde, options", [("vesde", dict(ch_mult=(1, 1))), ("vpsde", dict(resblock_type="ddpm", ch_mult=(1,)))]
)
def test_derivatives_of_the_score_agree_with_differences(sde, options):
    """v . J v along v, by jvp and by central differences, and its gradient along v, in float64."""
    config = tiny_config(sde, nf=4, **options)
    model, process = create_model(config), sde_lib.from_config(config)
    with jax.enable_x64():
        params = random_params(model, (1, 4, 4, 3), dtype=np.float64)
        score_fn = get_score_fn(process, model, params, {})
        x, v = (jnp.array(np.random.RandomState(seed).randn(1, 4, 4, 3)) for seed in (0, 1))
        t = jnp.array([0.5])

        def quadratic_form(x):
            return jnp.sum(v * jax.jvp(lambda x: score_fn(x, t), (x,), (v,))[1])

        @jit
        def along(step):
            value, grad = jax.value_and_grad(quadratic_form)(x + step * v)
            return jnp.sum(v * score_fn(x + step * v, t)), value, jnp.sum(grad * v)

        step = 1e-4
        (low, low_form, _), (_, form, slope), (high, high_form, _) = along(-step), along(0.0), along(step)
        np.testing.assert_allclose((high - low) / (2 * step), form, rtol=1e-5)
        np.testing.assert_allclose((high_form - low_form) / (2 * step), slope, rtol=1e-4)
        assert abs(slope) > 1e-6


def mlp_config(sde, **model):
    return tiny_config(sde, name="mlp", nf=16, sigma_data=0.7, **model)


@pytest.mark.parametrize("sde", ["vpsde", "subvpsde", "vesde", "linearvesde", "vp_log_snr", "straight"])
def test_mlp_input_has_unit_variance_and_fresh_score_is_that_of_a_gaussian(sde):
    """For x0 ~ N(0, sigma_data^2): the first layer is given N(0, 1), and before training the score is -x / var(x)."""
    config = mlp_config(sde)
    model, process = create_model(config), sde_lib.from_config(config)
    params, model_state = init_params(model, jax.random.key(0), (4, 2))
    t = jnp.repeat(jnp.array([0.01, 0.3, 1.0]), 2000)
    std = jnp.sqrt((0.7 * process.alpha(t)) ** 2 + process.sigma(t) ** 2)
    x = std[:, None] * jax.random.normal(jax.random.key(1), (t.size, 2))

    inputs = []

    def spy(next_fun, args, kwargs, context):
        if context.module.name == "Dense_1":  # Dense_0 is the time embedding
            inputs.append(args[0])
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(spy):
        score = get_score_fn(process, model, params, model_state)(x, t)
    np.testing.assert_allclose(np.std(inputs[0].reshape(3, -1), axis=1), 1, atol=0.05)
    sigma = process.sigma(t)[:, None]  # the prediction is as good at any noise level; the score divides by sigma
    np.testing.assert_allclose(-sigma * score, sigma * x / std[:, None] ** 2, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dim", [1, 2])
def test_mlp_third_order_is_finite_for_ve_at_the_end_of_time(dim):
    """sigma^3 grad_x(v . J v) is of order one at sigma = 50 and x of order 50, and its parameter gradient is finite."""
    config = mlp_config("vesde")
    model, process = create_model(config), sde_lib.from_config(config)
    params = random_params(model, (4, dim), scale=0.5)
    t = jnp.array([1e-5, 0.5, 1.0, 1.0])
    sigma = process.sigma(t)[:, None]
    x = jax.random.normal(jax.random.key(1), (4, dim)) * jnp.sqrt(0.7**2 + sigma**2)
    v = jnp.ones_like(x)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def third_order(params):
        score_fn = get_score_fn(process, model, params, {})

        def quadratic_form(x):
            return jnp.sum(v * jax.jvp(lambda x: score_fn(x, t), (x,), (v,))[1])

        third = sigma**3 * jax.grad(quadratic_form)(x)
        return jnp.sum(third**2), third

    (_, third), grad = jit(third_order)(params)
    assert np.all(np.isfinite(third)) and np.abs(third).max() < 100
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grad))
    assert np.abs(third[2:]).max() > 0
