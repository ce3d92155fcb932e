# SPDX-License-Identifier: Apache-2.0
"""What saves time and memory changes no number: the convolution's own derivatives, micro-batches, remat, bfloat16."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from flax import linen as nn
from jax import lax
from test_losses import score_one, tiny_net, training_config
from test_models import random_params, tiny_config

import losses
import sde_lib
from configs.default_configs import get_default_configs
from models import convolution, create_model
from models.convolution import conv2d
from models.layers import conv, softmax
from models.score import get_score_fn
from tests.test_interruptions import ENVIRONMENT, FLAGS, ROOT

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def relative_norm(actual, expected):
    """|actual - expected| / |expected| over all leaves."""
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, actual, expected)) / optax.tree.norm(expected))


shapes = pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation", "padding"),
    [
        (8, 3, 1, 1, "SAME"),
        (8, 1, 1, 1, "SAME"),
        (8, 3, 2, 1, "SAME"),
        (9, 3, 2, 1, "VALID"),
        (8, 3, 2, 1, "VALID"),  # the last row is never read
        (4, 3, 1, 2, ((2, 2), (2, 1))),
        (7, 5, 3, 1, ((1, 2), (0, 3))),
    ],
)


@shapes
def test_derivatives_of_the_convolution_against_jax(size, kernel, stride, dilation, padding):
    """Reverse over reverse over forward mode in the image, forward over reverse in the weights; and vmap."""
    rng = np.random.default_rng(0)
    x, dx = (jnp.asarray(rng.normal(size=(2, size, size, 3))) for _ in range(2))
    w, dw = (jnp.asarray(rng.normal(size=(kernel, kernel, 3, 4))) for _ in range(2))

    def reference(x, w):
        axes = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, w, (stride,) * 2, padding, lhs_dilation=(dilation,) * 2, dimension_numbers=axes
        )

    def ours(x, w):
        return conv2d(x, w, stride, dilation, padding)

    def derivatives(convolve):
        def of_third_order(x, w):
            tangent = jax.grad(lambda x: jnp.sum(jax.jvp(lambda x: jnp.sin(convolve(x, w)), (x,), (dx,))[1] ** 2))
            mixed = jax.jvp(jax.grad(lambda w: jnp.sum(convolve(x, w) ** 3)), (w,), (dw,))[1]
            return jnp.sum(tangent(x) ** 2) + jnp.sum(mixed**2)

        return jit(jax.grad(of_third_order, (0, 1)))(x, w)

    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9), derivatives(ours), derivatives(reference))
    many = jnp.stack([x, dx])
    batched = jax.vmap(ours, (0, None))(many, w), jax.vmap(ours, (None, 0))(x, jnp.stack([w, dw]))
    wanted = jax.vmap(reference, (0, None))(many, w), jax.vmap(reference, (None, 0))(x, jnp.stack([w, dw]))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), batched, wanted)


def of_both_branches(monkeypatch, function):
    """The results of a function that is traced on the path of the CPU and on that of accelerators."""
    results = []
    for own in (True, False):
        monkeypatch.setattr(convolution, "has_own_derivatives", lambda own=own: own)
        results.append(function())
    return results


def test_the_branch_is_that_of_the_device(monkeypatch):
    x, w = jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1))
    for backend, own in (("cpu", True), ("gpu", False), ("tpu", False)):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert ("conv2d" in str(jax.make_jaxpr(lambda x: conv2d(x, w))(x))) == own
        assert any("cpu" in name for name in quick.options(backend, 0)) == own


@jax.enable_x64(False)
@shapes
def test_both_branches_of_the_convolution_agree(monkeypatch, size, kernel, stride, dilation, padding):
    """Values, jvp, vjp and jvp of vjp, in float32."""
    rng = np.random.default_rng(0)
    x, dx = (jnp.asarray(rng.normal(size=(2, size, size, 3)), jnp.float32) for _ in range(2))
    w, dw = (jnp.asarray(rng.normal(size=(kernel, kernel, 3, 4)), jnp.float32) for _ in range(2))

    def derivatives():
        def convolve(x, w):
            return conv2d(x, w, stride, dilation, padding)

        def vjp(x, w):
            return jax.vjp(lambda x, w: jnp.sin(convolve(x, w)), x, w)[1](jnp.cos(convolve(x, w)))

        def everything(x, w):
            return convolve(x, w), jax.jvp(convolve, (x, w), (dx, dw))[1], jax.jvp(vjp, (x, w), (dx, dw))

        return jit(everything)(x, w)

    for own, plain in zip(*map(jax.tree.leaves, of_both_branches(monkeypatch, derivatives)), strict=True):
        assert own.dtype == jnp.float32 and relative_norm(own, plain) < 1e-5


class Convolutions(nn.Module):
    """A score that is nothing but convolutions, one of them with a stride."""

    conditioning, parameterization = "time", "score"

    @nn.compact
    def __call__(self, x, t, train=False):
        h = nn.swish(conv(4)(x) + t[:, None, None, None])
        low = nn.swish(conv(4, stride=2)(h))
        return conv(3)(h + jnp.repeat(jnp.repeat(low, 2, axis=1), 2, axis=2))


@jax.enable_x64(False)
@pytest.mark.parametrize("block", ["", pytest.param("ddpm", marks=pytest.mark.slow)])
def test_both_branches_give_the_gradient_of_the_third_order(monkeypatch, block):
    config = tiny_config("vpsde", nf=4, ch_mult=(1,), attn_resolutions=(), resblock_type=block)
    model, sde = create_model(config) if block else Convolutions(), sde_lib.from_config(config)
    params = random_params(model, (1, 4, 4, 3))
    x0 = jnp.asarray(np.random.default_rng(0).random((2, 4, 4, 3)), jnp.float32)

    def gradient():
        def score_fn_of_params(params, model_state, keys):
            return get_score_fn(sde, model, params, model_state)

        return one_step(score_fn_of_params, params, x0, sde, 3, 1)

    (own, metrics), (plain, plain_metrics) = of_both_branches(monkeypatch, gradient)
    assert float(metrics["third"]) > 0
    assert relative_norm(own, plain) < 1e-5
    assert relative_norm(metrics, plain_metrics) < 1e-5


def test_softmax_and_its_derivatives_are_those_of_jax():
    rng = np.random.default_rng(0)
    x, dx, dy = (jnp.asarray(3 * rng.normal(size=(2, 5))) for _ in range(3))

    def derivatives(softmax):
        def second(x):
            return jax.jvp(jax.grad(lambda x: jnp.sum(dy * softmax(x) ** 2)), (x,), (dx,))

        return softmax(x), *second(x), jax.grad(lambda x: jnp.sum(second(x)[1] ** 2))(x)

    ours, wanted = derivatives(softmax), derivatives(jax.nn.softmax)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), ours, wanted)
    large = softmax(jnp.array([1e4, 1e4, -1e4]))  # no overflow
    np.testing.assert_array_equal(large, [0.5, 0.5, 0.0])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the layouts of the CPU's fast kernel")
def test_a_scanned_gradient_has_convolutions_of_the_fast_layout_alone():
    layer = conv(4)
    x = jnp.ones((3, 2, 8, 8, 3), jnp.float32)
    params = layer.init(jax.random.key(0), x[0])

    def loss(params, x):
        return jnp.sum(jax.grad(lambda x: jnp.sum(layer.apply(params, x) ** 3))(x) ** 2)

    def scanned(params, x):
        return lax.scan(lambda total, x: (jax.tree.map(jnp.add, total, jax.grad(loss)(params, x)), None), params, x)[0]

    lines = [line for line in jit(scanned).lower(params, x).compile().as_text().splitlines() if "dim_labels" in line]
    # forward, and the cotangent of x and of that; those of the weights are matrix products
    assert len(lines) == 3 and all("b01f_01io->b01f" in line for line in lines)


def one_step(score_fn_of_params, params, x0, sde, order, num_microbatches):
    """Gradient (from Adam's first moment) and metrics of a training step."""
    config = get_default_configs()
    config.optim.update(beta1=0.5, grad_clip=-1.0)
    loss_fn = losses.get_loss_fn(training_config(score_matching_order=order), sde, score_fn_of_params)
    optimizer = losses.get_optimizer(config.optim)
    step_fn = losses.get_step_fn(loss_fn, optimizer, 0.9, None, num_microbatches=num_microbatches)
    state = losses.TrainState(jnp.int32(0), params, params, optimizer.init(params), {}, jax.random.PRNGKey(0))
    state, metrics = jit(step_fn)(state, x0)
    return optax.tree.get(state.opt_state, "mu"), metrics


@pytest.mark.parametrize("order", [1, 2, 3])
def test_micro_batches_give_the_gradient_of_the_whole_batch(order):
    params = tiny_net(3)
    x0 = jnp.asarray(np.random.default_rng(0).normal(size=(12, 3)))

    def score_fn_of_params(params, model_state, keys):
        return jax.vmap(lambda x, t: score_one(params, x, t))

    grads, metrics = one_step(score_fn_of_params, params, x0, sde_lib.VPSDE(), order, 1)
    for parts in (2, 3, 12):
        grads_of_parts, metrics_of_parts = one_step(score_fn_of_params, params, x0, sde_lib.VPSDE(), order, parts)
        assert relative_norm(grads_of_parts, grads) < 1e-6
        for name in metrics:
            np.testing.assert_allclose(metrics_of_parts[name], metrics[name], rtol=1e-6, err_msg=name)


@pytest.mark.slow  # an MLP has the fast case above
@pytest.mark.parametrize("order", [1, 3])
def test_micro_batches_of_a_network_with_dropout(order):
    config = tiny_config("vpsde", dropout=0.3)
    model, sde = create_model(config), sde_lib.from_config(config)
    x0 = jnp.asarray(np.random.default_rng(0).random((4, 8, 8, 3)))

    def score_fn_of_params(params, model_state, keys):
        return get_score_fn(sde, model, params, model_state, train=True, dropout_keys=keys)

    params = random_params(model, (1, 8, 8, 3), dtype=np.float64)
    (whole, _), (parts, _) = (one_step(score_fn_of_params, params, x0, sde, order, n) for n in (1, 2))
    assert relative_norm(parts, whole) < 1e-6


@pytest.mark.parametrize("block", [pytest.param("biggan", marks=pytest.mark.slow), "ddpm"])
def test_remat_changes_neither_parameters_nor_gradients(block):
    x, t = jnp.asarray(np.random.default_rng(0).random((2, 8, 8, 3))), jnp.array([0.3, 0.7])
    sde, keys = sde_lib.VPSDE(), jax.random.split(jax.random.PRNGKey(1), 2)
    trees, results = [], []
    for remat in (False, True):
        model = create_model(tiny_config("vpsde", dropout=0.3, remat=remat, resblock_type=block))
        trees.append(jax.eval_shape(model.init, jax.random.key(0), x, t))
        params = random_params(model, x.shape, dtype=np.float64)

        def loss(params, model=model):
            score = get_score_fn(sde, model, params, {}, train=True, dropout_keys=keys)(x, t)
            return jnp.sum(score**2), score

        assert ("prevent_cse" in str(jax.make_jaxpr(loss)(params))) == remat
        results.append(jit(jax.grad(loss, has_aux=True))(params))
    assert trees[0] == trees[1]
    (grads, score), (grads_remat, score_remat) = results
    np.testing.assert_allclose(score_remat, score, rtol=1e-9)
    assert relative_norm(grads_remat, grads) < 1e-9


@jax.enable_x64(False)
def test_bfloat16_is_near_float32_and_its_parameters_and_output_are_float32():
    x, t = jnp.asarray(np.random.default_rng(0).random((2, 8, 8, 3)), jnp.float32), jnp.array([0.3, 0.7], jnp.float32)
    outputs = []
    for dtype in ("float32", "bfloat16"):
        model = create_model(tiny_config("vpsde", dtype=dtype))
        params = jax.eval_shape(model.init, jax.random.key(0), x, t)["params"]
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        params = random_params(model, x.shape)
        jaxpr = str(jax.make_jaxpr(model.apply)({"params": params}, x, t))
        assert ("bf16[" in jaxpr) == (dtype == "bfloat16")
        outputs.append(jit(model.apply)({"params": params}, x, t))
        assert outputs[-1].dtype == jnp.float32
    assert 1e-5 < relative_norm(outputs[1], outputs[0]) < 0.03  # bfloat16 has 8 bits: 0.4 % a rounding


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, 2])
def test_gradients_on_two_devices_are_those_of_one(order):
    """In float64; bfloat16 has 8 bits, 0.4 % a rounding."""
    environment = {**ENVIRONMENT, "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count=2"}
    environment["PYTHONPATH"] = str(ROOT)
    environment["JAX_COMPILATION_CACHE_DIR"] = str(Path(jax.config.jax_compilation_cache_dir).resolve())
    command = [sys.executable, "tests/two_devices.py", str(order)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    distances = json.loads(done.stdout)
    for case in ("plain", "remat", "num_microbatches"):
        assert max(distances[case]) < 1e-12, case
    assert 1e-5 < min(distances["bfloat16"]) and max(distances["bfloat16"]) < 0.03
