# SPDX-License-Identifier: Apache-2.0
"""Data against truth: quadrature, closed forms, scikit-learn, TensorFlow's resizing, files written byte by byte."""

import dataclasses
import gzip
import itertools
import json
import math
import os
import struct
import subprocess
import sys
import time
import tracemalloc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.integrate import quad
from test_reach import silent_server

import datasets
from configs.default_configs import get_default_configs
from errors import UserError
from sources import reach, splitmix, tfds


def load(config) -> Any:
    return datasets.load(config)


def data_config(**changes) -> Any:
    config: Any = get_default_configs().data
    config.update({"random_flip": False, **changes})
    return config


def digits_config(**changes):
    return data_config(dataset="DIGITS", image_size=8, num_channels=1, **changes)


def stream(config, batch_size, batches, seed=7, **processes):
    """The first batches of the loader, joined: x [N, ...], index [N]."""
    loader = datasets.train_loader(load(config), config, batch_size=batch_size, seed=seed, **processes)
    rows = list(itertools.islice(loader, batches))
    return np.concatenate([b["x"] for b in rows]), np.concatenate([b["index"] for b in rows])


def evaluate(config, split="test", batch_size=64, seed=7, **options):
    rows = list(datasets.eval_batches(load(config), config, split, batch_size, seed=seed, **options))
    return np.concatenate([b["x"] for b in rows]), np.concatenate([b["index"] for b in rows])


# Randomness


def test_mix_is_splitmix64():
    # The first outputs of the public-domain C code of Vigna (splitmix64.c) from state 0.
    first = splitmix.mix(np.arange(1, 4, dtype=np.uint64) * splitmix.GOLDEN_GAMMA)
    assert [hex(int(z)) for z in first] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


def test_random_bits_are_unrelated_across_every_argument():
    index = np.arange(2000)
    base = splitmix.random_bits(1, 2, index, 3, 4)
    others = [
        splitmix.random_bits(2, 1, index, 3, 4),
        splitmix.random_bits(1, 3, index, 2, 4),
        splitmix.random_bits(1, 2, index, 4, 4),
        splitmix.random_bits(1, 2, index + 1, 3, 4),
        np.roll(base, 1, axis=1),
    ]
    for other in others:
        agreeing = np.unpackbits((base ^ other).view(np.uint8)).mean()
        assert abs(agreeing - 0.5) < 5 * 0.5 / math.sqrt(base.size * 64)
    assert len(np.unique(np.concatenate([base, *others[:3]]))) == 4 * base.size
    assert np.array_equal(splitmix.random_bits(1, -1, index, 0, 1), splitmix.random_bits(1, 2**64 - 1, index, 0, 1))


# Synthetic data


def test_mog_density_has_mass_one_and_its_entropy():
    dataset = load(data_config(dataset="mog"))
    assert (dataset.shape, dataset.is_image, len(dataset.test)) == ((1,), False, 10_000)
    density = lambda x: math.exp(dataset.log_prob(np.array([[x]]))[0])  # noqa: E731
    points = [-6 / 7, -2 / 7, 4 / 7]
    assert quad(density, -3, 3, points=points, limit=200)[0] == pytest.approx(1, abs=1e-8)
    entropy = quad(lambda x: -density(x) * math.log(density(x)), -3, 3, points=points, limit=200)[0]
    assert dataset.entropy == pytest.approx(entropy, abs=1e-8)
    nll = -dataset.log_prob(dataset.train[np.arange(200_000)])
    assert abs(nll.mean() - dataset.entropy) < 5 * nll.std() / math.sqrt(len(nll))


@pytest.mark.parametrize("dim", [1, 3])
def test_mog_samples_have_the_moments_of_the_mixture(dim):
    means, variances, weights = np.array([-2, -6, 4]) / 7, np.array([0.1, 0.1, 1]) / 49, np.array([0.3, 0.3, 0.4])
    dataset = load(data_config(dataset="mog", dim=dim))
    x = dataset.train[np.arange(200_000)].astype(np.float64)
    assert x.shape == (200_000, dim)
    mean = weights @ means
    between = weights @ (means - mean) ** 2  # all coordinates share the component, so it is their covariance, too
    covariance = between + weights @ variances * np.eye(dim)
    centered = x - mean
    assert np.all(np.abs(centered.mean(axis=0)) < 5 * np.sqrt(np.diag(covariance) / len(x)))
    products = centered[:, :, None] * centered[:, None, :]
    assert np.all(np.abs(products.mean(axis=0) - covariance) < 5 * products.std(axis=0) / math.sqrt(len(x)))
    cdf = lambda v: np.sum(weights * stats.norm.cdf(v[:, None], means, np.sqrt(variances)), axis=1)  # noqa: E731
    assert stats.kstest(x[:, 0], cdf).pvalue > 1e-3


def test_mog_density_in_two_dimensions_has_mass_one():
    dataset = load(data_config(dataset="mog", dim=2))
    axis = np.linspace(-2, 2, 801)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    assert np.exp(dataset.log_prob(grid)).sum() * (axis[1] - axis[0]) ** 2 == pytest.approx(1, abs=1e-9)
    assert dataset.entropy is None


def test_checkerboard_is_uniform_on_its_squares():
    dataset = load(data_config(dataset="checkerboard"))
    axis = np.arange(-4.975, 5, 0.05)  # centres of cells that no edge of a square cuts
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    assert np.exp(dataset.log_prob(grid)).sum() * 0.05**2 == pytest.approx(1, abs=1e-9)
    # float32 may round a point across an edge; that it never does is checked on all there are.
    x = np.concatenate([dataset.train[np.arange(len(dataset.train))], dataset.test[np.arange(len(dataset.test))]])
    assert np.all(dataset.log_prob(x) == -math.log(32))
    assert dataset.entropy == math.log(32)
    cells, counts = np.unique(np.floor(x / 2), axis=0, return_counts=True)
    assert len(cells) == 8 and stats.chisquare(counts).pvalue > 1e-3
    assert np.array_equal(cells.sum(axis=1) % 2, np.zeros(8))
    for coordinate in np.mod(x[:100_000], 2).T:
        assert stats.kstest(coordinate / 2, "uniform").pvalue > 1e-3


def test_swissroll_is_five_of_scikit_learns():
    from sklearn.datasets import make_swiss_roll

    rng = np.random.default_rng(0)
    roll = make_swiss_roll(20_000, noise=1.0, random_state=0)[0][:, [0, 2]] / 10
    centers = np.array([[0, 0], [-4.5, -4.5], [-4.5, 4.5], [4.5, -4.5], [4.5, 4.5]])
    reference = roll + centers[rng.integers(0, 5, len(roll))]
    x = load(data_config(dataset="swissroll")).train[np.arange(20_000)]
    for project in (lambda p: p[:, 0], lambda p: p[:, 1], lambda p: p[:, 0] + p[:, 1], lambda p: np.hypot(*p.T)):
        assert stats.ks_2samp(project(x), project(reference)).pvalue > 1e-3


def test_synthetic_splits_are_disjoint_and_served_alike():
    for name in ("mog", "checkerboard", "swissroll"):
        config = data_config(dataset=name, centered=True)  # which has no effect on synthetic data
        dataset = load(config)
        train, test = dataset.train[np.arange(len(dataset.train))], dataset.test[np.arange(len(dataset.test))]
        assert train.dtype == np.float32
        if name != "mog":  # in 1-D, float32 has too few values for so many examples to differ
            both = np.concatenate([train[:100_000], test]).view(np.uint64)
            assert len(np.unique(both)) == len(both)
        assert np.array_equal(np.stack([dataset.train[5], dataset.train[2**20 - 1]]), train[[5, -1]])
        x, index = stream(config, 512, 4)
        assert np.array_equal(x, train[index])
        assert np.array_equal(evaluate(config, batch_size=3000)[0], test)
        with pytest.raises(IndexError):
            dataset.test[10_000]


# Digits, the loader and the evaluation batches


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    dataset = load(digits_config())
    assert (dataset.shape, dataset.is_image, len(dataset.train), len(dataset.test)) == ((8, 8, 1), True, 1500, 297)
    assert (dataset.train[0].dtype, dataset.levels) == (np.uint8, 17)
    images = np.concatenate([dataset.train, dataset.test]).reshape(1797, 64)
    expected = load_digits().data.astype(np.uint8)
    assert np.array_equal(expected, load_digits().data) and np.array_equal(np.unique(images), np.arange(17))
    assert np.array_equal(np.unique(images, axis=0), np.unique(expected, axis=0))
    assert len(np.unique(images, axis=0)) == 1797
    # The split is random: a test set in the file's order would hold other writers' digits than the training set.
    assert abs(dataset.test[:].mean() / dataset.train[:].mean() - 1) < 0.05


def test_scalers():
    x = np.linspace(0, 1, 5)
    assert np.array_equal(datasets.get_data_scaler(True)(x), [-1, -0.5, 0, 0.5, 1])
    assert np.array_equal(datasets.get_data_inverse_scaler(True)(np.array([-1.0, 0, 1])), [0, 0.5, 1])
    assert datasets.get_data_scaler(False)(x) is x and datasets.get_data_inverse_scaler(False)(x) is x


def test_every_epoch_visits_every_example_once_in_another_order():
    _, index = stream(digits_config(), 100, 45)
    epochs = index.reshape(3, 1500)
    assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(1500), (3, 1)))
    for first, second in itertools.combinations([*epochs, np.arange(1500)], 2):
        assert np.mean(first == second) < 0.01
    assert not np.array_equal(index, stream(digits_config(), 100, 45, seed=8)[1])


def test_batches_longer_than_an_epoch_are_cut_from_the_same_stream():
    config = digits_config(random_flip=True, uniform_dequantization=True)
    short, long = stream(config, 500, 9), stream(config, 2250, 2)
    assert np.array_equal(short[0], long[0]) and np.array_equal(short[1], long[1])


def test_flip_and_noise_follow_the_example_not_its_place_in_the_stream():
    config = digits_config(random_flip=True, uniform_dequantization=True)
    full = load(config)
    part = dataclasses.replace(full, train=full.train[:700])  # its epoch is another permutation
    seen = []
    for dataset in (full, part):
        batch = next(datasets.train_loader(dataset, config, batch_size=len(dataset.train), seed=7))
        seen.append(batch["x"][np.argsort(batch["index"])][:700])
    assert np.array_equal(*seen)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_see_together_what_one_sees(processes):
    config = digits_config(random_flip=True, uniform_dequantization=True)
    dataset = load(config)
    options = {"batch_size": 64, "seed": 3}
    alone = datasets.train_loader(dataset, config, **options)
    together = [
        datasets.train_loader(dataset, config, **options, process_index=k, process_count=processes)
        for k in range(processes)
    ]
    for _ in range(50):  # two epochs
        batch, parts = next(alone), [next(loader) for loader in together]
        assert all(len(part["x"]) == 64 // processes for part in parts)
        for key in ("x", "index"):
            assert np.array_equal(batch[key], np.concatenate([part[key] for part in parts]))


@pytest.mark.parametrize("taken", [0, 7, 15, 40])
def test_a_resumed_loader_goes_on_exactly(taken):
    config = digits_config(random_flip=True, uniform_dequantization=True)
    dataset = load(config)
    make = lambda: datasets.train_loader(dataset, config, batch_size=100, seed=5)  # noqa: E731
    loader, resumed = make(), make()
    for _ in range(taken):
        next(loader)
    time.sleep(0.05)  # lets the prefetching threads run ahead of the state
    resumed.set_state(json.loads(json.dumps(loader.get_state())))
    for _ in range(20):
        expected, actual = next(loader), next(resumed)
        assert np.array_equal(expected["x"], actual["x"]) and np.array_equal(expected["index"], actual["index"])


def test_flips_are_fair_mirror_images_and_fresh_each_epoch():
    plain, index = stream(digits_config(), 100, 30)
    flipped, same_index = stream(digits_config(random_flip=True), 100, 30)
    assert np.array_equal(index, same_index)
    mirror = plain[:, :, ::-1]
    is_flipped = np.all(flipped == mirror, axis=(1, 2, 3))
    assert np.all(is_flipped | np.all(flipped == plain, axis=(1, 2, 3)))
    assert abs(is_flipped.mean() - 0.5) < 5 * 0.5 / math.sqrt(3000)
    first, second = (is_flipped[part][np.argsort(index[part])] for part in (slice(1500), slice(1500, 3000)))
    assert abs(np.mean(first == second) - 0.5) < 5 * 0.5 / math.sqrt(1500)


def test_training_noise_is_uniform_and_fresh_each_epoch():
    pixels = load(digits_config()).train
    x, index = stream(digits_config(uniform_dequantization=True), 100, 30)
    assert x.dtype == np.float32 and x.min() >= 0 and x.max() < 1
    assert np.array_equal(np.floor(x * 17), pixels[index])
    noise = x.astype(np.float64) * 17 - pixels[index]
    assert stats.kstest(noise.reshape(-1), "uniform").pvalue > 1e-3
    first, second = (noise[part][np.argsort(index[part])] for part in (slice(1500), slice(1500, 3000)))
    for one, other in ((first, second), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1])):
        assert abs(np.corrcoef(one.reshape(-1), other.reshape(-1))[0, 1]) < 5 / math.sqrt(one.size)
    plain, _ = stream(digits_config(), 100, 30)
    assert np.array_equal(plain, pixels[index].astype(np.float32) / np.float32(16))


def test_evaluation_gives_every_example_once_and_its_own_noise():
    config = digits_config(random_flip=True)  # which has no effect here
    dataset = load(config)
    batches = list(datasets.eval_batches(dataset, config, "test", 128, seed=7))
    assert [len(b["x"]) for b in batches] == [128, 128, 41]
    x, index = evaluate(config, batch_size=128)
    assert np.array_equal(index, np.arange(297)) and np.array_equal(np.floor(x * 17), dataset.test)
    noise = x.astype(np.float64) * 17 - dataset.test
    assert stats.kstest(noise.reshape(-1), "uniform").pvalue > 1e-3
    assert np.array_equal(x, evaluate(config, batch_size=50)[0])
    assert np.array_equal(x[:70], evaluate(config, batch_size=50, limit=70)[0])
    for other in (evaluate(config, repeat=1), evaluate(config, seed=8)):
        changed = other[0].astype(np.float64) * 17 - dataset.test
        assert abs(np.corrcoef(noise.reshape(-1), changed.reshape(-1))[0, 1]) < 5 / math.sqrt(noise.size)
    assert np.array_equal(evaluate(config, dequantize=False)[0], dataset.test[:].astype(np.float32) / np.float32(16))
    assert len(evaluate(config, split="train")[0]) == 1500


def test_evaluation_on_three_processes_covers_the_split():
    config = digits_config()
    dataset, options = load(config), {"split": "test", "batch_size": 74, "seed": 7, "process_count": 3}
    parts = [list(datasets.eval_batches(dataset, config, process_index=k, **options)) for k in range(3)]
    assert [len(part) for part in parts] == [5, 5, 5]
    assert [len(part[-1]["x"]) for part in parts] == [0, 0, 1]
    x = np.concatenate([part[i]["x"] for i in range(5) for part in parts])
    assert np.array_equal(x, evaluate(config)[0])


def test_centered_images_lie_in_minus_one_to_one():
    for dequantize in (False, True):
        x, _ = stream(digits_config(uniform_dequantization=dequantize), 100, 2)
        centered, _ = stream(digits_config(uniform_dequantization=dequantize, centered=True), 100, 2)
        assert np.array_equal(centered, x * 2 - 1)
    x, _ = evaluate(digits_config(centered=True))
    pixels = load(digits_config()).test
    # The pixel comes back exactly, also from the centred float32.
    assert np.array_equal(np.floor(datasets.get_data_inverse_scaler(True)(x) * 17), pixels)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_samples_as_8_bits(levels):
    k = np.arange(levels)
    shown = np.round(k * 255 / (levels - 1))
    for u in (1e-4, 0.5, 1 - 1e-4):
        assert np.array_equal(datasets.to_8_bits(np.float32((k + u) / levels), levels, True), shown)
    for error in (-0.4, 0, 0.4):
        assert np.array_equal(datasets.to_8_bits(np.float32((k + error) / (levels - 1)), levels, False), shown)
    for dequantized in (True, False):
        assert datasets.to_8_bits(np.float32([-0.3, 1.2]), levels, dequantized).tolist() == [0, 255]


# Files in MNIST's format


def write_idx(folder, train, test, suffix=""):
    folder.mkdir(exist_ok=True)
    for name, images in (("train", train), ("t10k", test)):
        content = struct.pack(">4I", 0x803, *images.shape) + images.tobytes()
        content = gzip.compress(content) if suffix else content
        (folder / f"{name}-images-idx3-ubyte{suffix}").write_bytes(content)


def mnist_config(folder, size=28, name="MNIST"):
    return data_config(dataset=name, dir=str(folder), image_size=size, num_channels=1)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", ["MNIST", "FASHION_MNIST"])
def test_idx_files(tmp_path, suffix, name):
    images = np.random.default_rng(0).integers(0, 256, (9, 28, 28), np.uint8)
    write_idx(tmp_path, images[:5], images[5:], suffix)
    dataset = load(mnist_config(tmp_path, name=name))
    assert dataset.name == name and dataset.shape == (28, 28, 1)
    assert np.array_equal(dataset.train[:], images[:5, ..., None])
    assert np.array_equal(dataset.test[:], images[5:, ..., None])
    padded = load(mnist_config(tmp_path, 32, name)).test[:]
    assert padded.shape == (4, 32, 32, 1) and np.array_equal(padded[:, 2:30, 2:30, 0], images[5:])
    assert padded.sum(dtype=int) == images[5:].sum(dtype=int)
    half = load(mnist_config(tmp_path, 14, name)).test
    assert half.shape == (4, 14, 14, 1) and abs(half[:].mean() - images[5:].mean()) < 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "needs t10k-images-idx3-ubyte or .* set data.dir"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "799 bytes, not the 800 .*truncated"),
        (lambda path: path.write_bytes(path.read_bytes() + b"1"), "more than the 800 bytes"),
        (lambda path: path.write_bytes(b"\0\0\x08\x01" + path.read_bytes()[4:]), "header of an idx3-ubyte"),
        (lambda path: path.write_bytes(b""), "header of an idx3-ubyte"),
        (lambda path: path.rename(f"{path}.gz"), "not a whole gzip file"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, damage, message):
    write_idx(tmp_path, np.zeros((1, 28, 28), np.uint8), np.zeros((1, 28, 28), np.uint8))
    damage(tmp_path / "t10k-images-idx3-ubyte")
    with pytest.raises(UserError, match=message) as error:
        load(mnist_config(tmp_path))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 28, 28), "more than the 800 bytes of its header"),
        ((2**32 - 1, 2**16, 2**16), "bytes of images by its header"),
    ],
)
def test_a_gzipped_bomb_is_refused_without_its_memory(tmp_path, shape, message):
    write_idx(tmp_path, np.zeros((1, 28, 28), np.uint8), np.zeros((1, 28, 28), np.uint8), ".gz")
    with gzip.open(tmp_path / "t10k-images-idx3-ubyte.gz", "wb", compresslevel=1) as file:
        file.write(struct.pack(">4I", 0x803, *shape))
        for _ in range(64):
            file.write(bytes(2**20))
    tracemalloc.start()
    with pytest.raises(UserError, match=message) as error:
        load(mnist_config(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22  # of 2^26 bytes
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(not os.path.isdir("/usr/share/datasets/fashion-mnist"), reason="needs apt's dataset-fashion-mnist")
def test_fashion_mnist_of_debian():
    dataset = load(mnist_config("", 32, "FASHION_MNIST"))
    assert (dataset.train.shape, dataset.test.shape) == ((60_000, 32, 32, 1), (10_000, 32, 32, 1))
    # The published mean and standard deviation of the 28x28 training images in [0, 1].
    images = dataset.train[:, 2:30, 2:30] / np.float32(255)
    assert (round(float(images.mean()), 4), round(float(images.std()), 4)) == (0.2860, 0.3530)


# Data sets prepared by tensorflow-datasets


def prepare(root, name, splits, file_format, config=None):
    """Has tensorflow-datasets write images, a dict of lists of uint8 [H, W, 3], under the name of a known data set."""
    import tensorflow_datasets as tfds

    class Fake(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("3.0.2")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(num_classes=2),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(images) for split, images in splits.items()}

        def _generate_examples(self, images):
            for i, image in enumerate(images):
                yield i, {"image": image, "label": i % 2}

    Fake.name = name
    builder = Fake(data_dir=root, file_format=file_format, config=config)
    builder.download_and_prepare()
    return builder


def random_images(n, height, width, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, height // 8 + 1, width // 8 + 1, 3))
    smooth = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
    return np.clip(smooth + rng.integers(-20, 20, smooth.shape), 0, 255).astype(np.uint8)


def sorted_images(images):
    return np.array(sorted(np.asarray(image).tobytes() for image in images))


def test_cifar10_as_prepared_by_tfds(tmp_path):
    images = random_images(50, 32, 32)
    prepare(tmp_path, "cifar10", {"train": images[:40], "test": images[40:]}, "array_record")
    config = data_config(dataset="CIFAR10", dir=str(tmp_path))
    dataset = load(config)
    assert (dataset.shape, len(dataset.train), len(dataset.test)) == ((32, 32, 3), 40, 10)
    train = np.stack([dataset.train[i] for i in range(40)])
    assert train.dtype == np.uint8
    assert np.array_equal(sorted_images(train), sorted_images(images[:40]))
    assert np.array_equal(sorted_images(dataset.test[np.arange(10)]), sorted_images(images[40:]))
    x, index = stream(config, 16, 20)
    assert np.array_equal(np.sort(index.reshape(8, 40), axis=1), np.tile(np.arange(40), (8, 1)))
    assert np.array_equal(x, train[index].astype(np.float32) / np.float32(255))

    options = {"split": "test", "batch_size": 9, "seed": 0, "process_count": 2, "dequantize": False}
    parts = [list(datasets.eval_batches(load(config), config, process_index=k, **options)) for k in range(2)]
    assert [len(b["x"]) for part in parts for b in part] == [4, 0, 5, 1]

    shard = next((tmp_path / "cifar10/3.0.2").glob("cifar10-test*"))
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(UserError, match=f"{shard.parent} is damaged"):
        load(config)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard} is missing"):
        load(config)


def test_tfrecords_have_no_random_access(tmp_path):
    images = random_images(4, 32, 32)
    prepare(tmp_path, "cifar10", {"train": images[:2], "test": images[2:]}, "tfrecord")
    with pytest.raises(UserError, match=r"as tfrecord.*download_and_prepare\(file_format='array_record'\)") as error:
        load(data_config(dataset="CIFAR10", dir=str(tmp_path)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "folder", "category", "size", "method"),
    [
        ("CELEBA", "celeb_a", "", 64, "bilinear"),
        ("LSUN", "lsun", "church_outdoor", 64, "bicubic"),
        ("LSUN", "lsun", "church_outdoor", 128, "bilinear"),
    ],
)
def test_large_images_are_cropped_and_resized_as_by_tensorflow(tmp_path, name, folder, category, size, method):
    import tensorflow as tf

    images = random_images(3, 218, 178)
    prepare(tmp_path, folder, {"train": images[:1], "validation": images[1:]}, "array_record", category or None)
    dataset = load(data_config(dataset=name, dir=str(tmp_path), image_size=size, category=category))
    assert dataset.shape == (size, size, 3)
    crop = 140 if name == "CELEBA" else 178
    square = images[:1, (218 - crop) // 2 :, (178 - crop) // 2 :][:, :crop, :crop]
    expected = tf.image.resize(square.astype(np.float32), (size, size), method=method, antialias=True).numpy()[0]
    assert np.max(np.abs(dataset.train[0] - np.clip(expected, 0, 255))) <= 0.501  # half a level: rounding alone


def test_newest_version_and_missing_splits(tmp_path):
    builder = prepare(
        tmp_path, "svhn_cropped", {"train": random_images(2, 32, 32), "test": random_images(2, 32, 32)}, "array_record"
    )
    version = tmp_path / "svhn_cropped"
    (version / "3.0.2").rename(version / "3.0.10")
    (version / "3.0.9").mkdir()
    (version / "3.0.9" / "dataset_info.json").write_text("{}")
    assert builder.name == "svhn_cropped"
    assert len(load(data_config(dataset="SVHN", dir=str(tmp_path))).train) == 2
    prepare(tmp_path, "lsun", {"train": random_images(2, 64, 64)}, "array_record", "cat")
    with pytest.raises(UserError, match="no split 'validation'"):
        load(data_config(dataset="LSUN", dir=str(tmp_path), category="cat"))


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"dataset": "CIFAR10"}, "cifar10/"),
        ({"dataset": "SVHN"}, "svhn_cropped/"),
        ({"dataset": "CELEBA"}, "celeb_a/"),
        ({"dataset": "ImageNet"}, "downsampled_imagenet/32x32/"),
        ({"dataset": "ImageNet", "category": "imagenet_resized", "image_size": 64}, "imagenet_resized/64x64/"),
        ({"dataset": "LSUN", "category": "church_outdoor"}, "lsun/church_outdoor/"),
    ],
)
def test_missing_data_say_what_to_put_where(tmp_path, monkeypatch, changes, missing):
    monkeypatch.setattr(reach, "why_unreachable", lambda url: "no network")
    with pytest.raises(UserError, match=r"cannot be reached to download it \(no network\)") as error:
        load(data_config(dir=str(tmp_path), **changes))
    message = str(error.value)
    assert f"{tmp_path}/{missing}<version>/dataset_info.json" in message and "download_and_prepare" in message
    assert "\n" not in message


def test_a_network_that_hangs_costs_seconds(tmp_path, monkeypatch):
    start = time.monotonic()
    with silent_server() as url:
        monkeypatch.setenv("https_proxy", url)
        monkeypatch.delenv("no_proxy", raising=False)
        with pytest.raises(UserError, match=r"www\.cs\.toronto\.edu cannot be reached .* \(no answer within 5 s\)"):
            load(data_config(dataset="CIFAR10", dir=str(tmp_path)))
    assert time.monotonic() - start < 8


def test_a_reachable_data_set_is_downloaded(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(reach, "why_unreachable", lambda url: "")
    config = data_config(dataset="CIFAR10", dir=str(tmp_path))

    def broken(*args, **kwargs):
        raise OSError("404\nnot there")

    monkeypatch.setattr(tfds, "builder", broken)
    with pytest.raises(UserError, match=r"downloading it failed \(OSError: 404 not there\)"):
        load(config)

    def builder(name, data_dir, file_format):
        return prepare(
            data_dir, name, {"train": random_images(3, 32, 32), "test": random_images(2, 32, 32)}, file_format
        )

    monkeypatch.setattr(tfds, "builder", builder)
    dataset = load(config)
    assert (len(dataset.train), len(dataset.test)) == (3, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "CIFAR"}, "data.dataset='CIFAR' is not known; use one of .*CIFAR10.*mog"),
        ({"dataset": "CIFAR10", "image_size": 64}, "data.image_size=64: CIFAR10 comes at 32"),
        ({"dataset": "ImageNet", "image_size": 28}, "data.image_size=28: ImageNet comes at 32 or 64"),
        ({"dataset": "DIGITS"}, "data.image_size=32: DIGITS comes at 8"),
        ({"dataset": "DIGITS", "image_size": 8, "num_channels": 2}, "data.num_channels=2: DIGITS has 1"),
        ({"dataset": "LSUN"}, "data.category is empty"),
        ({"dataset": "ImageNet", "category": "new"}, "use downsampled_imagenet"),
        ({"dataset": "mog", "dim": 0}, "data.dim=0"),
        ({"dataset": "MNIST", "image_size": 28}, "data.dir='': set data.dir"),
    ],
)
def test_wrong_configs_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        load(data_config(**changes))


def test_a_batch_that_the_processes_cannot_share_is_refused():
    config = digits_config()
    with pytest.raises(UserError, match="not divisible by the 3 processes"):
        datasets.train_loader(load(config), config, batch_size=64, seed=0, process_count=3)


def test_data_without_files_need_no_tensorflow():
    code = (
        "import sys, datasets; from configs.default_configs import get_default_configs; c = get_default_configs().data;"
        "c.dataset = 'mog'; next(datasets.train_loader(datasets.load(c), c, batch_size=4, seed=0));"
        "sys.exit(any(m in sys.modules for m in ('tensorflow', 'tensorflow_datasets', 'sklearn')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_gray_images_for_a_colour_network():
    config = get_default_configs().data
    config.update(dataset="DIGITS", image_size=8, num_channels=1)
    gray = datasets.load(config)
    config.num_channels = 3
    colour = datasets.load(config)
    assert colour.shape == (8, 8, 3) and len(colour.test) == len(gray.test)
    for channel in range(3):
        np.testing.assert_array_equal(colour.train[np.arange(4)][..., channel], gray.train[np.arange(4)][..., 0])
    assert colour.test[5].shape == (8, 8, 3)


def test_a_split_that_is_not_kept_takes_no_memory(tmp_path):
    """2^40 images of 256x256, more than any machine has room for."""
    image = np.arange(256 * 256 * 3, dtype=np.int64).astype(np.uint8).reshape(256, 256, 3)

    class Records:
        def __len__(self):
            return 2**40

        def __getitem__(self, key):
            return {"image": image}

        def __getitems__(self, keys):
            return [self[key] for key in keys]

    info = SimpleNamespace(splits={"train": SimpleNamespace(filepaths=[])})
    builder = SimpleNamespace(info=info, data_dir=tmp_path, as_data_source=lambda split: Records())
    count, read = tfds.read_split(builder, "train", 256, lambda image: image)
    assert count == 2**40 and np.array_equal(read(np.array([5, 2**39])), [image, image])
