# SPDX-License-Identifier: Apache-2.0
"""Features, IS, FID and KID against closed forms, numpy and scipy, and the whole path with networks made here."""

import hashlib
import json
import math
import time
import tracemalloc

import numpy as np
import pytest
import scipy.linalg
from scipy.special import log_softmax, softmax
from sklearn.datasets import load_digits
from test_datasets import write_idx
from test_reach import silent_server

import datasets
import evaluation
import run_lib
from configs.default_configs import get_default_configs
from errors import UserError
from evaluators import inception

POOL, LOGITS = 6, 5


def weights(pool=POOL, logits=LOGITS, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(3, pool)).astype(np.float32), rng.normal(size=(pool, logits)).astype(np.float32)


def save_network(path, *, size=None, dims=(POOL, LOGITS), seed=0, call=True, outputs=("pool_3", "logits"), batch=None):
    """pool_3 = mean over pixels of tanh(x W) as [n, 1, 1, d], logits = pool_3 V: the signature of TF-Hub's network."""
    import tensorflow as tf

    w, v = weights(*dims, seed)
    module = tf.Module()
    module.w, module.v = tf.Variable(w), tf.Variable(v)

    @tf.function(input_signature=[tf.TensorSpec([batch, size, size, 3], tf.float32)])
    def network(images):
        pool_3 = tf.reduce_mean(tf.tanh(tf.einsum("nhwc,cd->nhwd", images, module.w)), [1, 2], keepdims=True)
        values = {"pool_3": pool_3, "logits": tf.matmul(pool_3[:, 0, 0], module.v)}
        return {name: values[name] for name in outputs}

    if call:
        module.__call__ = network
        tf.saved_model.save(module, str(path))
    else:
        tf.saved_model.save(module, str(path), signatures=network)
    return str(path)


def numpy_network(images, seed=0):
    w, v = weights(seed=seed)
    x = (images.astype(np.float64) - 127.5) / 127.5
    pool_3 = np.tanh(np.repeat(x, 3 // x.shape[-1], axis=-1) @ w).mean(axis=(1, 2))
    return pool_3, pool_3 @ v


def random_images(n=23, size=8, channels=3, seed=1):
    return np.random.default_rng(seed).integers(0, 256, size=(n, size, size, channels), dtype=np.uint8)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return save_network(tmp_path_factory.mktemp("network") / "any_size")


def digits_config(network, stats_path):
    """scikit-learn's digits, stretched to 256 levels, in MNIST's format."""
    pixels = np.round(load_digits().images * 255 / 16).astype(np.uint8)
    write_idx(stats_path.parent / "digits", pixels[:1500], pixels[1500:])
    config = get_default_configs()
    config.data.update(dataset="MNIST", dir=str(stats_path.parent / "digits"), image_size=8, num_channels=1)
    config.eval.update(inception_path=network, stats_path=str(stats_path), kid_subsets=5, kid_subset_size=100)
    return config


# --- metrics


def exact_gaussian(n, mean, factor, seed):
    """n points whose mean is `mean` and whose unbiased covariance is factor^T factor, both to rounding."""
    z = np.random.default_rng(seed).normal(size=(n, len(mean)))
    z -= z.mean(axis=0)
    z = np.linalg.solve(np.linalg.cholesky(np.cov(z, rowvar=False)), z.T).T
    return mean + z @ factor


def test_frechet_distance_of_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    mean, other = rng.normal(size=(2, 16))
    scale, other_scale = rng.uniform(0.2, 2, size=(2, 16))
    rotation = np.linalg.qr(rng.normal(size=(16, 16)))[0]  # of both, so that the covariances commute
    real = exact_gaussian(300, mean, np.diag(scale) @ rotation, 1)
    fake = exact_gaussian(411, other, np.diag(other_scale) @ rotation, 2)
    truth = np.sum((mean - other) ** 2) + np.sum((scale - other_scale) ** 2)
    np.testing.assert_allclose(evaluation.frechet_distance(real, fake), truth, rtol=1e-9)


def test_frechet_distance_equals_scipy():
    rng = np.random.default_rng(3)
    real = rng.normal(size=(500, 64)) @ rng.normal(size=(64, 64)) / 8
    fake = (rng.gamma(2, size=(400, 64)) @ rng.normal(size=(64, 64)) / 8).astype(np.float32)
    covariance, other = np.cov(real, rowvar=False), np.cov(fake.astype(np.float64), rowvar=False)
    root = scipy.linalg.sqrtm(covariance @ other)
    truth = np.sum((real.mean(0) - fake.mean(0, dtype=np.float64)) ** 2)
    truth += np.trace(covariance + other - 2 * np.real(root))
    np.testing.assert_allclose(evaluation.frechet_distance(real, fake), truth, rtol=1e-9)


def test_frechet_distance_of_fewer_examples_than_dimensions_is_finite():
    real, fake = np.random.default_rng(4).normal(size=(2, 10, 64))
    assert math.isfinite(evaluation.frechet_distance(real, fake))
    assert abs(evaluation.frechet_distance(real, real)) < 1e-4


def numpy_kid(real, fake):
    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def off_diagonal(k):
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    return off_diagonal(kernel(real, real)) + off_diagonal(kernel(fake, fake)) - 2 * kernel(real, fake).mean()


def numpy_kid_of_blocks(real, fake, block_size):
    """Mean over blocks as equal as can be, the smaller ones first."""
    count = -(-max(len(real), len(fake)) // block_size)
    ends = [np.cumsum([(len(x) + k) // count for k in range(count - 1)]) for x in (real, fake)]
    blocks = [np.split(x, end) for x, end in zip((real, fake), ends, strict=True)]
    return np.mean([numpy_kid(*block) for block in zip(*blocks, strict=True)])


def test_kernel_distance_equals_numpy():
    rng = np.random.default_rng(5)
    real, fake = rng.normal(size=(2500, 12)), rng.normal(0.2, 1, size=(2101, 12)).astype(np.float32)
    kid = evaluation.kernel_distance(real, fake, subsets=4, subset_size=50)
    np.testing.assert_allclose(kid.mean, numpy_kid_of_blocks(real, fake.astype(np.float64), 1024), rtol=1e-9)
    subsets = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        chosen = [x[rng.choice(len(x), 50, replace=False)].astype(np.float64) for x in (real, fake)]
        subsets.append(numpy_kid(*chosen))
    np.testing.assert_allclose(kid.subset_mean, np.mean(subsets), rtol=1e-9)
    np.testing.assert_allclose(kid.subset_std, np.std(subsets, ddof=1), rtol=1e-9)
    blocks = []  # random ones of the sizes of the three
    for i, sizes in enumerate([(833, 700), (833, 700), (834, 701), (833, 700)]):
        rng = np.random.default_rng((1, i))
        chosen = [x[rng.choice(len(x), n, replace=False)] for x, n in zip((real, fake), sizes, strict=True)]
        blocks.append(numpy_kid(*(x.astype(np.float64) for x in chosen)))
    np.testing.assert_allclose(kid.stderr, np.std(blocks, ddof=1) / math.sqrt(2), rtol=1e-9)
    assert (kid.subset_size, kid.num_subsets) == (50, 4)
    assert evaluation.kernel_distance(real, fake, subsets=4, subset_size=50) == kid


@pytest.mark.parametrize(
    ("real_size", "fake_size", "shift"),
    [
        (96, 96, 0.5),  # one block
        (384, 384, 0.5),  # three blocks
        (1600, 60, 0.0),  # 13 blocks, of 123 and 5, of one distribution
        (1600, 60, 0.5),
        (60, 1600, 0.5),
    ],
)
def test_the_standard_error_of_kernel_distance_is_its_spread_over_draws(monkeypatch, real_size, fake_size, shift):
    monkeypatch.setattr(evaluation, "KID_BLOCK_SIZE", 128)
    monkeypatch.setattr(evaluation, "_kid", numpy_kid_of_blocks)  # equal, see above, and a hundred times as fast
    rng = np.random.default_rng(6)

    def draw():
        return rng.normal(size=(real_size, 4)), rng.normal(shift, 1, size=(fake_size, 4))

    spread = np.std([evaluation.kernel_distance(*draw(), subsets=0).mean for _ in range(150)], ddof=1)
    stderrs = [evaluation.kernel_distance(*draw(), subsets=40).stderr for _ in range(10)]
    # by chance 6 % of the spread, and 11 % / sqrt(10) of the errors
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(stderrs))), spread, rtol=0.2)


def test_kernel_distance_of_few_samples_is_finite():
    rng = np.random.default_rng(7)
    real = rng.normal(size=(5000, 3))
    kid = evaluation.kernel_distance(real, rng.normal(size=(3, 3)), subsets=3)
    assert math.isfinite(kid.mean) and math.isnan(kid.stderr)
    kid = evaluation.kernel_distance(real, rng.normal(size=(8, 3)), subsets=3)
    assert kid.subset_size == 4 and kid.stderr > 0


def test_inception_score_is_the_closed_form_and_numpys():
    classes = 7
    logits = 3 * np.tile(np.eye(classes), (4, 1))
    p = softmax(logits[0])
    truth = classes * np.exp(np.sum(p * np.log(p)))  # exp(H(mean of p) - H(p))
    np.testing.assert_allclose(evaluation.inception_score(logits), truth, rtol=1e-12)
    np.testing.assert_allclose(evaluation.inception_score(np.ones((9, classes))), 1, rtol=1e-12)
    logits = np.random.default_rng(8).normal(0, 3, size=(200, 11)).astype(np.float32)
    log_p = log_softmax(logits.astype(np.float64), axis=1)
    kl = np.sum(np.exp(log_p) * (log_p - np.log(np.exp(log_p).mean(axis=0))), axis=1)
    np.testing.assert_allclose(evaluation.inception_score(logits), np.exp(kl.mean()), rtol=1e-9)


# --- features


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("call", [True, False])
def test_features_are_the_networks_on_scaled_images(tmp_path, call, channels):
    features = inception.load_features(save_network(tmp_path / "net", call=call))
    images = random_images(channels=channels)
    for batch_size in (1, 5, 23, 100):
        pool_3, logits = features.fn(images, batch_size)
        assert pool_3.dtype == logits.dtype == np.float32
        for value, truth in zip((pool_3, logits), numpy_network(images), strict=True):
            np.testing.assert_allclose(value, truth, rtol=1e-4, atol=1e-5)
    assert features.resize == "inside the module"


def test_inception_features_loads_and_runs(network):
    pool_3, logits = inception.load_features(network).fn(random_images(4), 100)
    assert pool_3.shape == (4, POOL) and logits.shape == (4, LOGITS)


def test_a_network_of_one_size_gets_images_of_that_size(tmp_path):
    features = inception.load_features(save_network(tmp_path / "net", size=12))
    assert features.resize.startswith("bilinear to 12x12")
    images = random_images(3, size=8)
    # TensorFlow 1's bilinear: output pixel i lies at 8 i / 12 of the input, whose last pixel is repeated
    place = np.arange(12) * 8 / 12
    low, part = np.floor(place).astype(int), place - np.floor(place)
    matrix = np.zeros((12, 8))
    matrix[np.arange(12), low] += 1 - part
    matrix[np.arange(12), np.minimum(low + 1, 7)] += part
    resized = np.einsum("ih,jw,nhwc->nijc", matrix, matrix, images.astype(np.float64))
    np.testing.assert_allclose(features.fn(images, 2)[0], numpy_network(resized)[0], rtol=1e-4, atol=1e-5)
    right_size = random_images(3, size=12)
    np.testing.assert_allclose(features.fn(right_size, 2)[0], numpy_network(right_size)[0], rtol=1e-4, atol=1e-5)


def test_only_tfhubs_own_folder_is_called_comparable(tmp_path, network, monkeypatch):
    other = inception.load_features(network)
    assert not other.comparable and "not comparable" in other.note
    local = inception.load_features(save_network(tmp_path / "net", dims=(2048, 1008)))
    assert not local.comparable and "only if" in local.note
    # TF-Hub's cache, where the network is found without a connection
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(inception.reach, "why_unreachable", lambda url: pytest.fail("nothing is to be asked for"))
    (tmp_path / "net").rename(tmp_path / hashlib.sha1(inception.TFHUB_HANDLE.encode()).hexdigest())
    cached = inception.load_features()
    assert cached.comparable and cached.name == inception.TFHUB_HANDLE
    assert cached.hash == local.hash != other.hash


def test_without_a_network_tfhub_fails_within_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(inception.reach, "SECONDS", 0.2)
    start = time.monotonic()
    with silent_server() as url:
        monkeypatch.setattr(inception, "TFHUB_HANDLE", url)
        with pytest.raises(UserError, match=r"no answer within 0.2 s.*set eval.inception_path") as info:
            inception.load_features()
    assert time.monotonic() - start < 20 and "\n" not in str(info.value)
    monkeypatch.setattr(inception.reach, "SECONDS", 60.0)
    with pytest.raises(UserError, match="Connection refused"):  # it is closed
        inception.load_features()


def test_folders_that_are_no_network_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no saved_model\.pb"):
        inception.load_features(str(tmp_path / "missing"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "saved_model.pb").write_bytes(b"no graph")
    with pytest.raises(UserError, match="cannot be read as a SavedModel"):
        inception.load_features(str(tmp_path / "broken"))
    with pytest.raises(UserError, match="no output 'logits'"):
        inception.load_features(save_network(tmp_path / "pool", outputs=("pool_3",)))
    with pytest.raises(UserError, match="does not take images"):
        inception.load_features(save_network(tmp_path / "batch", batch=4))


# --- statistics, and the whole path


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"dataset": "CIFAR10"}, "cifar10"),
        ({"dataset": "CELEBA", "image_size": 64}, "celeba"),
        ({"dataset": "ImageNet", "image_size": 32}, "imagenet32"),
        ({"dataset": "ImageNet", "image_size": 64, "category": "imagenet_resized"}, "imagenet_resized64"),
        ({"dataset": "LSUN", "image_size": 256, "category": "church_outdoor"}, "lsun_church_outdoor_256"),
        ({"dataset": "FASHION_MNIST"}, "fashion_mnist"),
    ],
)
def test_statistics_have_the_public_names(data, name):
    config = get_default_configs().data
    config.update(data)
    assert str(evaluation.statistics_path(config)) == f"assets/stats/{name}_stats.npz"
    assert str(evaluation.statistics_path(config, "/elsewhere/x.npz")) == "/elsewhere/x.npz"


def test_the_whole_path_on_digits(tmp_path, network):
    config = digits_config(network, tmp_path / "digits.npz")
    config.eval.stats_path = str(tmp_path / "new" / "digits.npz")
    config.eval.inception_batch_size = 64
    path = run_lib.stats(config)
    images = datasets.load(config.data).train[np.arange(1500)]
    statistics = evaluation.load_statistics(path, config.data)
    np.testing.assert_allclose(statistics.pool_3, numpy_network(images)[0], rtol=1e-4, atol=1e-5)

    features = inception.load_features(network)
    pool_3, logits = features.fn(images, 100)
    result = evaluation.sample_metrics(features, statistics, pool_3, logits, config.eval)
    assert abs(result["fid"]) < 1e-6
    assert abs(result["kid"]["mean"]) < 1e-3
    noise = evaluation.sample_metrics(features, statistics, *features.fn(random_images(200), 50), config.eval)
    assert noise["fid"] > 1e-2 and noise["kid"]["mean"] > 10 * noise["kid"]["stderr"] > 0
    assert json.loads(json.dumps(noise)) == noise
    assert noise["num_samples"] == 200 and noise["inception_score"] >= 1
    assert noise["features"] == {
        "name": network,
        "hash": features.hash,
        "resize": "inside the module",
        "comparable": False,
        "note": features.note,
    }
    assert noise["statistics"] == {
        "path": str(path),
        "hash": hashlib.sha256(statistics.pool_3.tobytes()).hexdigest()[:16],
        "num_images": 1500,
        "features_name": network,
        "features_hash": features.hash,
    }
    with pytest.raises(UserError, match=r"raise eval\.num_samples"):
        evaluation.sample_metrics(features, statistics, pool_3[:1], logits[:1], config.eval)

    # the three equal channels of `num_channels=3` are the same images, and the file may be made again
    config.data.num_channels = 3
    np.testing.assert_array_equal(evaluation.load_statistics(run_lib.stats(config)).pool_3, statistics.pool_3)


def test_statistics_are_held_once(tmp_path):
    count, dim = 12_000, 2048

    def fn(images, batch_size):
        pixels = images.reshape(-1, 1).astype(np.float32)
        return np.tile(pixels, (1, dim)), np.zeros((len(images), 5), np.float32)

    images = np.random.default_rng(0).integers(0, 256, (count, 1, 1, 1), np.uint8)
    dataset = datasets.Dataset("made", (1, 1, 1), True, images, images)
    features = inception.Features(fn, "made", "hash", "", False, "")
    path, config = tmp_path / "stats.npz", get_default_configs().data
    for _ in range(2):  # also where the file of an earlier call is looked at first
        tracemalloc.start()
        evaluation.compute_statistics(dataset, config, features, path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.6 * 4 * count * dim  # 98 MB, and numpy writes in pieces of 16 MB
    np.testing.assert_array_equal(evaluation.load_statistics(path).pool_3, fn(images, 100)[0])


def test_statistics_of_other_features_or_images_are_refused(tmp_path, network):
    config = digits_config(network, tmp_path / "digits.npz")
    path = run_lib.stats(config)
    other = inception.load_features(save_network(tmp_path / "other", seed=1))
    statistics = evaluation.load_statistics(path)
    with pytest.raises(UserError, match=r"digits\.npz has 6 features of .*--mode stats"):
        evaluation.sample_metrics(other, statistics, *other.fn(random_images(), 9), config.eval)
    config.eval.inception_path = other.name
    with pytest.raises(UserError, match=r"move it or set eval\.stats_path"):
        run_lib.stats(config)
    config.data.update(dataset="FASHION_MNIST", image_size=28)
    with pytest.raises(UserError, match="is of mnist 8x8, not of fashion_mnist 28x28"):
        evaluation.load_statistics(path, config.data)
    config.data.update(dataset="DIGITS", image_size=8)
    config.eval.stats_path = str(tmp_path / "17 levels.npz")
    with pytest.raises(UserError, match="'DIGITS' has 17 levels"):
        run_lib.stats(config)
    config.data.dataset = "mog"
    with pytest.raises(UserError, match="needs images"):
        run_lib.stats(config)


def test_a_public_file_is_read_and_labelled(tmp_path, network):
    config = digits_config(network, tmp_path / "public.npz")
    pool_3 = np.random.default_rng(9).normal(size=(40, POOL)).astype(np.float32)
    np.savez_compressed(config.eval.stats_path, pool_3=pool_3)
    path = evaluation.statistics_path(config.data, config.eval.stats_path)
    statistics = evaluation.load_statistics(path, config.data)
    np.testing.assert_array_equal(statistics.pool_3, pool_3)
    features = inception.load_features(network)
    result = evaluation.sample_metrics(features, statistics, *features.fn(random_images(), 9), config.eval)
    assert result["statistics"]["features_hash"] == "unknown (public layout)"
    with pytest.raises(UserError, match="move it"):
        run_lib.stats(config)
    np.savez_compressed(path, pool_3=pool_3[:, :4])
    with pytest.raises(UserError, match="has 4 features"):
        evaluation.sample_metrics(
            features, evaluation.load_statistics(path), *features.fn(random_images(), 9), config.eval
        )


def test_files_that_are_no_statistics_are_refused(tmp_path):
    path = tmp_path / "cifar10_stats.npz"
    with pytest.raises(UserError, match="make it with --mode stats"):
        evaluation.load_statistics(path)
    path.write_bytes(b"not a zip")
    with pytest.raises(UserError, match="cannot be read as an npz file"):
        evaluation.load_statistics(path)
    np.savez(path, mu=np.zeros(3))
    with pytest.raises(UserError, match="no array pool_3"):
        evaluation.load_statistics(path)
