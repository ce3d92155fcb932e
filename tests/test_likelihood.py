# SPDX-License-Identifier: Apache-2.0
"""likelihood against closed forms: Gaussian data, whose score, flow map and density are known for every process."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import busy_jit, jit

from likelihood import (
    bits_per_dim,
    bound_offset,
    even_grid_log_likelihood,
    likelihood_bound,
    ode_log_likelihood,
    probe,
    score_and_divergence,
)
from sde_lib import VESDE, VPSDE, StraightPath, VPLogSNR, subVPSDE

EPS = 1e-5
SDES = {
    "vp": VPSDE(beta_min=0.1, beta_max=20.0),
    "subvp": subVPSDE(beta_min=0.1, beta_max=20.0),
    "ve": VESDE(sigma_min=0.01, sigma_max=50.0),
    "linearve": VESDE(sigma_min=0.01, sigma_max=50.0, linear=True),
    "vp_log_snr": VPLogSNR(log_snr_min=-5.0, log_snr_max=13.3),
    "straight": StraightPath(log_snr_min=-5.0, log_snr_max=13.3),
}
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in ("vp_log_snr", "straight") else ()) for name in SDES]
every_sde = pytest.mark.parametrize("name", NAMES)
MU = np.array([0.3, -0.5, 0.1])
STD = np.array([0.4, 0.8, 1.5])


def solve(sde, score_fn, x, v, **options):
    """`ode_log_likelihood` as one program."""
    return jit(lambda x, v: ode_log_likelihood(sde, score_fn, x, v, **options))(x, v)


def alpha_and_sigma(name, t):
    """Written out in float64 from the definitions of the processes."""
    if name == "vp_log_snr":
        snr = np.exp(13.3 - 18.3 * t)
        return np.sqrt(snr / (1 + snr)), np.sqrt(1 / (1 + snr))
    if name == "straight":
        ratio = np.exp((13.3 - 18.3 * t) / 2)
        return ratio / (1 + ratio), 1 / (1 + ratio)
    log_alpha = 0.0 if "ve" in name else -(t**2) * 19.9 / 4 - t * 0.1 / 2
    sigma = {
        "vp": np.sqrt(-np.expm1(2 * log_alpha)),
        "subvp": -np.expm1(2 * log_alpha),
        "ve": 0.01 * 5000.0**t,
        "linearve": 50.0 * t,
    }[name]
    return np.exp(log_alpha), sigma


def prior_std_of(name):
    """sigma_max of VE, 1 of VP and sub-VP, sigma(T) of the processes linear in log-SNR."""
    if name in ("vp_log_snr", "straight"):
        return alpha_and_sigma(name, 1.0)[1]
    return 50.0 if "ve" in name else 1.0


def normal_logp(x, mean, std):
    return np.sum(-0.5 * ((x - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi), axis=-1)


def gaussian_score(sde):
    """The score of N(MU, diag STD^2) diffused to t."""

    def score_fn(x, t):
        alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
        return -(x - alpha * MU) / (jnp.square(alpha * STD) + jnp.square(sigma))

    return score_fn


def marginal(name, t):
    alpha, sigma = alpha_and_sigma(name, t)
    return alpha * MU, np.sqrt((alpha * STD) ** 2 + sigma**2)


def flow_truth(name, x):
    """Latent and log density under the flow: (x_t - mean_t) / std_t is constant along it, so the map is affine."""
    (mean0, std0), (mean1, std1) = marginal(name, EPS), marginal(name, 1.0)
    z = mean1 + std1 * (x - mean0) / std0
    prior_std = prior_std_of(name)
    logp = normal_logp(z, 0, np.full(3, prior_std)) + np.sum(np.log(std1 / std0))
    return z, logp.astype(np.float64)


def data(n):
    return np.random.default_rng(0).normal(size=(n, 3)) * STD + MU


@every_sde
def test_ode_likelihood_of_a_gaussian(name):
    sde, x = SDES[name], data(5)
    score_fn = gaussian_score(sde)
    # J is diagonal, so one Rademacher probe is exact too.
    v = probe(jax.random.key(0), (5, 3), "rademacher")
    logp, z, nfe = solve(sde, score_fn, jnp.asarray(x, jnp.float32), v)
    z_truth, truth = flow_truth(name, x)
    np.testing.assert_allclose(logp, truth, atol=3e-4)  # 1e-4 nats per dimension
    np.testing.assert_allclose(z, z_truth, rtol=1e-4, atol=1e-4 * z_truth.std())
    assert nfe.shape == (5,) and nfe.min() > 20
    if name == "vp":  # up to the prior's misfit (alpha(T) is 0.0066), the flow's density is the data's
        np.testing.assert_allclose(logp, normal_logp(x, MU, STD), atol=1e-2)


@every_sde
def test_ode_likelihood_converges_to_the_truth(name):
    with jax.enable_x64(True):
        sde, x = SDES[name], data(2)
        logp, z, _ = solve(sde, gaussian_score(sde), jnp.asarray(x), None, rtol=1e-9, atol=1e-9)
        z_truth, truth = flow_truth(name, x)
        np.testing.assert_allclose(logp, truth, atol=1e-7)
        np.testing.assert_allclose(z, z_truth, rtol=1e-6)


def curved_score(x, t):
    """Not a gradient field, with a full Jacobian, so that a probe is a true estimate."""
    matrix = jnp.array([[-1.0, 0.7, 0.2], [0.5, -1.5, -0.6], [-0.9, 0.4, -0.8]])
    return (jnp.tanh(x) @ matrix + jnp.sin(x) * jnp.tanh(jnp.roll(x, 1, axis=-1))) * (1 + t[:, None])


def test_divergence_against_the_full_jacobian():
    x, t, v = jnp.asarray(data(4), jnp.float32), jnp.linspace(0.1, 1, 4), jax.random.normal(jax.random.key(0), (4, 3))
    jacobian = jit(jax.vmap(jax.jacrev(lambda x, t: curved_score(x[None], t[None])[0])))(x, t)
    score_and_estimate = jit(lambda x, t, v: score_and_divergence(curved_score, x, t, v))
    score, exact = score_and_estimate(x, t, None)
    np.testing.assert_allclose(score, curved_score(x, t), rtol=1e-6)
    np.testing.assert_allclose(exact, np.trace(jacobian, axis1=1, axis2=2), rtol=1e-5)
    score, estimate = score_and_estimate(x, t, v)
    np.testing.assert_allclose(score, curved_score(x, t), rtol=1e-6)
    np.testing.assert_allclose(estimate, np.einsum("bi,bij,bj->b", v, jacobian, v), rtol=1e-5)


def test_exact_trace_of_images():
    x, t = jax.random.normal(jax.random.key(0), (2, 2, 2, 1)), jnp.array([0.2, 0.7])
    _, divergence = score_and_divergence(lambda x, t: x**3 + jnp.sum(x, axis=(1, 2, 3), keepdims=True), x, t, None)
    np.testing.assert_allclose(divergence, 3 * jnp.sum(x**2, axis=(1, 2, 3)) + 4, rtol=1e-6)


def test_mean_over_all_probes_is_exact():
    sde, x = SDES["vp"], jnp.asarray(data(1), jnp.float32)
    signs = jnp.array(list(itertools.product([-1.0, 1.0], repeat=3)))
    estimates, _, _ = solve(sde, curved_score, jnp.tile(x, (8, 1)), signs)
    exact, _, _ = solve(sde, curved_score, x, None)
    assert estimates.std() > 0.1
    assert float(estimates.mean()) == pytest.approx(float(exact[0]), abs=1e-3)


def test_failed_example_is_nan_and_the_others_are_not():
    sde, x = SDES["vp"], jnp.asarray(data(3), jnp.float32).at[1].set(jnp.nan)
    logp, z, _ = solve(sde, gaussian_score(sde), x, None)
    assert np.isnan(logp).tolist() == [False, True, False] and np.isnan(z[1]).all() and np.isfinite(z[::2]).all()
    logp, _, nfe = solve(sde, gaussian_score(sde), x, None, max_steps=3)
    assert np.isnan(logp).all() and nfe[0] == 20


def test_probes():
    v = probe(jax.random.key(0), (1000, 3), "Rademacher")
    assert set(np.unique(v).tolist()) == {-1.0, 1.0} and abs(float(v.mean())) < 0.06
    v = probe(jax.random.key(0), (1000, 3), "gaussian")
    assert abs(float(v.var()) - 1) < 0.1
    assert probe(jax.random.key(0), (1000, 3), "exact") is None
    with pytest.raises(KeyError, match="cauchy"):
        probe(jax.random.key(0), (1000, 3), "cauchy")


def test_uniform_data_cost_eight_bits():
    dim = 12
    unit, centred = jnp.zeros(2), jnp.full(2, -dim * np.log(2.0))  # log density on [0, 1]^D and on [-1, 1]^D
    np.testing.assert_allclose(bits_per_dim(unit, dim, lambda x: x), 8, rtol=1e-6)
    np.testing.assert_allclose(bits_per_dim(centred, dim, lambda x: (x + 1) / 2), 8, rtol=1e-6)
    np.testing.assert_allclose(bits_per_dim(unit, dim, lambda x: (x + 1) / 2), 7, rtol=1e-6)
    np.testing.assert_allclose(bits_per_dim(unit, dim, lambda x: x, levels=17), np.log2(17), rtol=1e-6)


def mean_and_error(sde, score_fn, x, **options):
    """Mean and standard error of independent estimates of the bound at one point x [3]."""
    batch = jnp.tile(jnp.asarray(x, jnp.float32), (10_000, 1))

    @busy_jit
    def estimate(key):
        keys = jax.random.split(key, len(batch))
        return likelihood_bound(sde, score_fn, batch, keys, eps=EPS, num_time_samples=50, **options)

    bound = np.asarray(estimate(jax.random.key(1)), np.float64)
    return bound.mean(), bound.std() / np.sqrt(len(bound))


@pytest.mark.parametrize(
    ("name", "denoising", "importance_weighting"),
    [
        *((*name.values, True, True) for name in NAMES),
        ("vp", True, False),
        ("vp", False, True),
        ("subvp", False, False),
        ("ve", False, False),
        ("linearve", True, False),
    ],
)
def test_bound_is_tight_at_the_exact_score(name, denoising, importance_weighting):
    """At the exact score the bound is log p(x) + E[log prior(x_T) - log p_T(x_T) | x]: it loses the prior's misfit."""
    sde, x = SDES[name], np.array([0.5, 0.4, -1.0])
    options = {"denoising": denoising, "importance_weighting": importance_weighting}
    mean, error = mean_and_error(sde, gaussian_score(sde), x, **options)
    assert error < 0.06
    assert mean == pytest.approx(bound_truth(name, x), abs=4 * error)
    if (name, denoising, importance_weighting) == ("vp", True, True):  # no misfit: the ODE's density is the same
        logp, _, _ = solve(sde, gaussian_score(sde), jnp.asarray(x[None], jnp.float32), None)
        assert mean == pytest.approx(float(logp[0]), abs=4 * error)


def bound_truth(name, x):
    alpha, sigma = alpha_and_sigma(name, 1.0)
    noise = np.random.default_rng(0).normal(size=(4000, 3))
    noise = np.concatenate([noise, -noise])
    x_T = alpha * x + sigma * noise
    prior_std = prior_std_of(name)
    misfit = normal_logp(x_T, 0, np.full(3, prior_std)) - normal_logp(x_T, *marginal(name, 1.0))
    return normal_logp(x, MU, STD) + misfit.mean()


def test_bound_of_a_wrong_score():
    """The exact score s plus a constant c: the bound falls by the integral of g^2 / 2 (D c^2 + 2 c E[sum s | x])."""
    sde, x, c = SDES["vp"], np.array([0.5, 0.4, -1.0]), 0.3
    score_fn = gaussian_score(sde)
    times = np.linspace(EPS, 1, 20_001)
    mean_score = [np.sum(-alpha_and_sigma("vp", t)[0] * (x - MU) / marginal("vp", t)[1] ** 2) for t in times]
    fall = np.trapezoid(0.5 * (0.1 + 19.9 * times) * (3 * c**2 + 2 * c * np.array(mean_score)), times)
    wrong, error = mean_and_error(sde, lambda x, t: score_fn(x, t) + c, x)
    assert fall > 10 * error
    assert wrong == pytest.approx(bound_truth("vp", x) - fall, abs=4 * error)


def test_bound_without_offset_differs_by_the_offset():
    sde, x = SDES["vp"], jnp.asarray(data(4), jnp.float32)
    score_fn, keys = gaussian_score(sde), jax.random.split(jax.random.key(3), len(x))
    with_offset = jit(lambda x, keys: likelihood_bound(sde, score_fn, x, keys, num_time_samples=2))(x, keys)
    without = jit(lambda x, keys: likelihood_bound(sde, score_fn, x, keys, num_time_samples=2, offset=False))(x, keys)
    noise = jnp.stack([jax.random.normal(jax.random.split(key, 3)[1], x.shape[1:]) for key in keys])
    offset = jit(lambda x, noise: bound_offset(sde, score_fn, x, noise, EPS))(x, noise)
    np.testing.assert_allclose(without - with_offset, offset, atol=1e-4)


def test_offset_is_decoder_against_entropy():
    """Its definition: -log N(x; (x_eps + sigma^2 s) / alpha, sigma^2 / alpha^2) - entropy of x_eps given x."""
    with jax.enable_x64(True):
        sde, x, eps = SDES["subvp"], data(4), 0.3
        score_fn, noise = gaussian_score(sde), np.random.default_rng(1).normal(size=(4, 3))
        alpha, sigma = alpha_and_sigma("subvp", eps)
        x_eps = alpha * x + sigma * noise
        score = np.asarray(score_fn(jnp.asarray(x_eps), jnp.full(4, eps)))
        decoder = normal_logp(x, (x_eps + sigma**2 * score) / alpha, np.full(3, sigma / alpha))
        entropy = 1.5 * np.log(2 * np.pi * np.e * sigma**2)
        offset = bound_offset(sde, score_fn, jnp.asarray(x), jnp.asarray(noise), eps)
        np.testing.assert_allclose(offset, -decoder - entropy, rtol=1e-6)


def test_an_examples_bound_is_a_function_of_its_key():
    sde, x, keys = SDES["vp"], jnp.asarray(data(4), jnp.float32), jax.random.split(jax.random.key(5), 4)
    bound = jit(lambda x, keys: likelihood_bound(sde, gaussian_score(sde), x, keys, num_time_samples=3))
    np.testing.assert_allclose(bound(x, keys)[1:3], bound(x[1:3], keys[1:3]), rtol=1e-5)


def test_several_probes_average_the_divergence():
    """K probes give the mean of their K estimates, and all sign vectors of {-1, 1}^D the trace."""
    signs = np.stack(np.meshgrid(*[[-1.0, 1.0]] * 3, indexing="ij"), -1).reshape(8, 1, 3)
    x, t = jnp.asarray(data(2), jnp.float32), jnp.array([0.1, 0.6])
    matrix = jax.random.normal(jax.random.key(7), (3, 3))

    def score_fn(x, t):
        return jnp.tanh(x @ matrix) * t[:, None]

    probes = jnp.asarray(np.tile(signs, (1, 2, 1)), jnp.float32)
    estimate = jit(lambda v: score_and_divergence(score_fn, x, t, v))
    score, several = estimate(probes)
    singly = [estimate(v)[1] for v in probes]
    np.testing.assert_allclose(several, np.mean(singly, axis=0), rtol=1e-5)
    np.testing.assert_allclose(several, estimate(None)[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(score, score_fn(x, t), rtol=1e-6)


def solve_even(sde, score_fn, x, v, **options):
    """`even_grid_log_likelihood` as one program."""
    return jit(lambda x, v: even_grid_log_likelihood(sde, score_fn, x, v, **options))(x, v)


@pytest.mark.parametrize("data_std", [0.25, 0.8])
@every_sde
def test_even_grid_of_a_gaussian(name, data_std):
    sde, x = SDES[name], data(5)
    v = probe(jax.random.key(0), (5, 3), "rademacher")
    options = {"steps": 192, "data_std": data_std}
    logp, z, nfe, error = solve_even(sde, gaussian_score(sde), jnp.asarray(x, jnp.float32), v, **options)
    z_truth, truth = flow_truth(name, x)
    np.testing.assert_allclose(logp, truth, atol=3e-4)
    np.testing.assert_allclose(z, z_truth, rtol=2e-4, atol=2e-4 * z_truth.std())
    assert np.all(nfe == 203) and nfe.shape == (5,)
    assert np.all(error < 3e-4)  # nothing is rough here


@every_sde
def test_even_grid_converges_to_the_truth(name):
    with jax.enable_x64(True):
        sde, x = SDES[name], data(2)
        z_truth, truth = flow_truth(name, x)
        errors = []
        for steps in (500, 1000, 2000):
            logp, z, _, _ = solve_even(sde, gaussian_score(sde), jnp.asarray(x), None, steps=steps)
            errors.append(np.abs(logp - truth).max())
        assert errors[2] < 1e-6
        np.testing.assert_allclose(z, z_truth, rtol=1e-6)
        np.testing.assert_allclose(np.log2(errors[:-1]) - np.log2(errors[1:]), 3, atol=0.3)  # third order


@every_sde
def test_even_grid_has_nothing_to_do_for_data_of_its_own_deviation(name):
    """The score of N(0, S^2 I): w and the log density stand still, so the fewest steps cross the whole range."""
    sde, x, std = SDES[name], jnp.asarray(data(4), jnp.float32), 0.6

    def score_fn(x, t):
        return -x / (jnp.square(sde.alpha(t) * std) + jnp.square(sde.sigma(t)))[:, None]

    logp, _, _, _ = solve_even(sde, score_fn, x, None, data_std=std, steps=4)
    prior_std = prior_std_of(name)
    (alpha0, sigma0), (alpha1, sigma1) = alpha_and_sigma(name, EPS), alpha_and_sigma(name, 1.0)
    ratio = np.hypot(alpha1 * std, sigma1) / np.hypot(alpha0 * std, sigma0)
    truth = normal_logp(np.asarray(x, np.float64) * ratio, 0, np.full(3, prior_std)) + 3 * np.log(ratio)
    np.testing.assert_allclose(logp, truth, atol=1e-4)


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_even_grid_is_the_same_ode(name):
    """A score that is no gradient field, with true probes, one and several, and the trace."""
    with jax.enable_x64(True):
        sde, x = SDES[name], jnp.asarray(data(3))
        v = jax.random.normal(jax.random.key(2), (2, 3, 3), jnp.float64)

        def score_fn(x, t):  # damped, for a diffusion that is large at T
            return 0.1 * curved_score(x, t) / jnp.square(sde.sigma(t) + 0.3)[:, None]

        for probes in (None, v[0], v):
            expected, latent, _ = solve(sde, score_fn, x, probes, rtol=1e-9, atol=1e-9, max_steps=100_000)
            logp, z, _, _ = solve_even(sde, score_fn, x, probes, steps=2000)
            np.testing.assert_allclose(logp, expected, atol=1e-5)
            np.testing.assert_allclose(z, latent, rtol=1e-5, atol=1e-5)


def test_even_grid_and_its_estimate_for_a_rough_score():
    """The Gaussian's score times 1 + 0.2 sin(20 log-SNR + phase), against RK45 with about as many evaluations."""
    with jax.enable_x64(True):
        sde, x = SDES["vp"], jnp.asarray(data(8))
        phase = jnp.linspace(0, 6, 8)

        def score_fn(x, t):
            return gaussian_score(sde)(x, t) * (1 + 0.2 * jnp.sin(20 * sde.log_snr(t) + phase))[:, None]

        truth, _, _ = solve(sde, score_fn, x, None, rtol=1e-9, atol=1e-9, max_steps=100_000)
        logp, _, nfe, estimate = solve_even(sde, score_fn, x, None, steps=192, data_std=0.8)
        adaptive, _, nfe_adaptive = solve(sde, score_fn, x, None, rtol=1e-3, atol=1e-3)
        error, error_adaptive = (np.mean(np.abs(value - truth)) for value in (logp, adaptive))
        # 0.96 and 5.4; a change of x by 1e-6 makes that 0.98 and 4.4 to 6.1
        assert nfe_adaptive.mean() > 0.9 * nfe.mean()
        assert 2 * error < error_adaptive
        assert error / 5 < np.mean(estimate) < 5 * error


def test_even_grid_of_a_score_that_is_not_finite():
    logp, z, _, error = solve_even(
        SDES["vp"], lambda x, t: jnp.where(t[:, None] > 0.5, jnp.nan, -x), jnp.ones((2, 3)), None, steps=8
    )
    assert np.isnan(logp).all() and np.isnan(z).all() and np.isnan(error).all()
