# SPDX-License-Identifier: Apache-2.0
"""Variational dequantisation: the loss against the closed form of the bound for Gaussian data."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import busy_jit, jit

import losses
from dequantization import dequantize, get_loss_fn
from likelihood import likelihood_bound
from models.flowpp import create_dequantizer, init_params
from sde_lib import VESDE, VPSDE

EPS = 1e-3
MEAN, STD = 0.2, 0.4
DIM = 16
SHAPE = (4, 4, 1)
SDES = {"vp": VPSDE(beta_min=0.1, beta_max=20.0), "ve": VESDE(sigma_min=0.01, sigma_max=50.0)}


def scaler(x01):
    return 2 * x01 - 1


def inverse_scaler(x):
    return (x + 1) / 2


def gaussian_score(sde):
    """The score of N(MEAN, STD^2 I) diffused to t."""

    def score_fn(x, t):
        alpha, sigma = (coefficient.reshape(-1, 1, 1, 1) for coefficient in (sde.alpha(t), sde.sigma(t)))
        return -(x - alpha * MEAN) / (jnp.square(alpha * STD) + jnp.square(sigma))

    return score_fn


class Sigmoid(nn.Module):
    """noise = sigmoid(slope u + image), whose density is known."""

    @nn.compact
    def __call__(self, u, image, dropout_keys=None):
        slope = self.param("slope", nn.initializers.constant(0.7), ())
        h = slope * u + image
        log_det = jnp.log(slope) + jax.nn.log_sigmoid(h) + jax.nn.log_sigmoid(-h)
        log_q = -0.5 * jnp.square(u) - 0.5 * jnp.log(2 * jnp.pi) - log_det
        return jax.nn.sigmoid(h), jnp.sum(log_q, axis=(1, 2, 3))


class Certain(nn.Module):
    """Noise as near to 1 as float32 can be, and 1 itself."""

    @nn.compact
    def __call__(self, u, image, dropout_keys=None):
        return jnp.where(u > 0, 1.0, 1 - 1e-7), jnp.zeros(len(u))


PARAMS = {"slope": jnp.float32(0.7)}


def images(count, shape=SHAPE):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (count, *shape)) / np.float32(255))


def float64_coefficients(name, t):
    if name == "ve":
        return 1.0, 0.01 * 5000.0**t
    log_alpha = -(t**2) * 19.9 / 4 - t * 0.1 / 2
    return np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))


def mean_bound(name, x, offset):
    """The mean of the bound over its noises, nats [B]: for an exact score it is tight but for its two ends.

    E log p_eps(x_eps) + E[log prior(x_T) - log p_T(x_T)], less the decoder's term; x_t ~ N(alpha x, sigma^2 I).
    """
    distance_sq = np.sum(np.square(np.asarray(x, np.float64) - MEAN), axis=(1, 2, 3))

    def mean_log_normal(t, mean, variance):
        alpha, sigma = float64_coefficients(name, t)
        square = np.sum(np.square(alpha * np.asarray(x, np.float64) - mean), axis=(1, 2, 3)) + DIM * sigma**2
        return -0.5 * DIM * np.log(2 * np.pi * variance) - 0.5 * square / variance

    def marginal(t):
        alpha, sigma = float64_coefficients(name, t)
        return t, alpha * MEAN, (alpha * STD) ** 2 + sigma**2

    prior_variance = 1.0 if name == "vp" else 50.0**2
    bound = (
        mean_log_normal(*marginal(EPS)) + mean_log_normal(1.0, 0.0, prior_variance) - mean_log_normal(*marginal(1.0))
    )
    if offset:
        alpha, sigma = float64_coefficients(name, EPS)
        variance = marginal(EPS)[2]
        residual_sq = DIM * (1 - sigma**2 / variance) ** 2 + (sigma * alpha / variance) ** 2 * distance_sq
        bound -= 0.5 * residual_sq - DIM * (0.5 + np.log(alpha))
    return bound


@jit
def u_of(key, index):
    """What the loss dequantises with."""
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(jax.random.split(key)[0], i))[0])(index)
    return jax.vmap(lambda key: jax.random.normal(key, SHAPE))(keys)


@pytest.mark.parametrize(
    ("name", "importance_weighting", "offset", "num_times"),
    [
        ("vp", True, True, 1),
        ("vp", True, False, 3),
        ("vp", False, True, 8),
        ("ve", True, True, 8),
        ("ve", False, False, 8),
    ],
)
def test_mean_loss_is_the_closed_form(name, importance_weighting, offset, num_times):
    count = 8_000
    image01, index, key = images(count), jnp.arange(count), jax.random.key(1)
    options = dict(eps=EPS, offset=offset, importance_weighting=importance_weighting)
    loss_fn = get_loss_fn(
        SDES[name], gaussian_score(SDES[name]), Sigmoid(), scaler, inverse_scaler, num_time_samples=num_times, **options
    )
    loss, terms = busy_jit(loss_fn)(PARAMS, {}, image01, index, key)
    assert {term: value.shape for term, value in terms.items()} == dict.fromkeys(("loss", "bound", "log_q"), (count,))
    np.testing.assert_allclose(loss, np.mean(terms["loss"]), rtol=1e-5)
    np.testing.assert_allclose(terms["loss"], terms["bound"] + terms["log_q"], atol=1e-5)

    x01, log_q = jit(lambda image01, u: dequantize(Sigmoid(), PARAMS, image01, u))(image01, u_of(key, index))
    expected = -mean_bound(name, 2 * np.asarray(x01, np.float64) - 1, offset) / (DIM * np.log(2)) + 7
    difference = np.asarray(terms["bound"], np.float64) - expected
    standard_error = np.std(difference) / np.sqrt(count)
    assert standard_error < 0.06
    assert abs(np.mean(difference)) < 4 * standard_error
    np.testing.assert_allclose(terms["log_q"], log_q / (DIM * np.log(2)), atol=1e-5)


def test_bound_from_its_draws():
    """The estimate, written out in float64 for VP, importance weighting and two times."""
    x, keys = scaler(images(3)), jax.random.split(jax.random.key(2), 3)
    sde = SDES["vp"]
    ours = jit(lambda: likelihood_bound(sde, gaussian_score(sde), x, keys, eps=EPS, num_time_samples=2))()

    @jit
    def draws(key):
        prior_key, offset_key, time_key = jax.random.split(key, 3)
        u_keys, noise_keys = zip(
            *(jax.random.split(jax.random.fold_in(time_key, k), 3)[:2] for k in range(2)), strict=True
        )
        prior, offset, *noise = (jax.random.normal(key, SHAPE) for key in (prior_key, offset_key, *noise_keys))
        return prior, offset, jnp.stack(noise), jnp.stack([jax.random.uniform(key) for key in u_keys])

    drawn = [draws(key) for key in keys]
    prior_noise, offset_noise, noise, time_u = (
        np.asarray(jnp.stack(part), np.float64) for part in zip(*drawn, strict=True)
    )
    times = jit(lambda u: sde.time(u, EPS, importance=True))(jnp.asarray(time_u, jnp.float32))
    x = np.asarray(x, np.float64)
    flat = np.concatenate([np.ravel(part) for part in (prior_noise, offset_noise, noise)])
    assert len(np.unique(flat)) == len(flat)  # nothing is drawn twice

    def log_snr(t):
        alpha, sigma = float64_coefficients("vp", t)
        return 2 * np.log(alpha / sigma)

    def sigma_score(t, noise, x):
        alpha, sigma = float64_coefficients("vp", t)
        return -sigma * (alpha * (x - MEAN) + sigma * noise) / ((alpha * STD) ** 2 + sigma**2)

    span = log_snr(EPS) - log_snr(1.0)
    for i in range(3):
        integral = 0
        for k in range(2):
            t = float(times[i, k])
            np.testing.assert_allclose(log_snr(t), log_snr(EPS) - span * time_u[i, k], atol=1e-3)
            scaled = sigma_score(t, noise[i, k], x[i])
            beta, sigma_sq = 0.1 + 19.9 * t, float64_coefficients("vp", t)[1] ** 2
            rate = 0.5 * beta / sigma_sq * np.sum((scaled + noise[i, k]) ** 2 - noise[i, k] ** 2) + DIM * beta / 2
            integral += 0.5 * rate * span * sigma_sq / beta
        alpha, sigma = float64_coefficients("vp", 1.0)
        x_end = alpha * x[i] + sigma * prior_noise[i]
        prior = np.sum(-0.5 * x_end**2 - 0.5 * np.log(2 * np.pi))
        # -log of the decoder N((x_eps + sigma^2 s) / alpha, (sigma / alpha)^2 I) at x, less the entropy of x_eps
        alpha, sigma = float64_coefficients("vp", EPS)
        x_eps = alpha * x[i] + sigma * offset_noise[i]
        decoded = (x_eps + sigma * sigma_score(EPS, offset_noise[i], x[i])) / alpha
        decoder = np.sum(0.5 * ((x[i] - decoded) * alpha / sigma) ** 2) + DIM * np.log(
            sigma / alpha * np.sqrt(2 * np.pi)
        )
        entropy = 0.5 * DIM * np.log(2 * np.pi * np.e * sigma**2)
        np.testing.assert_allclose(ours[i], prior - integral - (decoder - entropy), rtol=2e-4)


def test_dequantisation_of_17_levels():
    """x is (k + noise) / 17, and bits/dim are of 17 levels."""
    k = np.tile(np.arange(17, dtype=np.float32), 16).reshape(17, 4, 4, 1)
    u = jnp.asarray(np.random.default_rng(3).normal(size=k.shape), jnp.float32)
    image01 = jnp.asarray(k / np.float32(16))
    x01, _ = jit(lambda image01: dequantize(Sigmoid(), PARAMS, image01, u, levels=17))(image01)
    noise, _ = Sigmoid().apply({"params": PARAMS}, u, image01)
    np.testing.assert_allclose(x01, (k + noise) / 17, rtol=1e-6)


@pytest.mark.parametrize("model", [Sigmoid(), Certain()])
def test_dequantisation_keeps_the_levels(model):
    levels = np.tile(np.arange(256, dtype=np.float32), 8).reshape(2, 32, 32, 1)
    u = jnp.asarray(np.random.default_rng(3).normal(size=levels.shape), jnp.float32)
    params = PARAMS if isinstance(model, Sigmoid) else {}
    x01, log_q = jit(lambda image01: dequantize(model, params, image01, u))(jnp.asarray(levels / np.float32(255)))
    np.testing.assert_array_equal(np.floor(256 * np.asarray(x01, np.float64)), levels)
    assert np.max(x01) < 1 and log_q.shape == (2,)


def test_draws_are_a_function_of_key_and_index():
    loss_fn = jit(get_loss_fn(SDES["vp"], gaussian_score(SDES["vp"]), Sigmoid(), scaler, inverse_scaler))
    image01, key = images(6), jax.random.key(4)
    _, whole = loss_fn(PARAMS, {}, image01, jnp.arange(6), key)
    some = jnp.array([5, 2])
    _, part = loss_fn(PARAMS, {}, image01[some], some, key)
    for name in whole:
        np.testing.assert_allclose(whole[name][some], part[name], rtol=1e-6, err_msg=name)
        assert len(np.unique(whole[name])) == 6


def test_micro_batches_give_the_step_of_the_whole_batch():
    """Of plain gradient descent, so that the step is the gradient; as `--mode train_deq` makes it."""
    score = gaussian_score(SDES["vp"])
    loss_fn = get_loss_fn(SDES["vp"], score, Sigmoid(), scaler, inverse_scaler)

    def step(num_microbatches):
        step_fn = losses.get_step_fn(loss_fn, optax.sgd(1.0), 0.9, axis_name=None, num_microbatches=num_microbatches)
        state = losses.TrainState(jnp.int32(3), PARAMS, PARAMS, optax.sgd(1.0).init(PARAMS), {}, jax.random.PRNGKey(1))
        return jit(step_fn)(state, images(12))

    whole, metrics = step(1)
    assert float(metrics["grad_norm"]) > 1e-4
    for parts in (3, 12):
        ours, of_parts = step(parts)
        for name in metrics:
            np.testing.assert_allclose(of_parts[name], metrics[name], rtol=2e-6, err_msg=name)
        np.testing.assert_allclose(
            ours.params["slope"] - PARAMS["slope"], whole.params["slope"] - PARAMS["slope"], rtol=1e-5
        )


def test_training_the_small_flow():
    """Gradients are finite, and some steps lower the bound, on images whose levels follow the score's Gaussian."""
    count, shape = 64, (8, 8, 1)
    rng = np.random.default_rng(5)
    x = MEAN + STD * rng.normal(size=(count, *shape))
    image01 = jnp.asarray(np.clip(np.round(127.5 * (x + 1)), 0, 255) / np.float32(255))
    model = create_dequantizer("small", dropout=0.1)
    u = jnp.asarray(rng.normal(size=image01.shape), jnp.float32)
    params = jit(lambda key: init_params(model, key, image01, u))(jax.random.key(0))
    assert 30_000 < sum(leaf.size for leaf in jax.tree.leaves(params)) < 100_000
    loss_fn = get_loss_fn(SDES["vp"], gaussian_score(SDES["vp"]), model, scaler, inverse_scaler)
    step = jit(jax.value_and_grad(loss_fn, has_aux=True))

    log_q = []
    for i in range(8):
        (loss, terms), gradient = step(params, {}, image01, jnp.arange(count), jax.random.key(i))
        assert np.isfinite(loss)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
        log_q.append(float(np.mean(terms["log_q"])))
        norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
        params = jax.tree.map(lambda p, g, norm=norm: p - 0.02 * g / norm, params, gradient)
    # Levels are far finer than the data's spread, so uniform noise is best, of log q = 0; the start is more peaked.
    assert log_q[0] > 0.1 and log_q[-1] < 0.7 * log_q[0]
