# SPDX-License-Identifier: Apache-2.0
"""The baselines of bits/dim against entropies that are known."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy.stats import entropy

import datasets
from evaluators.baselines import baselines, histogram_bits, lossless_bits


def images_of(probabilities, count, shape=(4, 4, 1), seed=0):
    """Levels drawn from `probabilities`, independent in every pixel."""
    rng = np.random.default_rng(seed)
    return rng.choice(len(probabilities), (count, *shape), p=probabilities).astype(np.uint8)


def test_a_histogram_reaches_the_entropy_of_independent_pixels():
    p = np.array([0.5, 0.25, 0.125, 0.0625, 0.0625])
    train, test = images_of(p, 20_000), images_of(p, 20_000, seed=1)
    assert histogram_bits(train, test, 5) == pytest.approx(entropy(p, base=2), abs=0.01)


def test_a_histogram_is_smoothed_by_a_half():
    """Two training images of one pixel, 0 and 1, of 3 levels: shares 1.5 / 3.5, 1.5 / 3.5 and 0.5 / 3.5."""
    train, test = (np.array(levels, np.uint8).reshape(-1, 1, 1, 1) for levels in ([0, 1], [0, 2]))
    expected = -np.mean(np.log2([1.5 / 3.5, 0.5 / 3.5]))
    assert histogram_bits(train, test, 3) == pytest.approx(expected)


def test_pixels_have_histograms_of_their_own():
    train = np.tile(np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1), (5000, 1, 1, 1))
    assert histogram_bits(train, train[:10], 16) == pytest.approx(-np.log2(5000.5 / 5008), abs=1e-9)


@pytest.mark.parametrize("channels", [1, 3])
def test_files_hold_the_images_and_nothing_compresses_noise(channels):
    images = images_of(np.full(256, 1 / 256), 700, (8, 8, channels))
    for file_format, width, options in (("PNG", 10**6, {}), ("WEBP", 800, {"lossless": True})):
        bits = lossless_bits(images, file_format, width, **options)
        assert 8 <= bits < 8.3 if channels == 3 else 7.9 < bits < 8.6
    buffer = io.BytesIO()
    strip = np.concatenate(list(images), axis=1)
    Image.fromarray(strip.squeeze()).save(buffer, "PNG")
    assert lossless_bits(images, "PNG", 10**6) == 8 * len(buffer.getvalue()) / images.size


def test_baselines_are_of_the_images_that_are_asked_for():
    p = np.full(17, 1 / 17)
    dataset = datasets.Dataset("x", (4, 4, 1), True, images_of(p, 300), images_of(p, 60, seed=1), levels=17)
    found = baselines(dataset, "test", 20)
    assert found["uniform"] == pytest.approx(np.log2(17)) and set(found) == {"uniform", "histogram", "png", "webp"}
    assert found["histogram"] == histogram_bits(dataset.train, dataset.test[:20], 17)
    assert all(value >= np.log2(17) - 0.05 for value in found.values())
