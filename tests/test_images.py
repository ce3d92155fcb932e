# SPDX-License-Identifier: Apache-2.0
"""Folders of image files, patches of photographs and published archives, against files that the tests write."""

import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import datasets
from configs.default_configs import get_default_configs
from errors import UserError
from sources import archives, images

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def random_pixels(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0]).save(path, **options)
    return path


def test_a_square_is_the_centre_resized(tmp_path):
    pixels = random_pixels(12, 20)
    np.testing.assert_array_equal(images.square(save(tmp_path / "a.png", pixels), 12, 3), pixels[:, 4:16])
    flat = np.full((30, 18, 3), (200, 10, 77), np.uint8)
    np.testing.assert_array_equal(
        images.square(save(tmp_path / "b.bmp", flat), 5, 3), np.full((5, 5, 3), (200, 10, 77))
    )
    gray = images.square(save(tmp_path / "c.png", random_pixels(8, 8, 1)), 8, 3)
    assert gray.shape == (8, 8, 3) and np.all(gray == gray[..., :1])
    luma = images.square(tmp_path / "a.png", 12, 1)[..., 0]  # ITU-R 601-2
    np.testing.assert_allclose(luma, pixels[:, 4:16] @ [0.299, 0.587, 0.114], atol=1)


def test_a_square_is_upright_as_exif_says(tmp_path):
    pixels, exif = random_pixels(6, 6), Image.Exif()
    exif[0x0112] = 6  # the camera was turned: a quarter turn clockwise shows it upright
    path = save(tmp_path / "a.png", pixels, exif=exif)
    np.testing.assert_array_equal(images.square(path, 6, 3), np.rot90(pixels, -1))


def test_resizing_is_antialiased(tmp_path):
    """A checkerboard of single pixels becomes grey and no pattern."""
    board = np.indices((64, 64)).sum(axis=0) % 2 * 255
    path = save(tmp_path / "a.png", np.repeat(board[..., None], 3, axis=-1).astype(np.uint8))
    small = images.square(path, 16, 3)[2:-2, 2:-2].astype(int)
    assert np.all(np.abs(small - 127.5) < 3)


def test_halving_is_the_mean_of_four_pixels():
    pixels = random_pixels(7, 8)
    truth = [[pixels[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean(axis=(0, 1)) for j in range(4)] for i in range(3)]
    np.testing.assert_allclose(images.halved(pixels), truth, atol=0.5)


def test_patches_of_the_splits_share_no_pixel_and_have_a_margin():
    """Of a photograph whose pixels tell their place, by 2 as it is halved."""
    place = np.arange(40 * 100).reshape(40, 100)
    halves = np.stack([place // 256, place % 256, np.zeros_like(place)], axis=-1).astype(np.uint8)
    photograph = halves.repeat(2, axis=0).repeat(2, axis=1)
    train, test = images.patches([photograph], 8, 2)
    places = [x[..., 0].astype(int) * 256 + x[..., 1] for x in (train, test)]
    columns = [np.unique(p % 100) for p in places]
    assert columns[1].min() - columns[0].max() > 8 and columns[1].min() == 80
    assert len(test) == 5 * 2 and len(np.unique(places[1])) == places[1].size  # no test patch overlaps another
    rows, lefts = 1 + (40 - 8) // 2, 1 + (72 - 8) // 2
    assert train.shape == (rows * lefts, 8, 8, 3) and len(np.unique(places[0].reshape(len(train), -1), axis=0)) == len(
        train
    )
    corner = places[0][0]
    np.testing.assert_array_equal(corner, place[:8, :8])


def hash_is_test(path):
    return int(hashlib.sha256(path.read_bytes()).hexdigest()[:12], 16) % 10 == 0


def read(root, size, channels):
    config = data_config(dataset="IMAGE_FOLDER", dir=str(root), image_size=size, num_channels=channels)
    dataset = datasets.load(config)
    return dataset.train, dataset.test


def test_a_folder_is_split_by_content(tmp_path, cache):
    root = tmp_path / "mine"
    paths = [save(root / f"{i % 3}" / f"{i}.png", random_pixels(8, 8, seed=i)) for i in range(60)]
    train, test = read(root, 8, 3)
    expected = [path for path in paths if hash_is_test(path)]
    assert (len(train), len(test)) == (60 - len(expected), len(expected)) and len(expected) > 0
    seen = {image.tobytes() for image in test[np.arange(len(test))]}
    assert seen == {np.asarray(Image.open(path)).tobytes() for path in expected}

    (root / "0/0.png").rename(root / "renamed.png")
    save(root / "more.png", random_pixels(8, 8, seed=99))
    again_train, again_test = read(root, 8, 3)
    assert len(again_train) + len(again_test) == 61
    assert seen <= {image.tobytes() for image in again_test[np.arange(len(again_test))]}, "a test image stays one"
    digests = [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(root.rglob("*.png")) if not hash_is_test(path)
    ]
    by_digest = {hashlib.sha256(p.read_bytes()).hexdigest(): np.asarray(Image.open(p)) for p in root.rglob("*.png")}
    np.testing.assert_array_equal(again_train[np.arange(len(again_train))], [by_digest[d] for d in sorted(digests)])

    save(root / "more.png", random_pixels(8, 8, seed=100))  # another image under the same name
    every = [image.tobytes() for split in read(root, 8, 3) for image in split[np.arange(len(split))]]
    assert random_pixels(8, 8, seed=100).tobytes() in every and random_pixels(8, 8, seed=99).tobytes() not in every


def test_folders_of_the_splits_are_the_splits(tmp_path):
    for split, count in (("train", 5), ("test", 2)):
        for i in range(count):
            save(tmp_path / "mine" / split / "deep" / f"{i}.webp", random_pixels(16, 16, seed=i), lossless=True)
    train, test = read(tmp_path / "mine", 8, 1)
    assert (len(train), len(test)) == (5, 2) and train[0].shape == (8, 8, 1)


def test_broken_files_are_skipped_and_told(tmp_path, caplog):
    root = tmp_path / "mine"
    for i in range(30):
        save(root / f"{i:02}.png", random_pixels(8, 8, seed=i))
    (root / "05.png").write_bytes((root / "05.png").read_bytes()[:40])
    (root / "06.jpg").write_bytes(b"no image")
    (root / "notes.txt").write_text("no image either")
    for _ in range(2):  # the second call reads the cache
        caplog.clear()
        with caplog.at_level("WARNING", logger="absl"):
            train, test = read(root, 8, 3)
        assert len(train) + len(test) == 29
        assert "2 of 31 files" in caplog.text and "05.png, 06.jpg" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "has no image"),
        ({"a.png": b"", "b.jpg": b"x"}, "none of the 2 image files"),
        ({"train/a.png": None, "test/b.png": b"x"}, "no image for the test split"),
    ],
)
def test_a_folder_without_images_is_one_line(tmp_path, content, message):
    root = tmp_path / "mine"
    root.mkdir()
    for name, data in content.items():
        if data is None:
            save(root / name, random_pixels(8, 8))
        else:
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        read(root, 8, 3)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="is not a folder"):
        read(root / "nowhere", 8, 3)


def test_a_call_that_is_killed_goes_on(tmp_path, cache):
    root = tmp_path / "mine"
    for i in range(1500):
        save(root / f"{i}.bmp", random_pixels(8, 8, seed=i))
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\nfrom sources import folder\n"
    script += f"folder.CHUNK = 8\nfolder.read(Path({str(root)!r}), 8, 3)\n"
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while not (manifests := list(cache.rglob("manifest.jsonl"))) or manifests[0].stat().st_size < 5_000:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    known = manifests[0].read_bytes().count(b"\n")
    assert 0 < known < 1500
    with manifests[0].open("ab") as file:  # as if it had been cut in the middle of a line
        file.write(b'{"name": "17')
    with (manifests[0].parent / "images").open("ab") as file:
        file.write(b"half a row")
    train, test = read(root, 8, 3)
    every = {image.tobytes() for split in (train, test) for image in split[np.arange(len(split))]}
    assert every == {random_pixels(8, 8, seed=i).tobytes() for i in range(1500)}
    assert manifests[0].read_bytes().count(b"\n") == 1500, "nothing was decoded twice"


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    save(tmp_path / "mine/a.png", random_pixels(8, 8))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        read(tmp_path / "mine", 8, 3)


def data_config(**changes):
    config = get_default_configs().data
    config.update({"random_flip": False, **changes})
    return config


def test_a_folder_and_patches_are_data_sets(tmp_path):
    root = tmp_path / "mine"
    for i in range(40):
        save(root / f"{i}.png", random_pixels(20, 30, seed=i))
    config = data_config(dataset="IMAGE_FOLDER", dir=str(root), image_size=8)
    dataset = datasets.load(config)
    assert dataset.shape == (8, 8, 3) and len(dataset.train) + len(dataset.test) == 40 and dataset.levels == 256
    batch = next(datasets.train_loader(dataset, config, batch_size=6, seed=0))
    np.testing.assert_array_equal(batch["x"], dataset.train[batch["index"]].astype(np.float32) / np.float32(255))
    of_folder = datasets.load(data_config(dataset="PATCHES", dir=str(root), image_size=2))
    assert of_folder.train.shape[1:] == of_folder.test.shape[1:] == (2, 2, 3)
    with pytest.raises(UserError, match="no photograph is large enough"):
        datasets.load(data_config(dataset="PATCHES", dir=str(root), image_size=32))
    for name in ("PATCHES", "IMAGE_FOLDER"):
        with pytest.raises(UserError, match=r"data\.num_channels=2: image files are read with 1 or 3"):
            datasets.load(data_config(dataset=name, dir=str(root), image_size=2, num_channels=2))
    (root / "7.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"7\.png cannot be read .*; remove or mend it") as error:
        datasets.load(data_config(dataset="PATCHES", dir=str(root), image_size=2))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("size", "train", "test"), [(8, 24_926, 416), (16, 5_700, 104)])
def test_embedded_patches_are_distinct_and_in_colour_or_grey(size, train, test):
    dataset = datasets.load(data_config(dataset="PATCHES", image_size=size))
    assert (len(dataset.train), len(dataset.test)) == (train, test)
    assert len(np.unique(dataset.train.reshape(train, -1), axis=0)) == train
    gray = datasets.load(data_config(dataset="PATCHES", image_size=size, num_channels=1))
    assert gray.shape == (size, size, 1) and len(gray.train) == train


def test_archives_in_the_folder_come_before_tfds(tmp_path):
    files, train, test = cifar_files()
    (tmp_path / "cifar-10-batches-bin").mkdir()
    for name, content in files.items():
        (tmp_path / "cifar-10-batches-bin" / name).write_bytes(content)
    dataset = datasets.load(data_config(dataset="CIFAR10", dir=str(tmp_path)))
    np.testing.assert_array_equal(dataset.train, train)
    np.testing.assert_array_equal(dataset.test, test)


def cifar_files(count=4):
    rng, truth, files = np.random.default_rng(0), {}, {}
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        truth[name] = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        records = [bytes([3]) + np.moveaxis(image, -1, 0).tobytes() for image in truth[name]]
        files[f"{name}.bin"] = b"".join(records)
    train = np.concatenate([truth[f"data_batch_{n}"] for n in range(1, 6)])
    return files, train, truth["test_batch"]


@pytest.mark.parametrize("packed", [True, False])
def test_cifar10_as_published(tmp_path, packed):
    assert archives.cifar10(tmp_path) is None
    files, train, test = cifar_files()
    if packed:
        with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as tar:
            for name, content in files.items():
                member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    else:
        (tmp_path / "cifar-10-batches-bin").mkdir()
        for name, content in files.items():
            (tmp_path / "cifar-10-batches-bin" / name).write_bytes(content)
    for ours, truth in zip(archives.cifar10(tmp_path), (train, test), strict=True):
        np.testing.assert_array_equal(ours, truth)
    damaged = next(tmp_path.rglob("test_batch.bin"), tmp_path / "cifar-10-binary.tar.gz")
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"is damaged.*fetch it again") as error:
        archives.cifar10(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("packed", [True, False])
def test_imagenet_as_published(tmp_path, packed):
    assert archives.imagenet(tmp_path, 32) is None
    rng = np.random.default_rng(0)
    batches = {name: rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8) for name in ("1", "2", "10", "val")}
    for name, pixels in batches.items():
        path = tmp_path / ("val_data.npz" if name == "val" else f"train_data_batch_{name}.npz")
        np.savez(path, data=np.moveaxis(pixels, -1, 1).reshape(3, -1), labels=np.arange(3))
        if packed:
            archive = "Imagenet32_val_npz.zip" if name == "val" else "Imagenet32_train_npz.zip"
            with zipfile.ZipFile(tmp_path / archive, "a") as file:
                file.write(path, path.name)
            path.unlink()
    train, test = archives.imagenet(tmp_path, 32)
    np.testing.assert_array_equal(train, np.concatenate([batches[name] for name in ("1", "2", "10")]))
    np.testing.assert_array_equal(test, batches["val"])
    for path in tmp_path.iterdir():
        os.truncate(path, path.stat().st_size - 200)
    with pytest.raises(UserError, match=r"is damaged.*fetch it again"):
        archives.imagenet(tmp_path, 32)
