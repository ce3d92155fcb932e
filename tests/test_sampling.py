# SPDX-License-Identifier: Apache-2.0
"""The samplers on Gaussian data, whose exact score is known and whose flow map is affine, and the factory."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import busy_jit, jit
from scipy.special import ndtr, ndtri
from scipy.stats import kstest

from configs.default_configs import get_default_configs
from diagnostics import gaussian_mixture_score
from errors import UserError
from likelihood import ode_log_likelihood
from sampling import ancestral_sampling, get_sampling_fn, ode_sampler
from sde_lib import VESDE, VPSDE, StraightPath, VPLogSNR, subVPSDE

EPS = 1e-5
SDES = {
    "vp": VPSDE(beta_min=0.1, beta_max=20.0),
    "subvp": subVPSDE(beta_min=0.1, beta_max=20.0),
    "ve": VESDE(sigma_min=0.01, sigma_max=50.0),
    "linearve": VESDE(sigma_min=0.01, sigma_max=50.0, linear=True),
    "log_snr": VPLogSNR(log_snr_min=-10.0),
    "straight": StraightPath(log_snr_min=-10.0),
}
slow_if_new = [pytest.param(name, marks=pytest.mark.slow if name in ("log_snr", "straight") else ()) for name in SDES]
MU = np.linspace(-0.5, 0.5, 12).reshape(2, 2, 3)
STD = np.linspace(0.2, 1.5, 12).reshape(2, 2, 3)


def gaussian_score(sde):
    """The score of N(MU, diag STD^2) diffused to t."""

    def score_fn(x, t):
        alpha, sigma = (value[:, None, None, None] for value in (sde.alpha(t), sde.sigma(t)))
        return -(x - alpha * MU) / (jnp.square(alpha * STD) + jnp.square(sigma))

    return score_fn


def marginal(sde, t):
    with jax.enable_x64(True):
        alpha, sigma = float(sde.alpha(jnp.asarray(t))), float(sde.sigma(jnp.asarray(t)))
    return alpha * MU, np.sqrt((alpha * STD) ** 2 + sigma**2)


@pytest.mark.parametrize("name", slow_if_new)
def test_flow_from_a_latent(name):
    sde = SDES[name]
    z = sde.prior_sampling(jax.random.key(0), (6, 2, 2, 3))
    x, nfe = jit(lambda z: ode_sampler(sde, gaussian_score(sde), z, eps=EPS, denoise=False))(z)
    (mean_eps, std_eps), (mean_1, std_1) = marginal(sde, EPS), marginal(sde, 1.0)
    np.testing.assert_allclose(x, mean_eps + std_eps * (z - mean_1) / std_1, atol=5e-4)
    assert nfe.shape == (6,) and np.all(nfe % 6 == 2)


def test_moments_of_the_samples():
    sde = SDES["vp"]
    z = sde.prior_sampling(jax.random.key(0), (4000, 2, 2, 3))
    x, _ = jit(lambda z: ode_sampler(sde, gaussian_score(sde), z, eps=1e-3, denoise=False))(z)
    np.testing.assert_allclose(x.mean(0), MU, atol=4 * STD.max() / np.sqrt(4000) + 0.01)
    np.testing.assert_allclose(x.std(0) / STD, 1, atol=4 / np.sqrt(8000) + 0.01)


@pytest.mark.parametrize("name", slow_if_new)
def test_sampler_undoes_the_likelihood(name):
    sde = SDES[name]
    x = jnp.asarray(MU + STD * np.random.default_rng(0).normal(size=(3, 2, 2, 3)), jnp.float32)

    def score_fn(x, t):
        return (
            gaussian_score(sde)(x, t)
            + 0.1 * jnp.sin(3 * jnp.roll(x, 1, axis=-1)) / (1 + sde.sigma(t))[:, None, None, None]
        )

    options = dict(eps=EPS, rtol=1e-6, atol=1e-6)
    _, z, _ = jit(lambda x, v: ode_log_likelihood(sde, score_fn, x, v, **options))(x, jnp.ones_like(x))
    back, _ = jit(lambda z: ode_sampler(sde, score_fn, z, denoise=False, **options))(z)
    assert float(jnp.abs(z - x).max()) > 0.1
    np.testing.assert_allclose(back, x, atol=1e-3)


@jax.enable_x64(True)
def test_denoising_is_the_mean_of_one_reverse_step():
    """In float64, where no rounding gives the two programs other steps: a change of z by 1e-6 leaves NFE as it is."""
    sde, eps = SDES["vp"], 0.01
    score_fn, z = gaussian_score(sde), jax.random.normal(jax.random.key(0), (2, 2, 2, 3))
    x, nfe = jit(lambda z: ode_sampler(sde, score_fn, z, eps=eps, denoise=False))(z)
    denoised, denoised_nfe = jit(lambda z: ode_sampler(sde, score_fn, z, eps=eps, denoise=True))(z)
    beta = (0.1 + 19.9 * int(eps * 999) / 999) / 1000  # DDPM's at that step
    expected = x + (1 - np.sqrt(1 - beta)) * x + beta * score_fn(x, jnp.full(2, eps))
    np.testing.assert_allclose(denoised, expected, atol=1e-9)
    assert np.all(denoised_nfe == nfe + 1)


@jax.enable_x64(True)
def test_factory_samples_images_as_the_config_says():
    """In float64, as the test above."""
    config, sde = get_default_configs().sampling, SDES["vp"]
    config.noise_removal, config.rtol, config.smallest_time = False, 1e-3, 1e-3
    sample = get_sampling_fn(config, sde, (2, 2, 3), lambda x: (x + 1) / 2)
    keys = jax.random.split(jax.random.key(5), 4)
    images, nfe = jit(lambda keys: sample(gaussian_score(sde), keys))(keys)
    z = jnp.stack([sde.prior_sampling(key, (2, 2, 3)) for key in keys])
    options = dict(eps=1e-3, rtol=1e-3, atol=1e-5)
    x, expected_nfe = jit(lambda z: ode_sampler(sde, gaussian_score(sde), z, denoise=False, **options))(z)
    np.testing.assert_allclose(images, (x + 1) / 2, rtol=1e-9)
    assert images.shape == (4, 2, 2, 3) and np.all(nfe == expected_nfe)


def test_ancestral_sampling_refuses_the_probability_flow():
    x = jnp.zeros((2, 2, 2, 3))
    with pytest.raises(ValueError, match="no probability flow"):
        ancestral_sampling(SDES["vp"], gaussian_score(SDES["vp"]), x, jnp.full(2, 0.5), x, True)


@pytest.mark.parametrize("name", ["vp", "subvp", "ve"])
@pytest.mark.parametrize(
    ("predictor", "corrector", "flow"),
    [
        ("reverse_diffusion", "langevin", False),
        ("reverse_diffusion", "none", True),
        ("euler_maruyama", "ald", False),
        ("ancestral_sampling", "none", False),
    ],
)
def test_predictor_corrector_moments(name, predictor, corrector, flow):
    """1000 steps under the exact score give the data's means and standard deviations.

    Within four sampling errors and 5 % for the discretisation: a Langevin step at snr 0.16 alone biases by 2 %.
    """
    config, sde, batch = get_default_configs().sampling, SDES[name], 1000
    config.update(method="pc", predictor=predictor, corrector=corrector, probability_flow=flow)
    config.smallest_time = 1e-2 if name == "subvp" else 1e-3
    sample = get_sampling_fn(config, sde, (2, 2, 3), lambda x: x)
    draw = busy_jit(lambda key: sample(gaussian_score(sde), jax.random.split(key, batch)))
    if (name, predictor) == ("subvp", "ancestral_sampling"):
        with pytest.raises(UserError, match="defined for vpsde and vesde"):
            draw(jax.random.key(0))
        return
    x, nfe = draw(jax.random.key(0))
    error = 4 / np.sqrt(batch)
    np.testing.assert_allclose((x.mean(axis=0) - MU) / STD, 0, atol=error + 0.05)
    np.testing.assert_allclose(x.std(axis=0) / STD, 1, atol=error / np.sqrt(2) + 0.05)
    assert nfe[0] == 1000 * ((predictor != "none") + (corrector != "none"))


DATA_MEAN, DATA_STD, SNR = 0.4, 0.5, 0.16
PREDICTORS = [  # name, probability flow
    ("euler_maruyama", False),
    ("reverse_diffusion", False),
    ("ancestral_sampling", False),
    ("euler_maruyama", True),
    ("reverse_diffusion", True),
    ("none", False),
]
COMBINATIONS = [
    (name, predictor, corrector, flow)
    for name in SDES
    for predictor, flow in PREDICTORS
    for corrector in ("none", "langevin", "ald")
    if (predictor, corrector) != ("none", "none")
    and (name in ("vp", "ve", "linearve") or predictor != "ancestral_sampling")
]


def process(name, t):
    """alpha, sigma, f and g^2 at t of each process, as its paper writes them."""
    beta, integral = 0.1 + 19.9 * t, 0.1 * t + 9.95 * t**2
    if name == "vp":
        return math.exp(-integral / 2), math.sqrt(-math.expm1(-integral)), -beta / 2, beta
    if name == "subvp":
        return math.exp(-integral / 2), -math.expm1(-integral), -beta / 2, -beta * math.expm1(-2 * integral)
    if name == "ve":
        sigma = 0.01 * 5000**t
        return 1.0, sigma, 0.0, 2 * sigma**2 * math.log(5000)
    if name in ("log_snr", "straight"):  # lambda' = -23.3
        power = 0.5 if name == "log_snr" else 1.0  # of the logistic function of lambda, or of lambda / 2
        ratio = math.exp((13.3 - 23.3 * t) * (1.0 if name == "log_snr" else 0.5))
        alpha, sigma = (1 + 1 / ratio) ** -power, (1 + ratio) ** -power
        return alpha, sigma, -23.3 / 2 * sigma ** (1 / power), 23.3 * sigma**2
    return 1.0, 50 * t, 0.0, 5000 * t


def prior_std_of(name):
    if name in ("log_snr", "straight"):
        return process(name, 1.0)[1]
    return 50.0 if name.endswith("ve") else 1.0


def predictor_step(name, predictor, flow, t, N):
    """A, B, C^2 of the step x -> A x + B score + C z (Song et al. 2021, appendices D, E and F)."""
    _, _, f, g_sq = process(name, t)
    i = int(t * (N - 1) + 1e-9)
    beta = (0.1 + 19.9 * i / (N - 1)) / N
    levels = np.linspace(0.01, 50, N) if name == "linearve" else np.geomspace(0.01, 50, N)
    sigma_sq, previous_sq = levels[i] ** 2, levels[i - 1] ** 2 if i else 0.0
    if predictor == "ancestral_sampling" and name == "vp":
        return (1 - beta) ** -0.5, beta * (1 - beta) ** -0.5, beta
    if predictor == "ancestral_sampling":
        return 1.0, sigma_sq - previous_sq, previous_sq * (1 - previous_sq / sigma_sq)
    A, B = 1 - f / N, g_sq / N
    if predictor == "reverse_diffusion" and name == "vp":
        A, B = 2 - math.sqrt(1 - beta), beta
    if predictor == "reverse_diffusion" and name == "ve":
        A, B = 1.0, sigma_sq - previous_sq
    return (A, B / 2, 0.0) if flow else (A, B, B)


def gaussian_chain(name, predictor, corrector, flow, N, n_steps=1):
    """The sampler's chain on N(DATA_MEAN, DATA_STD^2): x stays Gaussian, with moments that follow a recursion.

    The norms that set Langevin's step stand at their expectations, which the means over a large batch are close to.

    Returns:
        Mean of x, its standard deviation, and the standard deviation without the noise of the last update.
    """
    mean, var, var_denoised = 0.0, prior_std_of(name) ** 2, None
    for t in np.linspace(1, EPS, N):
        alpha, sigma, _, _ = process(name, t)
        mean_t, var_t = alpha * DATA_MEAN, (alpha * DATA_STD) ** 2 + sigma**2
        correctors = n_steps * (corrector != "none")
        for step in ["corrector"] * correctors + ["predictor"] * (predictor != "none"):
            if step == "predictor":
                A, B, C_sq = predictor_step(name, predictor, flow, t, N)
            else:
                scale = 2 * SNR**2 * (1 - (0.1 + 19.9 * int(t * (N - 1) + 1e-9) / (N - 1)) / N if "vp" in name else 1)
                if corrector == "ald":
                    B = scale * sigma**2
                else:
                    score_norm = foldnorm_mean((mean - mean_t) / var_t, math.sqrt(var) / var_t)
                    B = scale * (math.sqrt(2 / math.pi) / score_norm) ** 2
                A, C_sq = 1.0, 2 * B
            mean, var_denoised = (A - B / var_t) * mean + B * mean_t / var_t, (A - B / var_t) ** 2 * var
            var = var_denoised + C_sq
    return mean, math.sqrt(var), math.sqrt(var_denoised)


def foldnorm_mean(mean, std):
    """E|x| of x ~ N(mean, std^2)."""
    return std * math.sqrt(2 / math.pi) * math.exp(-0.5 * (mean / std) ** 2) + mean * math.erf(mean / std / 2**0.5)


def draw(name, predictor, corrector, flow, score_fn_of, *, N, n, denoise, n_steps=1):
    """n samples [n] of one number, through the factory."""
    config, sde = get_default_configs().sampling, dataclasses.replace(SDES[name], N=N)
    config.update(method="pc", predictor=predictor, corrector=corrector, probability_flow=flow, snr=SNR)
    config.update(noise_removal=denoise, n_steps_each=n_steps, smallest_time=EPS)
    sample = get_sampling_fn(config, sde, (1,), lambda x: x)
    keys = jax.random.split(jax.random.key(0), n)
    x, nfe = (jit if N <= 100 else busy_jit)(lambda keys: sample(score_fn_of(sde), keys))(keys)
    assert np.all(nfe == N * ((predictor != "none") + n_steps * (corrector != "none")))
    return np.asarray(x, np.float64)[:, 0]


def one_gaussian(sde):
    return gaussian_mixture_score(sde, np.ones(1), np.full((1, 1), DATA_MEAN), np.full((1, 1), DATA_STD**2))


FAST = [  # each predictor and each corrector, each process
    ("vp", "ancestral_sampling", "none", False),
    ("vp", "reverse_diffusion", "none", True),
    ("subvp", "reverse_diffusion", "langevin", False),
    ("ve", "ancestral_sampling", "ald", False),
    ("linearve", "euler_maruyama", "none", False),
    ("ve", "none", "langevin", False),
]


def slow_unless_in(fast):
    return [pytest.param(*c, marks=() if c in fast else pytest.mark.slow) for c in COMBINATIONS]


@pytest.mark.parametrize("denoise", [False, True])
@pytest.mark.parametrize(("name", "predictor", "corrector", "flow"), slow_unless_in(FAST))
def test_gaussian_samples_have_the_moments_of_the_chain(name, predictor, corrector, flow, denoise):
    """Within 4.5 sampling errors and no bias: the few steps' discretisation error is in the expected moments."""
    n, N = 4000, 100
    x = draw(name, predictor, corrector, flow, one_gaussian, N=N, n=n, denoise=denoise)
    mean, std, std_denoised = gaussian_chain(name, predictor, corrector, flow, N)
    expected = std_denoised if denoise else std
    np.testing.assert_allclose(x.mean(), mean, atol=4.5 * expected / np.sqrt(n))
    np.testing.assert_allclose(x.std() / expected, 1, atol=4.5 / np.sqrt(2 * n))


@pytest.mark.parametrize(("name", "predictor", "corrector", "flow"), [c for c in COMBINATIONS if c[2] == "none"])
def test_bias_of_a_predictor_falls_with_the_step(name, predictor, corrector, flow):
    """Halving the step at least halves the bias of the Gaussian's moments, to first order.

    Against the exact reverse process from the prior N(0, prior_std^2), which is not the marginal at T. EM of a VE
    process happens to be of second order in the variance. NCSN's levels never reach below sigma_min, nor linear VE's
    uniform ones (0.05 apart at N = 1000, as wide as a narrow mode) follow sigma at small t: 1e-3 and 2e-2 are left.
    """
    alpha, sigma, _, _ = process(name, 1.0)
    var_1 = (alpha * DATA_STD) ** 2 + sigma**2
    gain = DATA_STD / math.sqrt(var_1) if flow else alpha * DATA_STD**2 / var_1  # d E[x_0] / d x_1
    noise = 0.0 if flow else DATA_STD**2 - gain**2 * var_1
    mean = DATA_MEAN - gain * alpha * DATA_MEAN
    std = math.sqrt(noise + (gain * prior_std_of(name)) ** 2)
    moments = [gaussian_chain(name, predictor, corrector, flow, N)[:2] for N in (500, 1000, 2000)]
    bias = np.abs(np.array(moments) - [mean, std]) / DATA_STD
    left = 2e-2 if name == "linearve" else 1e-3
    assert np.all(bias[1] <= 0.55 * bias[0] + left) and np.all(bias[2] <= 0.55 * bias[1] + left), bias


WEIGHTS, MEANS, STDS = np.array([0.3, 0.3, 0.4]), np.array([-1.0, 0.2, 1.0]), np.array([0.15, 0.1, 0.25])


def mixture_score(sde):
    return gaussian_mixture_score(sde, WEIGHTS, MEANS[:, None], STDS[:, None] ** 2)


def mixture_cdf(x, alpha=1.0, sigma=0.0):
    """Of the mixture diffused to (alpha, sigma)."""
    return ndtr((np.asarray(x)[..., None] - alpha * MEANS) / np.sqrt((alpha * STDS) ** 2 + sigma**2)) @ WEIGHTS


def assert_is_mixture(x, bias):
    """Kolmogorov-Smirnov at p = 1e-4, mean and standard deviation at 4.5 sampling errors, each plus a bias."""
    n, mean = len(x), WEIGHTS @ MEANS
    std = math.sqrt(WEIGHTS @ (STDS**2 + MEANS**2) - mean**2)
    assert kstest(x, mixture_cdf).statistic < math.sqrt(math.log(2e4) / 2 / n) + bias
    assert abs(x.mean() - mean) / std < 4.5 / math.sqrt(n) + 2 * bias
    assert abs(x.std() / std - 1) < 4.5 / math.sqrt(2 * n) + 2 * bias


@pytest.mark.parametrize(
    ("name", "predictor", "corrector", "flow"),
    [c for c in slow_unless_in([FAST[0], FAST[2]]) if c.values[1] != "none"],
)
def test_mixture_samples(name, predictor, corrector, flow):
    """1000 steps from the prior. The discretisation moves the cdf by 0.01 at most: its share in a Gaussian's std is
    some 4 % (the VE flows) of itself, and a cdf moves by 0.24 of that at most.
    """
    x = draw(name, predictor, corrector, flow, mixture_score, N=1000, n=4000, denoise=True)
    assert_is_mixture(x, 0.02 if name == "linearve" else 0.01)


@pytest.mark.parametrize("name", slow_if_new)
def test_ode_sampler_maps_quantiles_to_quantiles(name):
    """In one dimension the flow keeps the order, so it takes the q-quantile at T to that at eps: no sampling error."""
    sde, q = SDES[name], (np.arange(400) + 0.5) / 400
    alpha, sigma, _, _ = process(name, 1.0)
    low, high = np.full(400, -10 * sde.prior_std), np.full(400, 10 * sde.prior_std)
    for _ in range(60):
        middle = (low + high) / 2
        too_low = mixture_cdf(middle, alpha, sigma) < q
        low, high = np.where(too_low, middle, low), np.where(too_low, high, middle)
    z = jnp.asarray(middle, jnp.float32)[:, None]
    score_fn = mixture_score(sde)
    x, _ = jit(lambda z: ode_sampler(sde, score_fn, z, eps=EPS, rtol=1e-6, atol=1e-6, denoise=False))(z)
    alpha, sigma, _, _ = process(name, EPS)
    np.testing.assert_allclose(
        mixture_cdf(x[:, 0], alpha, sigma), q, atol=3e-4
    )  # 3e-3 at 1e-5, 4e-6 at 1e-7: the solver's
    prior = sde.prior_std * jnp.asarray(ndtri(q), jnp.float32)[:, None]
    x, _ = jit(lambda z: ode_sampler(sde, score_fn, z, eps=EPS, denoise=True))(prior)
    # The prior is not quite the marginal at T, by some E[x] / sigma_max, and the last step is one of N.
    assert kstest(np.asarray(x)[:, 0], mixture_cdf).statistic < 0.5 / 400 + 0.01
