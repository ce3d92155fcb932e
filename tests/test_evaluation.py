# SPDX-License-Identifier: Apache-2.0
"""The metrics against numpy, scipy and closed forms."""

import math

import numpy as np
from scipy import stats

import datasets
import evaluation
from configs.default_configs import get_default_configs


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
        bpd = evaluation.gaussian_bits_per_dim(data, config, seed=7)
        unit = []
        for split in ("train", "test"):
            x = np.concatenate([b["x"] for b in datasets.eval_batches(data, config, split, 64, seed=7)])
            unit.append(((x + 1) / 2 if centered else x).reshape(-1, 4).astype(np.float64))
        gaussian = stats.multivariate_normal(unit[0].mean(axis=0), np.cov(unit[0], rowvar=False))
        truth = -gaussian.logpdf(unit[1]).mean() / (4 * math.log(2)) + 8
        np.testing.assert_allclose(bpd, truth, rtol=1e-6)
        assert 6 < bpd < 8


def test_quadrature_nll_of_two_gaussians():
    x = np.linspace(-12, 12, 4001)
    p, q = stats.norm(0, 1), stats.norm(0.3, 1.2)
    result = evaluation.quadrature_nll(q.logpdf(x), p.logpdf(x), x[1] - x[0])
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
        points, cell, sample = evaluation.density_grid(data)
        assert points.shape[1] == dim and np.all(points.min(axis=0) < sample.min(axis=0))
        assert np.all(points.max(axis=0) > sample.max(axis=0))
        # of the exact density, cell by cell, nothing is lost
        np.testing.assert_allclose(np.exp(data.log_prob(points)).sum() * cell, 1, atol=1e-3 if dim == 1 else 0.03)
