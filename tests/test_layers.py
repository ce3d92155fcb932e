# SPDX-License-Identifier: Apache-2.0
"""Layers against numbers recorded from the public code, and the moments of fresh parameters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import load_golden, load_params, relative_error

from errors import UserError
from models import layers, layerspp, up_or_down_sampling
from models.layers import group_norm

RESAMPLE, BLOCKS, EMBEDDINGS = map(load_golden, ("layers_resample.npz", "layers_blocks.npz", "embeddings.npz"))
RESAMPLED = [key for key in RESAMPLE if "/" in key and not key.startswith("upfirdn")]
CASES = [key.removesuffix("/out") for key in BLOCKS if key.endswith("/out")]
UNOPTIMISED = {"xla_backend_optimization_level": 0}  # compiles random numbers six times faster
FIR_KERNEL = (1.0, 3.0, 3.0, 1.0)


@pytest.mark.parametrize("key", RESAMPLED)
def test_resampling_as_recorded(key):
    name, options = key.split("/")
    taps, _, gain = options.partition("_gain")
    taps = None if taps == "knone" else tuple(int(digit) for digit in taps[1:])
    args = (jnp.array(RESAMPLE["x"]),) + ((jnp.array(RESAMPLE["w"]),) if "conv" in name else ())
    kwargs = {"gain": int(gain)} if gain else {}
    assert relative_error(getattr(up_or_down_sampling, name)(*args, taps, **kwargs), RESAMPLE[key]) < 1e-6


def test_naive_resampling_and_negative_padding_as_recorded():
    x = jnp.array(RESAMPLE["x"])
    for name in ("naive_upsample_2d", "naive_downsample_2d"):
        assert relative_error(getattr(up_or_down_sampling, name)(x), RESAMPLE[name]) < 1e-6
    taps = tuple(tap / 8 for tap in FIR_KERNEL)
    out = up_or_down_sampling.upfirdn_2d(x, taps, up=2, down=1, pad_h=(-1, 3), pad_w=(2, 1))
    assert relative_error(out, RESAMPLE["upfirdn/up2_down1_pad_2_1_neg"]) < 1e-6


def fresh_params(module, *args) -> Any:
    init = jax.jit(module.init, compiler_options=UNOPTIMISED)
    return init(jax.random.key(0), *args)["params"]


def build(case) -> Any:
    """The module of a recorded case such as 'biggan_fir1_up_skip0'."""
    kind, *options = case.split("_")
    flag = {option[:-1]: option[-1] == "1" for option in options}
    fir: dict[str, Any] = dict(fir=flag.get("fir", False), fir_kernel=FIR_KERNEL)
    residual: dict[str, Any] = dict(act=jax.nn.swish, dropout=0.1, init_scale=0.0, skip_rescale=flag.get("skip", True))
    features = None if "up" in options or "same" in options else 12
    match kind:
        case "biggan":
            up_down: dict[str, Any] = dict(up="up" in options, down="down" in options)
            return layerspp.ResnetBlockBigGANpp(features=features, **residual, **up_down, **fir)
        case "ddpm":
            return layerspp.ResnetBlockDDPMpp(features=features, conv_shortcut=flag["convshort"], **residual)
        case "upsample" | "downsample":
            cls = {"upsample": layerspp.Upsample, "downsample": layerspp.Downsample}[kind]
            return cls(with_conv=flag["conv"], features=12 if flag["conv"] else None, **fir)
        case "attn":
            return layerspp.AttnBlockpp(skip_rescale=flag["skip"], init_scale=0.0)
        case "combine":
            return layerspp.Combine(options[0])
        case "nin":
            return layers.NIN(5)
        case "conv2d":
            return up_or_down_sampling.Conv2d(12)
        case "groupnorm":
            return group_norm(8)


@pytest.mark.parametrize("case", CASES)
def test_blocks_as_recorded(case):
    args = (jnp.array(BLOCKS["x"]),)
    if case.startswith(("biggan", "ddpm")):
        args += (None if case.endswith("notemb") else jnp.array(BLOCKS["temb"]),)
    if case.startswith("combine"):
        args += (jnp.array(BLOCKS["y"]),)
    params = load_params(BLOCKS, f"{case}/params:")
    module = build(case)
    fresh = jax.eval_shape(module.init, jax.random.key(0), *args).get("params", {})
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)
    assert relative_error(jax.jit(module.apply)({"params": params}, *args), BLOCKS[f"{case}/out"]) < 5e-6


@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_activations_as_recorded(name):
    assert relative_error(layers.ACTIVATIONS[name](jnp.array(BLOCKS["x"])), BLOCKS[f"act_{name}"]) < 1e-6


@pytest.mark.parametrize("dim", [8, 17, 128])
def test_positional_embedding_as_recorded(dim):
    out = layers.get_timestep_embedding(jnp.array(EMBEDDINGS["t"]), dim)
    # angles reach 999 rad, where one float32 rounding is 6e-5
    np.testing.assert_allclose(out, EMBEDDINGS[f"emb{dim}"], atol=1e-4)


@pytest.mark.parametrize("trainable", [False, True])
def test_fourier_embedding_as_recorded_and_trained_only_if_asked(trainable):
    module: Any = layerspp.GaussianFourierProjection(16, 16.0, trainable)
    x, params = jnp.array(EMBEDDINGS["fourier_x"]), {"W": jnp.array(EMBEDDINGS["fourier_W"])}
    np.testing.assert_allclose(module.apply({"params": params}, x), EMBEDDINGS["fourier_out"], atol=1e-4)
    grad = jax.grad(lambda params: jnp.sum(module.apply({"params": params}, x) ** 3))(params)
    assert (np.abs(grad["W"]).max() > 0) == trainable


@pytest.mark.parametrize("name", ["upsample_2d", "downsample_2d"])
def test_resampling_is_linear_with_the_right_adjoint(name):
    """<y, A x> = <A^T y, x>, and the derivative of grad |A x|^2 / 2 along v is A^T A v."""
    operator = jax.jit(functools.partial(getattr(up_or_down_sampling, name), taps=(1, 2, 3, 4)))
    x, v = jax.random.normal(jax.random.key(0), (2, 2, 6, 4, 3))
    y = jax.random.normal(jax.random.key(1), operator(x).shape)
    (adjoint,) = jax.vjp(operator, x)[1](y)
    np.testing.assert_allclose(jnp.sum(y * operator(x)), jnp.sum(adjoint * x), rtol=1e-4)
    grad = jax.jit(jax.grad(lambda x: 0.5 * jnp.sum(operator(x) ** 2)))
    (expected,) = jax.vjp(operator, x)[1](operator(v))
    np.testing.assert_allclose(jax.jvp(grad, (x,), (v,))[1], expected, atol=1e-5)


def test_fresh_convolution_has_variance_of_fan_avg():
    """Uniform with variance 1 / mean(fan in, fan out); 1e-10 times that where the scale is 0."""
    x = jnp.zeros((1, 8, 8, 64))
    variance = 1 / (9 * (64 + 128) / 2)
    for scale, expected in ((1.0, variance), (0.0, 1e-10 * variance)):
        params = fresh_params(layers.conv(128, init_scale=scale), x)
        np.testing.assert_allclose(np.var(params["kernel"]), expected, rtol=0.02)
        assert np.abs(params["kernel"]).max() < np.sqrt(3.001 * expected)
        assert not params["bias"].any()
    weight = fresh_params(up_or_down_sampling.Conv2d(128), x)["weight"]
    np.testing.assert_allclose(np.var(weight), variance, rtol=0.02)


def test_fresh_nin_dense_and_fourier_moments():
    x = jnp.zeros((1, 8, 8, 64))
    weight = fresh_params(layers.NIN(256), x)["W"]
    np.testing.assert_allclose(np.var(weight), 0.1 / 160, rtol=0.03)
    kernel = fresh_params(layers.dense(256), x)["kernel"]
    np.testing.assert_allclose(np.var(kernel), 1 / 160, rtol=0.03)
    weight = fresh_params(layerspp.GaussianFourierProjection(4096, 16.0), jnp.ones(1))["W"]
    np.testing.assert_allclose([np.mean(weight) / 16, np.std(weight) / 16], [0, 1], atol=0.05)


@pytest.mark.parametrize("case", ["biggan_fir0_none_skip1", "ddpm_skip1_convshort0", "attn_skip1"])
def test_a_fresh_block_with_init_scale_zero_is_its_shortcut(case):
    module, x = build(case), jnp.array(BLOCKS["x"])
    args = (x,) if case.startswith("attn") else (x, jnp.array(BLOCKS["temb"]))
    params = fresh_params(module, *args)
    out = jax.jit(module.apply)({"params": params}, *args) * np.sqrt(2)
    if "biggan" in case:
        shortcut = jnp.einsum("bhwc,co->bhwo", x, params["Conv_2"]["kernel"][0, 0])
    elif "ddpm" in case:
        shortcut = x @ params["NIN_0"]["W"]
    else:
        shortcut = x
    np.testing.assert_allclose(out, shortcut, atol=1e-3)


def test_uneven_groups_are_refused():
    for channels in (3, 9, 144):
        with pytest.raises(UserError, match=f"{channels} channels"):
            group_norm(channels)
    assert [group_norm(channels).num_groups for channels in (4, 64, 128, 256)] == [1, 16, 32, 32]


def test_fourier_features_turn_as_often_as_they_are_said_to():
    x = jnp.array([[0.0, 1 / 8], [1 / 16, 0.3]])
    features = layers.with_fourier_features(x, (1, 2))
    assert features.shape == (2, 10) and np.array_equal(features[..., :2], x)
    assert features[0, 2:] == pytest.approx([0, 1, 1, 0, 0, 0, 1, -1], abs=1e-6)  # a quarter and half a turn
    assert features[1, [3, 7]] == pytest.approx(np.sin([1.2 * np.pi, 2.4 * np.pi]), abs=1e-6)
    assert np.array_equal(layers.with_fourier_features(x, ()), x)
