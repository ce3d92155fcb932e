# SPDX-License-Identifier: Apache-2.0
"""The density of the reverse SDE against closed forms, an independent simulation, and its order of convergence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy import trapezoid

import diagnostics
import sde_lib
from evaluators.density import reverse_sde_log_density

EPS = 1e-5
MIXTURE = np.array([0.3, 0.3, 0.4]), np.array([[-0.3], [-0.9], [0.6]]), np.array([[0.002], [0.002], [0.02]])
SDES = {"ve": sde_lib.VESDE(sigma_min=0.01, sigma_max=50.0), "vp": sde_lib.VPSDE(), "subvp": sde_lib.subVPSDE()}


def alpha_and_sigma(sde, t):
    t = jnp.asarray(t)
    return float(sde.alpha(t)), float(sde.sigma(t))


def gaussian_logp(x, variance):
    return -0.5 * (x**2 / variance + np.log(2 * np.pi * variance))


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_exact_score_gives_the_data(sde):
    """KL(data at eps || model); what is left is the prior's distance from the marginal at T, and the grid's error."""
    weights, means, variances = MIXTURE
    score = jax.jit(diagnostics.gaussian_mixture_score(sde, *MIXTURE))
    x = np.linspace(-2, 2, 2001)
    alpha, sigma = alpha_and_sigma(sde, EPS)
    parts = [
        np.log(w) + gaussian_logp(x - alpha * m, alpha**2 * v + sigma**2)
        for w, m, v in zip(weights, means[:, 0], variances[:, 0], strict=True)
    ]
    truth = np.logaddexp.reduce(parts)
    logp = reverse_sde_log_density(sde, score, x, eps=EPS, data_std=0.7, cells=2000, steps=1000)
    kl = trapezoid(np.exp(truth) * (truth - logp), x)
    assert abs(kl) < 2e-4
    assert trapezoid(np.exp(logp), x) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("factor", [0.8, 1.5])
def test_wrong_score_of_a_gaussian_in_closed_form(factor):
    """The score `factor` times that of N(0, S^2) data keeps w Gaussian, of variance v with dv/dr = 2 tanh (1 - b v)."""
    sde, std = SDES["vp"], 0.7

    def score(x, t):
        alpha, sigma = alpha_and_sigma(sde, t[0])
        return -factor * x / (alpha**2 * std**2 + sigma**2)

    x = np.linspace(-2, 2, 801)
    b = 2 * factor - 1
    (first_scale, start), (last_scale, end) = (
        (np.hypot(alpha * std, sigma), np.arcsinh(sigma / (alpha * std)))
        for alpha, sigma in (alpha_and_sigma(sde, t) for t in (1.0, EPS))
    )
    decay = (np.cosh(end) / np.cosh(start)) ** (2 * b)
    variance = (1 / b + (1 / first_scale**2 - 1 / b) * decay) * last_scale**2
    logp = reverse_sde_log_density(sde, score, x, eps=EPS, data_std=std)
    np.testing.assert_allclose(logp, gaussian_logp(x, variance), atol=2e-3)


def test_second_order_in_cells_and_steps():
    sde = SDES["ve"]
    smooth = MIXTURE[0], MIXTURE[1], np.full((3, 1), 0.05)
    score = jax.jit(diagnostics.gaussian_mixture_score(sde, *smooth))
    x = np.linspace(-1.2, 1.2, 400)

    def density(n):
        return np.exp(reverse_sde_log_density(sde, score, x, eps=EPS, data_std=0.7, cells=4 * n, steps=n))

    coarse, middle, fine = density(100), density(200), density(400)
    ratio = np.linalg.norm(coarse - middle) / np.linalg.norm(middle - fine)
    assert 3.3 < ratio < 4.7
