# SPDX-License-Identifier: Apache-2.0
"""The losses against truth: exact scores, explicit derivative tensors, means over all probes, finite differences.

The three tests of the design are all needed: the point mass sees a term that does not vanish, the mixture a wrong
constant, the explicit tensors a wrong cross term whose mean is zero.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from quick import busy_jit, jit
from scipy import integrate, special, stats

import losses
import sde_lib
from configs.default_configs import get_default_configs
from errors import UserError
from models import create_model, init_params
from models.score import get_score_fn

SDES = {"vp": sde_lib.VPSDE(), "subvp": sde_lib.subVPSDE(), "ve": sde_lib.VESDE()}
NEW_SDES = {
    "vp_log_snr": sde_lib.VPLogSNR(log_snr_min=-5.0, log_snr_max=4.0),
    "straight": sde_lib.StraightPath(log_snr_min=-5.0, log_snr_max=4.0),
}
ALL_SDES = {**SDES, **NEW_SDES}
new = [pytest.param(sde, marks=pytest.mark.slow) for sde in NEW_SDES.values()]
all_sdes = pytest.mark.parametrize("sde", [*SDES.values(), *new], ids=ALL_SDES)
all_orders = pytest.mark.parametrize("order", [1, 2, 3])
both_forms = pytest.mark.parametrize("exact", [False, True], ids=["probe", "exact"])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draws(batch, shape, seed=0):
    rng = np.random.default_rng(seed)
    t = jnp.asarray(rng.uniform(0.05, 1.0, batch))
    z = jnp.asarray(rng.normal(size=(batch, *shape)))
    v = jnp.asarray(rng.choice([-1.0, 1.0], size=(batch, *shape)))
    return t, z, v


@all_sdes
@all_orders
@both_forms
def test_point_mass_has_no_loss_under_its_exact_score(sde, order, exact):
    point = jnp.asarray([0.3, -1.2, 0.7])

    def score(x, t):
        mean, std = sde.marginal_prob(jnp.broadcast_to(point, x.shape), t)
        return sde_lib.batch_mul(-1 / std**2, x - mean)

    t, z, v = draws(16, (3,))
    terms = jit(lambda t, z, v: losses.dsm_losses(sde, score, jnp.broadcast_to(point, z.shape), t, z, v, order, exact))
    for term in terms(t, z, v):
        np.testing.assert_allclose(term, 0, atol=1e-16)


# An asymmetric mixture in the plane: weights, means, standard deviations
WEIGHTS, MEANS, STDS = np.array([0.25, 0.75]), np.array([[1.0, -0.4], [-0.6, 0.9]]), np.array([0.6, 0.9])


def mixture_score(sde):
    def log_density(x, t):
        var = sde.alpha(t) ** 2 * STDS**2 + sde.sigma(t) ** 2
        dist_sq = jnp.sum((x - sde.alpha(t) * MEANS) ** 2, axis=-1)
        return jax.scipy.special.logsumexp(jnp.log(WEIGHTS) - jnp.log(var) - 0.5 * dist_sq / var)

    return jax.vmap(jax.grad(log_density))


def hermite_grid(n):
    """Nodes [n^2, 2] and weights of Gauss-Hermite quadrature for N(0, I) in the plane."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    weights = weights / weights.sum()
    grid = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), axis=-1).reshape(-1, 2)
    return grid, np.outer(weights, weights).reshape(-1)


def mixture_quadrature(alpha, sigma):
    """x0, z [M, 2] and weights [M] with which sums are expectations.

    For one component, x_t is Gaussian (many nodes) and so is z given x_t, where the gradient of the losses is a
    polynomial of degree 3 (4 nodes are exact).
    """
    (p, p_weight), (q, q_weight) = hermite_grid(64), hermite_grid(4)
    p, q = np.repeat(p, len(q), axis=0), np.tile(q, (len(p), 1))
    weight = np.outer(p_weight, q_weight).reshape(-1)
    rows = []
    for mean, std in zip(MEANS, STDS, strict=True):
        total = np.hypot(alpha * std, sigma)
        z = sigma / total * p + alpha * std / total * q
        rows.append(((alpha * mean + total * p - sigma * z) / alpha, z))
    x0, z = map(np.concatenate, zip(*rows, strict=True))
    return x0, z, np.concatenate([w * weight for w in WEIGHTS])


@functools.cache
def expected_gradient(sde, exact):
    """(theta, v, x0, z, weight, time, alpha, sigma) -> d E[loss] / d theta, for each term."""

    def expected_terms(theta, v, x0, z, weight, time, alpha, sigma):
        def score(x, t):
            u = x / jnp.hypot(alpha, sigma)
            bumps = [jnp.sin(u @ jnp.array([[1.0, 0.3], [0.2, -0.8]]) + 0.4), jnp.cos(0.7 * u) * u[:, ::-1]]
            return mixture_score(sde)(x, t) + sum(a * b for a, b in zip(theta, bumps, strict=True)) / sigma

        t = jnp.full(len(x0), time)
        terms = losses.dsm_losses(sde, score, x0, t, z, jnp.broadcast_to(v, x0.shape), 3, exact)
        return jnp.stack([jnp.sum(weight * term) for term in terms])

    return busy_jit(jax.jacfwd(expected_terms))


@all_sdes
@both_forms
@pytest.mark.parametrize("time", [0.3, 0.5])
def test_exact_score_of_a_mixture_is_stationary(sde, exact, time):
    """d E[loss] / d theta = 0 at the exact score, for each term by itself, for perturbations of several shapes."""
    alpha, sigma = float(sde.alpha(jnp.float64(time))), float(sde.sigma(jnp.float64(time)))
    point = *map(jnp.asarray, mixture_quadrature(alpha, sigma)), time, alpha, sigma
    jacobian = expected_gradient(sde, exact)
    for v in [[1.0, 1.0], [1.0, -1.0]]:
        theta = jnp.zeros(2)
        gradient, away = (np.asarray(jacobian(th, jnp.asarray(v), *point)) for th in (theta, theta + 0.3))
        live = [0, 2, 3] if exact else [0, 1, 2, 3]
        np.testing.assert_allclose(gradient, 0, atol=1e-8)
        assert np.all(np.abs(away[live]).max(axis=1) > 1e-5), "the test must see a perturbed score"


def score_one(params, x, t):
    """A smooth nonlinear score of one example."""
    return jnp.tanh(x @ params["w"] + t) @ params["u"] - 0.3 * x * t


def tiny_net(dim, seed=1):
    """Parameters of `score_one` on R^dim."""
    rng = np.random.default_rng(seed)
    return {"w": jnp.asarray(rng.normal(size=(dim, 5))), "u": jnp.asarray(rng.normal(size=(5, dim)) / 2)}


@jit
def derivatives(params, x, t):
    """s, J[i, j] = ds_i/dx_j and d^2 s_i / dx_j dx_k of `score_one`, in full."""
    jacobian = jax.jacrev(score_one, argnums=1)
    return score_one(params, x, t), jacobian(params, x, t), jax.jacrev(jacobian, argnums=1)(params, x, t)


def explicit_terms(sde, params, frozen, x0, t, z, v, exact):
    """All terms of one example from the full Jacobian and third derivative, with `frozen` under the stop-gradients."""
    dim = len(x0)
    t = jnp.asarray(t)
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    x = alpha * x0 + sigma * z
    s, jac, second = map(np.asarray, derivatives(params, x, t))
    s_sg, jac_sg, _ = map(np.asarray, derivatives(frozen, x, t))
    c = z + sigma * s_sg
    first = np.mean((sigma * s + z) ** 2)
    if exact:
        l2 = np.mean((sigma**2 * jac + np.eye(dim) - np.outer(c, c)) ** 2)
        residual = sigma**3 * np.einsum("iik->k", second) + (c @ c) * c
        residual = residual - (sigma**2 * np.trace(jac_sg) + dim) * c - 2 * (sigma**2 * jac_sg + np.eye(dim)) @ c
        return np.array([first, 0.0, l2, np.mean(residual**2)])
    trace = ((sigma**2 * v @ jac @ v + v @ v - (c @ v) ** 2) / dim) ** 2
    frobenius = np.sum((sigma**2 * jac @ v + v - (c @ v) * c) ** 2) / dim**2
    residual = sigma**3 * np.einsum("i,j,ijk->k", v, v, second) + (c @ v) ** 2 * c
    residual = residual - (sigma**2 * v @ jac_sg @ v + v @ v) * c - 2 * (v @ c) * (sigma**2 * jac_sg @ v + v)
    return np.array([first, trace, frobenius, np.sum(residual**2) / dim**3])


@all_sdes
@both_forms
@all_orders
def test_against_explicit_hessian_and_third_derivative(sde, exact, order):
    params = tiny_net(3)
    score = jax.vmap(lambda x, t: score_one(params, x, t))
    t, z, v = draws(6, (3,))
    x0 = 0.7 * z[::-1] + 0.2
    terms = np.stack(jit(lambda *args: losses.dsm_losses(sde, score, *args, order, exact))(x0, t, z, v), axis=-1)
    args = [np.asarray(a) for a in (x0, t, z, v)]
    truth = np.stack([explicit_terms(sde, params, params, *row, exact) for row in zip(*args, strict=True)])
    truth[:, {1: 1, 2: 3, 3: 4}[order] :] = 0
    np.testing.assert_allclose(terms, truth, rtol=1e-9, atol=1e-12)


def test_images_are_flattened():
    """[B, H, W, C] gives what [B, H W C] gives."""
    sde = SDES["vp"]
    params = tiny_net(12)
    flat_score = jax.vmap(lambda x, t: score_one(params, x, t))
    t, z, v = draws(4, (2, 2, 3))

    def image_score(x, t):
        return flat_score(x.reshape(4, 12), t).reshape(x.shape)

    image_terms = jit(lambda z, v: losses.dsm_losses(sde, image_score, 0.5 * z, t, z, v, 3))(z, v)
    flat_terms = jit(lambda z, v: losses.dsm_losses(sde, flat_score, 0.5 * z, t, z, v, 3))(
        z.reshape(4, 12), v.reshape(4, 12)
    )
    np.testing.assert_allclose(image_terms, flat_terms, rtol=1e-12)


@all_sdes
def test_probe_form_averaged_over_all_probes(sde):
    """D = 3, all 8 sign vectors. With symmetric part S of A and T the third-order tensor contracted with v v:
    E (v.Av)^2 = (tr A)^2 + 4 sum_{i<j} S_ij^2, E |Av|^2 = |A|_F^2, and the same for each component of T.
    """
    dim = 3
    params = tiny_net(dim)
    score = jax.vmap(lambda x, t: score_one(params, x, t))
    t, z, _ = draws(1, (dim,))
    x0 = jnp.ones((1, dim)) * 0.4
    probes = [jnp.asarray([v]) for v in itertools.product([-1.0, 1.0], repeat=dim)]
    terms = jit(lambda v: losses.dsm_losses(sde, score, x0, t, z, v, 3))
    mean = np.mean([np.stack(terms(v), -1)[0] for v in probes], axis=0)

    x = np.asarray(sde.alpha(t[0]) * x0[0] + sde.sigma(t[0]) * z[0])
    sigma, z = float(sde.sigma(t[0])), np.asarray(z[0])
    s, jac, second = map(np.asarray, derivatives(params, x, t[0]))
    c = z + sigma * s
    eye = np.eye(dim)

    def mean_quadratic_sq(a):
        sym = (a + a.T) / 2
        return np.trace(a) ** 2 + 4 * sum(sym[i, j] ** 2 for i in range(dim) for j in range(i))

    a = sigma**2 * jac + eye - np.outer(c, c)
    tensor = sigma**3 * np.moveaxis(second, -1, 0) + np.einsum("k,i,j->kij", c, c, c)
    tensor = tensor - np.einsum("k,ij->kij", c, sigma**2 * jac + eye)
    tensor = tensor - 2 * np.einsum("i,kj->kij", c, sigma**2 * jac + eye)
    np.testing.assert_allclose(mean[1], mean_quadratic_sq(a) / dim**2, rtol=1e-10)
    np.testing.assert_allclose(mean[2], np.sum(a**2) / dim**2, rtol=1e-10)
    np.testing.assert_allclose(mean[3], sum(map(mean_quadratic_sq, tensor)) / dim**3, rtol=1e-10)


@all_sdes
@both_forms
def test_parameter_gradient_against_finite_differences(sde, exact):
    """Central differences of the explicit formula in which what stands under a stop-gradient is held fixed."""
    params = tiny_net(2)
    t, z, v = draws(3, (2,))
    x0 = 0.7 * z[::-1] + 0.2
    flat, unflatten = jax.flatten_util.ravel_pytree(params)

    def total(flat):
        params = unflatten(flat)
        score = jax.vmap(lambda x, t: score_one(params, x, t))
        return sum(jnp.sum(term) for term in losses.dsm_losses(sde, score, x0, t, z, v, 3, exact))

    gradient = np.asarray(jit(jax.grad(total))(flat))
    args = [np.asarray(a) for a in (x0, t, z, v)]

    def reference(flat):
        rows = zip(*args, strict=True)
        return sum(explicit_terms(sde, unflatten(flat), params, *row, exact).sum() for row in rows)

    h = 1e-5
    for i in np.random.default_rng(3).choice(len(flat), 8, replace=False):
        step = jnp.zeros_like(flat).at[i].set(h)
        difference = (reference(flat + step) - reference(flat - step)) / (2 * h)
        np.testing.assert_allclose(gradient[i], difference, rtol=1e-6, atol=1e-7)


def test_unknown_order():
    t, z, v = draws(2, (2,))
    with pytest.raises(ValueError, match="order 4"):
        losses.dsm_losses(SDES["vp"], lambda x, t: x, z, t, z, v, 4)
    with pytest.raises(ValueError, match="needs a probe"):
        losses.dsm_losses(SDES["vp"], lambda x, t: x, z, t, z, None, 2)
    assert losses.dsm_losses(SDES["vp"], lambda x, t: x, z, t, z, None, 1).first.shape == (2,)


def training_config(**overrides):
    config = get_default_configs().training
    config.update(**overrides)
    return config


def weighting(**overrides):
    return losses.get_weighting(training_config(**overrides))


@all_sdes
def test_likelihood_weighting_and_importance_weighting_agree(sde):
    """E over uniform t of g^2/sigma^2 L1 = Z E over importance-weighted t of L1, Z = lambda(eps) - lambda(T)."""
    eps, n = 1e-3, 200_001

    def first(t):
        return 1 + jnp.sin(3 * t)  # stands for the loss of a network

    u = (jnp.arange(n) + 0.5) / n
    uniform = eps * (sde.T / eps) ** u  # a geometric grid, with its density, integrates the peak at 0
    weight = weighting(likelihood_weighting=True)(sde, uniform)
    by_uniform = jnp.mean(first(uniform) * weight * uniform * np.log(sde.T / eps))
    t = sde.time(u, eps, importance=True)
    start, end = sde.log_snr_range(eps, jnp.float64)
    by_importance = (start - end) * jnp.mean(first(t))
    np.testing.assert_allclose(by_uniform, by_importance, rtol=1e-6)
    for by_importance in (True, False):
        weight = weighting(likelihood_weighting=by_importance, importance_weighting=by_importance)(sde, t)
        np.testing.assert_array_equal(weight, jnp.ones(n))


def test_draws_depend_on_key_and_index_alone():
    sde, key = SDES["vp"], jax.random.PRNGKey(3)
    draw = jax.jit(lambda index: losses.draw(key, index, (2, 2), lambda u: sde.time(u, 1e-5, False)))
    whole, part = draw(jnp.arange(8)), draw(jnp.array([5, 2]))
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(np.asarray(a)[[5, 2]], b)
    many = jit(lambda index: losses.draw(key, index, (2,), lambda u: sde.time(u, 0.01, True)))(jnp.arange(4000))
    assert many.t.min() >= 0.01 * (1 - 1e-5) and many.t.max() <= 1
    assert set(np.unique(many.v)) == {-1.0, 1.0}
    np.testing.assert_allclose(np.cov(np.asarray(many.z).T), np.eye(2), atol=0.1)


def test_antithetic_times_are_evenly_spread_over_the_batch():
    draw = jit(lambda key, index: losses.draw(key, index, (1,), lambda u: u, antithetic=8))
    u = np.asarray(draw(jax.random.PRNGKey(3), jnp.arange(8)).t)
    np.testing.assert_allclose(np.diff(np.sort(u)), 1 / 8, rtol=1e-12)
    assert np.array_equal(draw(jax.random.PRNGKey(3), jnp.array([6, 1])).t, u[[6, 1]])  # on another device
    starts = [np.min(draw(jax.random.PRNGKey(k), jnp.arange(8)).t) for k in range(300)]
    assert stats.kstest(np.array(starts) * 8, "uniform").pvalue > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["uniform", "log_snr"])
def test_antithetic_times_have_less_variance(sampling):
    """Of the loss of a batch of 64 under an MLP with random weights, over 200 batches.

    With times drawn for velocity the loss depends little on the time, and there is next to nothing to gain.
    """
    config = get_default_configs()
    config.model.update(name="mlp", nf=16, num_layers=2, sigma_data=0.7)
    config.training.update(sde="vp_log_snr", time_sampling=sampling)
    sde, model = sde_lib.from_config(config), create_model(config)
    params, _ = init_params(model, jax.random.key(0), (1, 2))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape)), params)
    x0 = jnp.asarray(0.7 * rng.normal(size=(64, 2)))
    keys = jax.random.split(jax.random.PRNGKey(1), 200)

    def variance(antithetic):
        score_fn_of = lambda params, state, keys: get_score_fn(sde, model, params, state)  # noqa: E731
        loss_fn = losses.get_loss_fn(config.training, sde, score_fn_of, 0.7, antithetic)
        of_key = lambda key: loss_fn(params, {}, x0, jnp.arange(64), key)[0]  # noqa: E731
        return float(np.var(jit(lambda keys: jax.lax.map(of_key, keys))(keys)))

    assert variance(64) < 0.75 * variance(0)


@pytest.mark.parametrize("sampling", ["uniform", "log_snr", "velocity"])
@pytest.mark.parametrize("name", ALL_SDES)
def test_every_time_sampling_has_the_weight_of_the_likelihood(name, sampling):
    """E w(t) L(t) by an even grid of u against the mean over lambda of a smooth L, and the law of lambda itself."""
    sde, config, sigma_data = ALL_SDES[name], training_config(time_sampling=sampling, smallest_time=1e-3), 0.7
    time, factor = losses.get_times(config, sde, sigma_data)
    n = 400_000
    t = time((jnp.arange(n) + 0.5) / n)
    start, end = map(float, sde.log_snr_range(1e-3, jnp.float64))
    log_snr = np.asarray(sde.log_snr(t))

    def loss(log_snr):  # that falls with the signal, as that of every network does
        return special.expit(log_snr + 1) * (1 + np.cos(0.4 * log_snr))

    truth = integrate.quad(loss, end, start)[0] / (start - end)
    np.testing.assert_allclose(np.mean(np.asarray(factor(t)) * loss(log_snr)), truth, rtol=1e-5)
    if sampling == "velocity":  # the quantiles of a density ~ s(lambda + 2 ln S), inverted numerically
        grid = np.linspace(end, start, 200_001)
        density = special.expit(grid + 2 * np.log(sigma_data))
        mass = integrate.cumulative_trapezoid(density, grid, initial=0)
        u = np.array([0.03, 0.2, 0.5, 0.9, 0.999])
        truth = np.interp((1 - u) * mass[-1], mass, grid)
        np.testing.assert_allclose(sde.log_snr(time(jnp.asarray(u))), truth, atol=1e-5)


@pytest.mark.parametrize("name", ALL_SDES)
def test_loss_of_velocity_is_that_of_the_noise(name):
    """w |eps_hat - eps|^2 is constant times |F - F*|^2 with times drawn for velocity, F* the standardised target."""
    sde, sigma_data, dim = ALL_SDES[name], 0.6, 3
    rng = np.random.default_rng(4)
    x0, matrix = jnp.asarray(rng.normal(size=(9, dim))) * sigma_data, jnp.asarray(rng.normal(size=(dim, dim)))
    key = jax.random.PRNGKey(5)

    def score_fn_of(params, state, keys):
        def score_fn(x, t):
            alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
            v = (alpha * sigma_data) ** 2 + sigma**2
            return -x / v - alpha * sigma_data / (sigma * jnp.sqrt(v)) * jnp.tanh(x / jnp.sqrt(v) @ matrix)

        return score_fn

    config = training_config(time_sampling="velocity", smallest_time=1e-3)
    loss_fn = jit(losses.get_loss_fn(config, sde, score_fn_of, sigma_data))
    _, terms = loss_fn({}, {}, x0, jnp.arange(9), key)
    time, _ = losses.get_times(config, sde, sigma_data)
    t, z, _ = losses.draw(jax.random.split(key)[0], jnp.arange(9), (dim,), time)
    alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
    std = jnp.sqrt((alpha * sigma_data) ** 2 + sigma**2)
    target = (alpha * sigma_data * z - sigma * x0 / sigma_data) / std
    f = jnp.tanh((alpha * x0 + sigma * z) / std @ matrix)
    start, end = map(float, sde.log_snr_range(1e-3, jnp.float64))
    mass = np.logaddexp(0, start + 2 * np.log(sigma_data)) - np.logaddexp(0, end + 2 * np.log(sigma_data))
    truth = mass / (start - end) * np.mean(np.square(f - target), axis=1)
    np.testing.assert_allclose(terms["first"], truth, rtol=1e-6)


def test_orders_share_the_factor_of_the_times():
    sde, params = ALL_SDES["vp_log_snr"], tiny_net(2)

    def terms_of(sampling):
        config = training_config(time_sampling=sampling, score_matching_order=3, smallest_time=1e-3)
        loss_fn = losses.get_loss_fn(config, sde, lambda p, s, k: jax.vmap(lambda x, t: score_one(p, x, t)), 1.0)
        time, factor = losses.get_times(config, sde, 1.0)
        draw_key = jax.random.split(jax.random.PRNGKey(0))[0]
        draws = losses.draw(draw_key, jnp.arange(4), (2,), time)
        _, terms = jit(loss_fn)(params, {}, jnp.ones((4, 2)), jnp.arange(4), jax.random.PRNGKey(0))
        plain = losses.dsm_losses(sde, score_fn_of(params), jnp.ones((4, 2)), *draws, 3)
        return terms, plain, factor(draws.t)

    def score_fn_of(params):
        return jax.vmap(lambda x, t: score_one(params, x, t))

    terms, plain, factor = terms_of("velocity")
    assert np.ptp(factor) > 0.01
    np.testing.assert_allclose(terms["first"], factor * plain.first, rtol=1e-10)
    np.testing.assert_allclose(terms["second"], factor * (plain.second_trace + plain.second_frobenius), rtol=1e-10)
    np.testing.assert_allclose(terms["third"], factor * plain.third, rtol=1e-10)


def test_loss_fn_weights_and_reports_its_terms():
    sde = SDES["ve"]
    params = tiny_net(2)

    def score_fn_of_params(params, model_state, dropout_key):
        return jax.vmap(lambda x, t: score_one(params, x / 50, t))

    x0, key = jnp.ones((8, 2)), jax.random.PRNGKey(0)

    def run(**overrides):
        loss_fn = losses.get_loss_fn(training_config(**overrides), sde, score_fn_of_params)
        loss, terms = jit(loss_fn)(params, {}, x0, jnp.arange(8), key)
        np.testing.assert_allclose(loss, jnp.mean(terms["loss"]))
        return {k: np.asarray(v) for k, v in terms.items()}

    third = run(score_matching_order=3, second_order_weight=0.5, third_order_weight=0.1)
    assert all(v.shape == (8,) for v in third.values())
    np.testing.assert_allclose(third["loss"], third["first"] + 0.5 * third["second"] + 0.1 * third["third"])
    scaled = run(score_matching_order=3, third_order_weight=0.1, third_order_scaling="dimension")["loss"]  # D = 2
    np.testing.assert_allclose(scaled, third["first"] + third["second"] + 0.2 * third["third"])
    second, first = run(score_matching_order=2), run()
    np.testing.assert_allclose(second["loss"], second["first"] + second["second"])
    np.testing.assert_allclose(second["second"], third["second"])
    assert np.all(second["third"] == 0) and np.all(first["second"] == 0)
    np.testing.assert_allclose(first["loss"], third["first"])
    np.testing.assert_allclose(run(reduce_mean=False)["loss"], first["loss"] * 2 / 2)  # half the sum of D = 2
    weighted = run(likelihood_weighting=True)["first"]
    g_sq_over_var = 2 * np.log(5000)
    np.testing.assert_allclose(weighted, first["first"] * g_sq_over_var, rtol=1e-6)


def test_a_new_weighting_and_a_new_term_are_a_function_and_a_line(monkeypatch):
    """Score -A x with A not symmetric: the term is sigma^4 |(A^T - A) v|^2 / D; the weighting is sigma^2."""
    sde = SDES["vp"]
    rng = np.random.default_rng(8)
    a, x0 = rng.normal(size=(3, 3)), rng.normal(size=(5, 3))

    def asymmetry(sde, score_fn, x0, draws):
        mean, std = sde.marginal_prob(x0, draws.t)
        x = mean + std[:, None] * draws.z
        _, jv = jax.jvp(lambda x: score_fn(x, draws.t), (x,), (draws.v,))
        _, vjp = jax.vjp(lambda x: score_fn(x, draws.t), x)
        return jnp.mean(jnp.square(std[:, None] ** 2 * (jv - vjp(draws.v)[0])), axis=1)

    def loss_and_grad(config):
        loss_fn = losses.get_loss_fn(config, sde, lambda a, state, keys: lambda x, t: -x @ a.T)
        (loss, terms), grad = jit(jax.value_and_grad(loss_fn, has_aux=True))(
            jnp.asarray(a), {}, jnp.asarray(x0), jnp.arange(5), jax.random.PRNGKey(0)
        )
        np.testing.assert_allclose(loss, np.mean(terms["loss"]))
        return {name: np.asarray(term) for name, term in terms.items()}, np.asarray(grad)

    monkeypatch.setitem(losses.WEIGHTINGS, "variance", lambda sde, t: jnp.square(sde.sigma(t)))
    monkeypatch.setitem(losses.TERMS, "asymmetry", asymmetry)
    config = training_config()
    with config.unlocked():
        config.asymmetry_weight = 0.0
    plain, plain_grad = loss_and_grad(config)
    assert "asymmetry" not in plain
    config.update(weighting="variance", asymmetry_weight=0.3)
    terms, _ = loss_and_grad(config)

    draw_key = jax.random.split(jax.random.PRNGKey(0))[0]
    draws = losses.draw(draw_key, jnp.arange(5), (3,), lambda u: sde.time(u, 1e-5, False))
    variance, v = np.asarray(sde.sigma(draws.t)) ** 2, np.asarray(draws.v)
    antisymmetric = v @ (a - a.T).T
    truth = variance**2 * np.mean(antisymmetric**2, axis=1)
    np.testing.assert_allclose(terms["asymmetry"], truth, rtol=1e-6)
    np.testing.assert_allclose(terms["first"], variance * plain["first"], rtol=1e-6)
    np.testing.assert_allclose(terms["loss"], terms["first"] + 0.3 * truth, rtol=1e-6)
    # d truth / d A = 2 variance^2 / D (u v^T - v u^T) with u = (A - A^T) v
    outer = np.einsum("b,bi,bj->bij", 2 * variance**2 / 3, antisymmetric, v)
    config.weighting = "uniform"
    _, grad = loss_and_grad(config)
    np.testing.assert_allclose(grad - plain_grad, 0.3 * np.mean(outer - outer.swapaxes(1, 2), axis=0), rtol=1e-5)


def test_unknown_weighting():
    with pytest.raises(UserError, match=r"training\.weighting='snr' is unknown; use one of uniform, likelihood"):
        losses.get_loss_fn(training_config(weighting="snr"), SDES["vp"], lambda *args: lambda x, t: x)


def test_optimizer_is_adam_with_warmup_and_global_clipping():
    """Five steps written out in numpy."""
    config = ConfigDict(get_default_configs().optim.to_dict())
    config.update(lr=0.1, warmup=3, grad_clip=1.0, weight_decay=0.0)
    optimizer = losses.get_optimizer(config)
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=3)), "b": jnp.asarray(rng.normal(size=(2, 2)))}
    truth = {k: np.asarray(v).copy() for k, v in params.items()}
    m = {k: np.zeros_like(v) for k, v in truth.items()}
    s = {k: np.zeros_like(v) for k, v in truth.items()}
    state = optimizer.init(params)
    for step in range(5):
        grads = {k: rng.normal(size=v.shape) * (3 if step % 2 else 0.1) for k, v in truth.items()}
        updates, state = optimizer.update({k: jnp.asarray(g) for k, g in grads.items()}, state, params)
        params = optax.apply_updates(params, updates)
        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        rate = 0.1 * min(step / 3, 1)
        for k, g in grads.items():
            g = g / max(norm, 1.0)
            m[k] = 0.9 * m[k] + 0.1 * g
            s[k] = 0.999 * s[k] + 0.001 * g**2
            m_hat, s_hat = m[k] / (1 - 0.9 ** (step + 1)), s[k] / (1 - 0.999 ** (step + 1))
            truth[k] -= rate * m_hat / (np.sqrt(s_hat) + 1e-8)
        for k in truth:
            np.testing.assert_allclose(params[k], truth[k], rtol=1e-6)  # the learning rate is float32


def test_step_does_not_depend_on_the_number_of_devices():
    """The same global batch on 1 and on 4 (virtual) devices: same parameters, EMA and metrics."""
    params = tiny_net(2)

    def score_fn_of_params(params, model_state, dropout_key):
        return jax.vmap(lambda x, t: score_one(params, x, t))

    config = get_default_configs()
    config.optim.warmup = 0
    loss_fn = losses.get_loss_fn(training_config(score_matching_order=2), SDES["vp"], score_fn_of_params)
    optimizer = losses.get_optimizer(config.optim)
    step_fn = losses.get_step_fn(loss_fn, optimizer, ema_rate=0.9)
    state = losses.TrainState(
        jnp.zeros((), jnp.int32), params, params, optimizer.init(params), {}, jax.random.PRNGKey(0)
    )
    x0 = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2)))
    results = []
    for devices in (1, 4):
        vstep = jit(jax.vmap(step_fn, axis_name="batch", in_axes=(None, 0)))
        new, metrics = vstep(state, x0.reshape(devices, 8 // devices, 2))
        results.append(jax.tree.map(lambda x: np.asarray(x[0]), (new.params, new.ema_params, metrics)))
        np.testing.assert_array_equal(new.step, 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), *results)
    new_params, ema, metrics = results[0]
    np.testing.assert_allclose(ema["w"], 0.9 * params["w"] + 0.1 * new_params["w"], rtol=1e-6)
    assert metrics["grad_norm"] > 0 and np.abs(new_params["w"] - params["w"]).max() > 1e-5


@pytest.mark.parametrize("order", [1, 3])
def test_shares_of_the_terms_in_the_gradient(order):
    """Against `jax.grad` of each term's mean, on 1 and 4 devices and in micro-batches."""
    params = tiny_net(2)

    def score_fn_of_params(params, model_state, dropout_key):
        return jax.vmap(lambda x, t: score_one(params, x, t))

    config = training_config(score_matching_order=order, second_order_weight=0.5, third_order_weight=3.0)
    weights = losses.term_weights(config, 2)
    assert weights == {"first": 1.0, "second": 0.5 * (order > 1), "third": 3.0 * (order > 2)}
    loss_fn = losses.get_loss_fn(config, SDES["vp"], score_fn_of_params)
    state = losses.TrainState(jnp.asarray(4), params, params, None, {}, jax.random.PRNGKey(0))
    x0 = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2)))

    def norm(name):
        key = jax.random.fold_in(state.key, 4)
        grads = jax.grad(lambda params: jnp.mean(loss_fn(params, {}, x0, jnp.arange(8), key)[1][name]))(params)
        return weights[name] * np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))

    norms = {name: norm(name) for name, weight in weights.items() if weight}
    truth = {f"grad_share/{name}": value / sum(norms.values()) for name, value in norms.items()}
    for devices, parts in ((1, 1), (4, 1), (2, 2)):
        shares_fn = losses.get_grad_shares_fn(loss_fn, weights, num_microbatches=parts)
        shares = jit(jax.vmap(shares_fn, axis_name="batch", in_axes=(None, 0)))(state, x0.reshape(devices, -1, 2))
        assert {name: float(share[0]) for name, share in shares.items()} == pytest.approx(truth, rel=1e-9)


def test_gradients_of_the_orders_fall_with_the_dimension():
    """At the exact score of N(0, I): the terms, and the spread of their derivatives along an error q_i = x_i^2 / 2.

    The closed forms of docs/math.md. From D = 4 to 256 the spread falls as D^-1/2, D^-1/2 (trace) and D^-3/2.
    """
    sde, t, dims, spreads = SDES["vp"], 0.3, (4, 16, 64, 256), []
    for dim in dims:
        rng = np.random.default_rng(dim)
        x0, z = jnp.asarray(rng.normal(size=(2, 40_000, dim)))
        v, times = jnp.asarray(rng.choice([-1.0, 1.0], size=x0.shape)), jnp.full(len(x0), t)
        alpha, sigma = float(sde.alpha(times)[0]), float(sde.sigma(times)[0])
        a = alpha**2 / (alpha**2 + sigma**2)

        @jit
        def terms_and_slopes(x0, times, z, v):
            def terms(size):
                def score_fn(x, t):
                    error = size * jnp.square(x) / 2
                    return -x / (alpha**2 + sigma**2) + error / sigma  # noqa: B023

                return losses.dsm_losses(sde, score_fn, x0, times, z, v, 3)

            return jax.jvp(terms, (jnp.zeros(()),), (jnp.ones(()),))

        values, slopes = terms_and_slopes(x0, times, z, v)
        means = [a, 2 * a**2, a**2 * (1 + 1 / dim), a**3 * (2 + 4 / dim)]
        np.testing.assert_allclose([value.mean() for value in values], means, rtol=0.05)
        variances = [3 * a / dim, 8 * (a * sigma) ** 2 / dim, 8 * a**3 * sigma**4 * (dim + 2) / dim**4]
        found = [slope.std() for slope in (slopes.first, slopes.second_trace, slopes.third)]
        np.testing.assert_allclose(found, np.sqrt(variances), rtol=0.05)
        spreads.append(found)
    exponents = [np.polyfit(np.log(dims), np.log(spread), 1)[0] for spread in zip(*spreads, strict=True)]
    np.testing.assert_allclose(exponents, [-0.5, -0.5, -1.5], atol=0.06)
