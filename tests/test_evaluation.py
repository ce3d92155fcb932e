# SPDX-License-Identifier: Apache-2.0
"""The metrics against numpy, scipy and closed forms."""

import functools
import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats

import datasets
import evaluation
from configs.default_configs import get_default_configs
from evaluators import density


def test_mean_and_stderr_over_examples_averaged_over_repeats():
    values = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    result = evaluation.mean_and_stderr(values)
    per_example = values.mean(axis=0)
    np.testing.assert_allclose(result["mean"], values.mean(), rtol=1e-5)
    np.testing.assert_allclose(result["stderr"], stats.sem(per_example), rtol=1e-5)
    assert (result["num_examples"], result["num_repeats"]) == (50, 3)


def test_gaussian_bits_per_dim_equals_scipy():
    config = get_default_configs().data
    rng = np.random.default_rng(1)
    images = np.clip(rng.normal(120, 40, size=(400, 2, 2, 1)) + rng.normal(0, 20, size=(400, 1, 1, 1)), 0, 255)
    images = images.astype(np.uint8)
    data = datasets.Dataset("made", (2, 2, 1), True, train=images[:300], test=images[300:])
    for centered in (False, True):  # the range that the network sees changes nothing
        config.update(image_size=2, num_channels=1, centered=centered)
        unit = {}
        for split in ("train", "test"):
            x = np.concatenate([b["x"] for b in datasets.eval_batches(data, config, split, 64, seed=7)])
            unit[split] = ((x + 1) / 2 if centered else x).reshape(-1, 4).astype(np.float64)
        gaussian = stats.multivariate_normal(unit["train"].mean(axis=0), np.cov(unit["train"], rowvar=False))
        for split, limit in (("test", 0), ("test", 30), ("train", 0), ("train", 70), ("test", 10_000)):
            bpd = evaluation.gaussian_bits_per_dim(data, config, 7, split, limit)
            of = unit[split][:limit] if limit else unit[split]
            truth = -gaussian.logpdf(of).mean() / (4 * math.log(2)) + 8
            np.testing.assert_allclose(bpd, truth, rtol=1e-6)
            assert 6 < bpd < 8


def test_gaussian_bits_per_dim_holds_a_batch_at_a_time():
    config = get_default_configs().data
    config.update(image_size=4, num_channels=1)
    images = np.random.default_rng(1).integers(0, 256, (50_000, 4, 4, 1), np.uint8)
    data = datasets.Dataset("made", (4, 4, 1), True, train=images, test=images[:10])
    tracemalloc.start()
    bpd = evaluation.gaussian_bits_per_dim(data, config, seed=7)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6  # 50,000 of them in float64 are 6.4 MB
    x = np.concatenate([b["x"] for b in datasets.eval_batches(data, config, "train", 5000, seed=7)])
    x = x.reshape(-1, 16).astype(np.float64)
    test = np.concatenate([b["x"] for b in datasets.eval_batches(data, config, "test", 10, seed=7)]).reshape(-1, 16)
    gaussian = stats.multivariate_normal(x.mean(axis=0), np.cov(x, rowvar=False))
    assert bpd == pytest.approx(-gaussian.logpdf(test).mean() / (16 * math.log(2)) + 8, rel=1e-9)


def test_quadrature_nll_of_two_gaussians():
    x = np.linspace(-12, 12, 4001)
    p, q = stats.norm(0, 1), stats.norm(0.3, 1.2)
    result = density.quadrature_nll(q.logpdf(x), p.logpdf(x), x[1] - x[0])
    kl = math.log(1.2) + (1 + 0.3**2) / (2 * 1.2**2) - 0.5
    np.testing.assert_allclose(result["kl"], kl, rtol=1e-6)
    np.testing.assert_allclose(result["true_entropy"], 0.5 * math.log(2 * math.pi * math.e), rtol=1e-6)
    np.testing.assert_allclose(result["exact_nll"], result["true_entropy"] + kl, rtol=1e-6)
    np.testing.assert_allclose(result["model_mass"], 1, rtol=1e-6)


def test_density_grid_covers_the_data():
    config = get_default_configs().data
    for name, dim in (("mog", 1), ("checkerboard", 2)):
        config.update(dataset=name, dim=1)
        data = datasets.load(config)
        (points, weights, _), sample = density.density_grid(data)
        assert points.shape[1] == dim and np.all(points.min(axis=0) < sample.min(axis=0))
        assert np.all(points.max(axis=0) > sample.max(axis=0))
        # of the exact density nothing is lost
        np.testing.assert_allclose(np.sum(np.exp(data.log_prob(points)) * weights), 1, atol=1e-4)


def blurred_checkerboard(x, s):
    """log of the checkerboard's density after N(0, s^2 I) is added: each square is a product of two intervals."""
    edges = np.arange(-4, 5, 2)
    columns, rows = (np.diff(stats.norm.cdf((edges - v[:, None]) / s), axis=1) for v in np.asarray(x, np.float64).T)
    even = np.add.outer(np.arange(4), np.arange(4)) % 2 == 0
    return np.log(np.maximum(np.einsum("ni,nj,ij->n", columns, rows, even), 1e-300) / 32)


@pytest.mark.parametrize(
    ("s", "kl", "tolerance"),
    [(0.01, 0.00953, 2e-4), (0.02, 0.01903, 2e-5), (0.05, 0.04732, 2e-5), (0.1, 0.09378, 2e-5)],
)
def test_grid_of_the_checkerboard_against_gauss_and_legendre(s, kl, tolerance):
    """Its blur by 0.01 is the floor of an exact score under VE."""
    config = get_default_configs().data
    config.dataset = "checkerboard"
    data = datasets.load(config)
    grid, _ = density.density_grid(data)
    result = density.quadrature_nll(
        blurred_checkerboard(grid.points, s), data.log_prob(grid.points), grid.weights, grid.thirds
    )
    # KL is the mean of -log q less log 32 over a square at the edge, one in the middle and those between, 2, 2 and 4
    nodes, weights = np.polynomial.legendre.leggauss(150)
    weights = np.outer(weights, weights).reshape(-1) / 4
    truth = -math.log(32)
    for corner, count in (((-4, -4), 2), ((-2, -2), 2), ((-4, 0), 4)):
        square = [nodes + 1 + low for low in corner]
        x = np.stack(np.meshgrid(*square, indexing="ij"), axis=-1).reshape(-1, 2)
        truth -= count / 8 * np.sum(weights * blurred_checkerboard(x, s))
    assert truth == pytest.approx(kl, abs=1e-5)  # Monte Carlo gave 0.0190, 0.0474 and 0.0940
    assert abs(result["kl"] - truth) < tolerance
    assert abs(result["kl"] - truth) < result["kl_grid_error"] < 3e-3
    assert result["true_entropy"] == pytest.approx(math.log(32), rel=1e-12)
    assert result["model_mass"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("dim", "kl", "error"), [(1, 3.4e-4, 1e-7), (2, 6.8e-4, 1e-4)])
def test_grid_of_the_mixture_is_exact_to_rounding(dim, kl, error):
    """KL from its blur by 0.01, which is the floor of an exact score under VE, by Gauss and Hermite's rule."""
    config = get_default_configs().data
    config.update(dataset="mog", dim=dim)
    data = datasets.load(config)
    weights, means, variances = (a.reshape(-1) for a in data.mixture)

    def blurred(x):
        densities = stats.norm.pdf(np.asarray(x, np.float64)[..., None], means, np.sqrt(variances + 0.01**2))
        return np.log(np.maximum(np.prod(densities, axis=1) @ weights, 1e-300))

    grid, _ = density.density_grid(data)
    result = density.quadrature_nll(blurred(grid.points), data.log_prob(grid.points), grid.weights, grid.thirds)
    nodes, of_nodes = np.polynomial.hermite_e.hermegauss(200)
    z = np.stack(np.meshgrid(*[nodes] * dim, indexing="ij"), axis=-1).reshape(-1, dim)
    of_z = functools.reduce(np.multiply.outer, [of_nodes / of_nodes.sum()] * dim).reshape(-1)
    truth = 0.0
    for weight, mean, variance in zip(weights, means, variances, strict=True):
        x = mean + np.sqrt(variance) * z
        truth += weight * np.sum(of_z * (data.log_prob(x) - blurred(x)))
    assert truth == pytest.approx(kl, rel=5e-3)
    assert abs(result["kl"] - truth) < 1e-7 and result["kl_grid_error"] < error
