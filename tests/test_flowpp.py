# SPDX-License-Identifier: Apache-2.0
"""The Flow++ dequantiser against recorded numbers of the public code, brute-force Jacobians and integrals."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from golden_utils import GOLDEN, load_golden, load_params, relative_error
from quick import jit

from errors import UserError
from models.flowpp import NETWORKS, create_dequantizer, init_params
from models.flowpp.dequantizer import Dequantizer, Mixture, Norm, inverse_mixture_logit, mixture_logit
from models.flowpp.layers import conv, dense

TINY = dict(filters=8, components=3, blocks=1, heads=2, steps=2, context_filters=4, context_blocks=1)
LAYOUTS = {
    "cifar10": TINY,
    "imagenet32": TINY,
    "imagenet64": dict(TINY, context_blocks=2, blocks=2),
    "small": TINY,
}


def tiny(network, dropout=0.0):
    return Dequantizer(**{**NETWORKS[network], **LAYOUTS[network]}, dropout=dropout)


def batch(shape, seed=0):
    """Images with levels k / 255, and u."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, shape) / np.float32(255)
    return jnp.asarray(image), jnp.asarray(rng.normal(size=shape), jnp.float32)


def apply(model, params, *args, method=None):
    """model.apply, jitted."""
    run = functools.partial(model.apply, method=method)
    return jit(run)({"params": params}, *args)


def fresh(model, image, u):
    """init_params, jitted."""
    return jit(functools.partial(init_params, model))(jax.random.key(0), image, u)


@functools.cache
def shaken(network, shape, size=1.0):
    """A tiny dequantiser with random parameters: no layer is near the identity. The larger `size`, the further."""
    image, u = batch(shape)
    model = tiny(network)
    tree = jax.eval_shape(lambda: init_params(model, jax.random.key(0), image, u))
    rng = np.random.default_rng(1)

    def value(path, leaf):
        name, noise = path[-1].key, rng.normal(size=leaf.shape)
        if name.endswith("_g"):
            value = 1 + 0.1 * size * noise
        elif name.startswith("W"):  # of Pointwise
            value = np.eye(len(noise)) + 0.1 * size * noise
        else:
            value = 0.5 * size * noise / np.sqrt(max(1, noise[..., 0].size if noise.ndim > 1 else 1))
        return jnp.asarray(value, jnp.float32)

    return model, jax.tree_util.tree_map_with_path(value, tree)


def normal_logp(x):
    return np.sum(-0.5 * np.square(x) - 0.5 * np.log(2 * np.pi), axis=(1, 2, 3))


@pytest.mark.parametrize("case", ["random", "ddinit"])
def test_golden(case):
    golden = load_golden("flowpp_tiny.npz")
    sizes = json.loads(str(golden["kw"]))
    sizes["heads"] = sizes.pop("attn_heads")
    model = Dequantizer(**{**NETWORKS["cifar10"], **sizes})
    params = load_params(golden, f"{case}/params:")
    u, image, noise = (jnp.asarray(golden[key]) for key in ("u", "image", f"{case}/noise"))

    ours, log_q = apply(model, params, u, image)
    np.testing.assert_allclose(ours, noise, atol=5e-6)
    np.testing.assert_allclose(log_q, -golden[f"{case}/sldj"], rtol=3e-6)

    ours, log_q = apply(model, params, noise, image, method="inverse")
    inverse = golden[f"{case}/inverse_of_noise"]
    np.testing.assert_allclose(ours, inverse, atol=2e-5)
    # recorded: log |det du / dnoise| minus the normal density of what it was given, the noise
    log_det = golden[f"{case}/inverse_sldj_minus_logp"] + normal_logp(noise)
    np.testing.assert_allclose(log_q, normal_logp(inverse) + log_det, rtol=1e-5)


def shapes(network, size):
    model = create_dequantizer(network)
    image = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    tree = jax.eval_shape(lambda key, image, u: init_params(model, key, image, u), jax.random.key(0), image, image)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(entry.key for entry in path): list(leaf.shape) for path, leaf in leaves}


def test_full_size_parameters_of_cifar10():
    assert shapes("cifar10", 32) == json.loads((GOLDEN / "flowpp_fullsize_param_shapes.json").read_text())


def layer_shapes(prefix, shape, weight_norm=False):
    names = {f"{prefix}_b": shape[-1:]}
    if weight_norm:
        return {**names, f"{prefix}_V": shape, f"{prefix}_g": shape[-1:]}
    return {**names, f"{prefix}_W": shape}


def imagenet_shapes(size, filters, components, blocks, steps, context_blocks, attention, weight_norm):
    """Paths and shapes as read off the public imagenet32 and imagenet64 networks."""
    expected = {}
    half = [size, size // 2]

    def add(scope, **items):
        expected.update({f"{scope}/{name}": list(shape) for name, shape in items.items()})

    def add_layer(scope, name, *shape):
        add(scope, **layer_shapes(name, shape, weight_norm and len(shape) == 4))

    def add_norm(scope, name, channels):
        add(scope, **{f"{name}_g": (1, 1, 1, channels), f"{name}_b": (1, 1, 1, channels)})

    context = "DeepProcessor_0"
    add_layer(context, "proj", 3, 3, 6, 32)
    add(context, pos_emb_dq=[*half, 32])
    for i in range(context_blocks):
        add_layer(context, f"c{i}_c1", 3, 3, 64, 32)
        add_layer(context, f"c{i}_c2", 3, 3, 64, 64)
        add_norm(context, f"dqln{i}", 32)
        if attention:
            add_layer(context, f"dqattn{i}_proj1", 32, 96)
            add_layer(context, f"dqattn{i}_proj2", 32, 64)
            add_norm(context, f"ln{i}", 32)
    for step in range(steps):
        add(f"Norm_{step}", norm0_g=[*half, 3], norm0_b=[*half, 3], norm1_g=[*half, 3], norm1_b=[*half, 3])
        scope = f"MixLogistic{'Attn' if attention else ''}Coupling_{step}"
        add(scope, pos_emb=[*half, filters])
        add_layer(scope, "c1", 3, 3, 3, filters)
        for i in range(blocks):
            add_layer(scope, f"block{i}_conv_c1", 3, 3, 2 * filters, filters)
            add_layer(scope, f"block{i}_conv_a_proj", 64, filters)
            add_layer(scope, f"block{i}_conv_c2", 2 * filters, 2 * filters)
            add_norm(scope, f"block{i}_ln1", filters)
            if attention:
                add_layer(scope, f"block{i}_attn_proj1", filters, 3 * filters)
                add_layer(scope, f"block{i}_attn_proj2", filters, 2 * filters)
                add_norm(scope, f"block{i}_ln2", filters)
        add_layer(scope, f"block{blocks - 1}_c2", 3, 3, 2 * filters, 3 * (2 + 3 * components))
    return expected


def test_full_size_parameters_of_imagenet():
    assert shapes("imagenet32", 32) == imagenet_shapes(32, 128, 32, 8, 8, 8, attention=True, weight_norm=True)
    assert shapes("imagenet64", 64) == imagenet_shapes(64, 96, 4, 5, 4, 5, attention=False, weight_norm=False)


@pytest.mark.parametrize(("network", "channels"), [("cifar10", 2), ("imagenet32", 2), ("imagenet64", 1)])
def test_density_is_that_of_the_brute_force_jacobian(network, channels):
    shape = (1, 2, 4, channels)
    model, params = shaken(network, shape)
    image, u = batch(shape, seed=3)

    def forward(u):
        noise, log_q = model.apply({"params": params}, u, image)
        return noise, (noise, log_q)

    jacobian, (noise, log_q) = jit(jax.jacfwd(forward, has_aux=True))(u)
    assert not np.allclose(np.diag(jacobian.reshape(u.size, u.size)), 0.25, atol=0.1)
    _, log_det = np.linalg.slogdet(np.asarray(jacobian, np.float64).reshape(u.size, u.size))
    expected = normal_logp(u) - log_det
    np.testing.assert_allclose(log_q, expected, atol=2e-4)
    back, log_q = apply(model, params, noise, image, method="inverse")
    np.testing.assert_allclose(back, u, atol=2e-4)
    np.testing.assert_allclose(log_q, expected, atol=5e-4)


def test_density_integrates_to_one():
    """On images of one row, two columns and one channel, by the midpoint rule."""
    model, params = shaken("small", (64, 1, 2, 1))
    n = 200
    middle = (jnp.arange(n) + 0.5) / n
    noise = jnp.stack(jnp.meshgrid(middle, middle), axis=-1).reshape(n * n, 1, 2, 1)
    image = jnp.broadcast_to(jnp.array([0.2, 0.9]).reshape(1, 1, 2, 1), noise.shape)
    _, log_q = apply(model, params, noise, image, method="inverse")
    assert np.max(np.abs(log_q)) > 0.5  # not uniform
    np.testing.assert_allclose(np.mean(np.exp(np.asarray(log_q, np.float64))), 1, atol=2e-3)


def test_noise_stays_in_the_unit_interval_and_sees_its_own_image_alone():
    model, params = shaken("small", (4, 8, 8, 1))
    image, u = batch((4, 8, 8, 1), seed=4)
    noise, log_q = apply(model, params, u, image)
    assert np.min(noise) > 0 and np.max(noise) < 1 and np.all(np.isfinite(log_q))
    other, log_q_other = apply(model, params, u, image.at[1:].set(image[:-1]))
    assert np.min(np.max(np.abs(other - noise)[1:], axis=(1, 2, 3))) > 1e-3
    np.testing.assert_allclose(other[0], noise[0], atol=1e-5)
    np.testing.assert_allclose(log_q_other[0], log_q[0], atol=1e-3)


def mixture_in_float64(x, mixture):
    """logit F and log of its slope, from log F and log(1 - F)."""
    logits, means, logscales = (np.asarray(part, np.float64) for part in mixture)
    z = (np.asarray(x, np.float64)[..., None] - means) / np.exp(logscales)
    log_w = scipy.special.log_softmax(logits, axis=-1)
    log_cdf = scipy.special.logsumexp(log_w + scipy.special.log_expit(z), axis=-1)
    log_sf = scipy.special.logsumexp(log_w + scipy.special.log_expit(-z), axis=-1)
    log_pdf = log_w - logscales + scipy.special.log_expit(z) + scipy.special.log_expit(-z)
    return log_cdf - log_sf, scipy.special.logsumexp(log_pdf, axis=-1) - log_cdf - log_sf


def test_mixture_and_its_inverse():
    rng = np.random.default_rng(6)
    parts = (rng.normal(size=(500, 4)) * scale + shift for scale, shift in ((1, 0), (2, 0), (1, -1)))
    mixture = Mixture(*(jnp.asarray(part, jnp.float32) for part in parts))
    x = jnp.asarray(rng.normal(size=500) * 20, jnp.float32)  # far into both tails
    y, log_slope = jit(mixture_logit)(x, mixture)
    expected_y, expected_slope = mixture_in_float64(x, mixture)
    np.testing.assert_allclose(y, expected_y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(log_slope, expected_slope, atol=1e-3)
    back = jit(inverse_mixture_logit)(y, mixture)
    # as far as y determines x: one rounding of y over the slope
    slack = 1e-5 + 1e-5 * np.abs(x) + 4e-7 * np.abs(y) / np.exp(expected_slope)
    assert np.all(np.abs(back - x) <= slack)


def test_mixture_slope_is_the_derivative():
    x = jnp.linspace(-3, 3, 7)
    mixture = Mixture(*(jnp.tile(jnp.array(row), (7, 1)) for row in ([0.0, 1.0], [-1.0, 2.0], [0.5, -1.0])))
    _, log_slope = jit(mixture_logit)(x, mixture)
    derivative = jit(lambda x: jax.jvp(lambda x: mixture_logit(x, mixture)[0], (x,), (jnp.ones(7),))[1])(x)
    np.testing.assert_allclose(np.exp(log_slope), derivative, rtol=1e-5)


class _Layers(nn.Module):
    """A chain of the layers that initialise themselves by data, with all of their outputs."""

    @nn.compact
    def __call__(self, x):
        outputs = [conv(self, "plain", x, 6)]
        outputs.append(conv(self, "normed", outputs[-1], 5, weight_norm=True))
        outputs.append(dense(self, "dense", outputs[-1], 7, init_scale=0.1))
        return outputs


def test_layers_start_standardised():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (5, 6, 4, 3))
    outputs, _ = jit(_Layers().init_with_output)(jax.random.key(1), x)
    for output, std in zip(outputs, (1, 1, 0.1), strict=True):
        np.testing.assert_allclose(np.mean(output, axis=(0, 1, 2)), 0, atol=1e-5)
        np.testing.assert_allclose(np.std(output, axis=(0, 1, 2)), std, rtol=1e-4)


@pytest.mark.parametrize("network", ["cifar10", "imagenet32"])
def test_flow_starts_standardised(network):
    """Each Norm's outputs have mean 0 and variance 1 a channel, so the noise starts as a logistic of about N(0, 1)."""
    shape = (16, 8, 8, 3)
    image, u = batch(shape)
    model = tiny(network)
    params = fresh(model, image, u)
    run = functools.partial(model.apply, capture_intermediates=lambda m, _: isinstance(m, Norm))
    _, state = jit(run)({"params": params}, u, image)
    captured = jax.tree.leaves(state["intermediates"], is_leaf=lambda x: isinstance(x, tuple) and len(x) == 1)
    assert len(captured) == model.steps
    for ((halves, _),) in captured:
        for half in halves:
            np.testing.assert_allclose(np.mean(half, axis=(0, 1, 2)), 0, atol=1e-4)
            np.testing.assert_allclose(np.std(half, axis=(0, 1, 2)), 1, rtol=1e-3)


@pytest.mark.parametrize(("count", "brightness"), [(2, 1), (1, 0)])
def test_initialisation_from_few_images_or_a_black_one(count, brightness):
    """The public code's gave NaN for 2 images."""
    image, u = batch((64, 8, 8, 3))
    model = tiny("cifar10")
    params = fresh(model, brightness * image[:count], u[:count])
    _, log_q = apply(model, params, u, image)  # images that it has not seen
    assert np.all(np.isfinite(log_q)) and np.mean(np.abs(log_q)) < 4 * u[0].size


def test_dropout_is_off_without_keys_and_a_function_of_the_key():
    image, u = batch((4, 8, 8, 1), seed=7)
    plain, params = shaken("small", (4, 8, 8, 1))
    model = tiny("small", dropout=0.5)

    def run(model, rows, keys=None):
        return np.asarray(apply(model, params, u[rows], image[rows], keys)[0])

    everything, keys = np.arange(4), jax.random.split(jax.random.key(8), 4)
    np.testing.assert_array_equal(run(model, everything), run(plain, everything))
    dropped = run(model, everything, keys)
    assert relative_error(dropped, run(plain, everything)) > 1e-3
    rows = np.array([3, 1])
    np.testing.assert_allclose(run(model, rows, keys[rows]), dropped[rows], atol=1e-5)


def test_errors():
    with pytest.raises(UserError, match="multiple of its heads=3"):
        Dequantizer(**{**NETWORKS["small"], "heads": 3})
    odd = jnp.zeros((1, 8, 7, 1))
    with pytest.raises(UserError, match=r"data\.image_size=7 is odd"):
        create_dequantizer("small").init(jax.random.key(0), odd, odd)
