# SPDX-License-Identifier: Apache-2.0
"""Every data source, its scaling and its dequantisation. No other module reads data.

`load` returns a `Dataset`. `train_loader` is an endless shuffled stream of its training split, `eval_batches` one pass
over a split. Each flip, noise value and synthetic example is a hash of the seed, the example's index and the epoch
(`sources.splitmix`), so it depends neither on the batch size, nor on the number of hosts, nor on a resume.

Image sets have the splits and crops of Song et al. 2021, but are rounded to 8 bits after resizing, because bits/dim are
about 8-bit images.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Float, Int64, UInt8
from PIL import Image

from errors import UserError
from sources import archives, folder, idx, images, splitmix, synthetic, tfds

# One number for each use of random bits, so that no two uses share them.
_SHUFFLE, _FLIP, _TRAIN_NOISE, _EVAL_NOISE, _SYNTHETIC_TRAIN, _SYNTHETIC_TEST = range(1, 7)


@runtime_checkable
class Source(Protocol):
    """Random access: an int gives one example, an int64 array [B] gives B stacked. An ndarray [N, ...] is a source."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Two splits of examples, uint8 [H, W, C] if `is_image`, else float32 [D]; and their density, where it is known.

    levels: pixels are whole numbers 0 .. levels - 1.
    log_prob: [N, D] -> [N], in nats, as is the entropy.
    mixture: (weights [M], means [M, 1], variances [M, 1]) of data from M Gaussians, the same in every coordinate.
    breaks: the values, ascending, of every coordinate at which the density jumps.
    """

    name: str
    shape: tuple[int, ...]
    is_image: bool
    train: Source
    test: Source
    log_prob: Callable[[np.ndarray], np.ndarray] | None = None
    entropy: float | None = None
    mixture: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    breaks: tuple[float, ...] = ()
    levels: int = 256

    def digest(self, split: str) -> str:
        """A hash of the number of examples in a split and of up to 10,000 of them, evenly spaced."""
        source = getattr(self, split)
        sha = hashlib.sha256(str(len(source)).encode())
        for index in np.array_split(np.unique(np.linspace(0, len(source) - 1, 10_000).astype(np.int64)), 10):
            sha.update(np.ascontiguousarray(source[index]).tobytes())
        return sha.hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class _Lazy:
    """A source that makes or reads its examples when they are asked for, by `take(index [B]) -> [B, ...]`."""

    length: int
    take: Callable[[np.ndarray], np.ndarray]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: Any) -> np.ndarray:
        index = np.asarray(key, np.int64)
        if np.any(index < 0) or np.any(index >= self.length):
            raise IndexError(f"example {key} of {self.length}")
        rows = self.take(np.atleast_1d(index))
        return rows if index.ndim else rows[0]


def load(data_config: Any) -> Dataset:
    """Loads `data.dataset`. UserError: an unknown name, missing or damaged files, a size that it does not have."""
    name = data_config.dataset
    if name not in _DATASETS:
        raise UserError(f"data.dataset={name!r} is not known; use one of {', '.join(sorted(_DATASETS))}")
    dataset = _DATASETS[name](data_config)
    if dataset.is_image and (dataset.shape[-1], data_config.num_channels) == (1, 3):
        train, test = _gray_as_rgb(dataset.train), _gray_as_rgb(dataset.test)
        return dataclasses.replace(dataset, shape=(*dataset.shape[:2], 3), train=train, test=test)
    if dataset.is_image and dataset.shape[-1] != data_config.num_channels:
        raise UserError(f"data.num_channels={data_config.num_channels}: {name} has {dataset.shape[-1]}; set it to that")
    return dataset


def _gray_as_rgb(source: Source) -> Source:
    """Repeats the one channel three times, for a network of colour images."""
    return _Lazy(len(source), lambda index: np.repeat(source[index], 3, axis=-1))


def get_data_scaler(centered: bool) -> Callable:
    """Maps [0, 1] to [-1, 1] if `centered`, else it is the identity."""
    return (lambda x: x * 2.0 - 1.0) if centered else (lambda x: x)


def get_data_inverse_scaler(centered: bool) -> Callable:
    """Maps [-1, 1] to [0, 1] if `centered`, else it is the identity."""
    return (lambda x: (x + 1.0) / 2.0) if centered else (lambda x: x)


def _uniform_noise(use: int, seed: int, index: np.ndarray, epoch: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Multiples of 2^-16, uniform in [0, 1), float32 [B, *shape]: pixel + noise is exact and below 256."""
    dim = math.prod(shape)
    bits = splitmix.random_bits(use, seed, index, epoch, -(-dim // 4)).view(np.uint16)[:, :dim]
    return (bits.astype(np.float32) * np.float32(2**-16)).reshape(-1, *shape)


def _to_unit(
    pixels: UInt8[np.ndarray, "B H W C"], noise: np.ndarray | None, levels: int
) -> Float[np.ndarray, "B H W C"]:
    """pixel / (levels - 1) in [0, 1] or, dequantised, (pixel + noise) / levels in [0, 1)."""
    if noise is None:
        return pixels.astype(np.float32) / np.float32(levels - 1)
    return (pixels + noise) / np.float32(levels)


def to_8_bits(x: Float[np.ndarray, "..."], levels: int, dequantized: bool) -> UInt8[np.ndarray, "..."]:
    """Images in [0, 1], as a model of dequantised or plain levels draws them, at the nearest level, as 0 .. 255."""
    level = np.clip(np.floor(x * levels) if dequantized else np.round(x * (levels - 1)), 0, levels - 1)
    return np.round(level * (255 / (levels - 1))).astype(np.uint8)


def train_loader(
    dataset: Dataset, data_config: Any, *, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """An endless stream of {'x': float32 [batch_size / process_count, ...], 'index': int64, as many}.

    Each epoch is a permutation of its own of the training split. The epochs follow one another without a gap and are
    cut into global batches of `batch_size`, so a batch may reach into the next epoch and no example is dropped. Process
    k gets the k-th contiguous part of each batch.

    Images are flipped left-right with probability 1/2 if `data.random_flip`, dequantised if
    `data.uniform_dequantization` and scaled to the range that `data.centered` says.

    Threads prefetch. `get_state()` is the number of batches given; after `set_state(state)` under the same batch_size
    and seed the stream goes on exactly there. UserError if process_count does not divide batch_size.
    """
    if batch_size % process_count:
        raise UserError(
            f"training.batch_size={batch_size} is not divisible by the {process_count} processes of the run"
        )
    count, local = len(dataset.train), batch_size // process_count
    scaler = get_data_scaler(data_config.centered)

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((_SHUFFLE, seed % 2**64, epoch)).permutation(count)

    def batch(number: int) -> dict[str, np.ndarray]:
        epoch, row = np.divmod(number * batch_size + process_index * local + np.arange(local), count)
        index = np.concatenate([order(int(e))[row[epoch == e]] for e in np.unique(epoch)])
        x = dataset.train[index]
        if dataset.is_image:
            if data_config.random_flip:
                flip = splitmix.random_bits(_FLIP, seed, index, epoch, 1)[:, 0] >> np.uint64(63) == 1
                x = np.where(flip[:, None, None, None], x[:, :, ::-1], x)
            dequantize = data_config.uniform_dequantization
            noise = _uniform_noise(_TRAIN_NOISE, seed, index, epoch, dataset.shape) if dequantize else None
            x = scaler(_to_unit(x, noise, dataset.levels))
        return {"x": x, "index": index}

    batches = grain.MapDataset.range(2**60).map(batch)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)))


def eval_batch(
    dataset: Dataset,
    data_config: Any,
    split: str,
    index: Int64[np.ndarray, "B"],
    *,
    seed: int,
    repeat: int = 0,
    dequantize: bool = True,
    scale: bool = True,
) -> Float[np.ndarray, "B *shape"]:
    """The examples `index` of `split` ('train' | 'test'), float32. Images are never flipped.

    dequantize: images get noise that is a function of (seed, index, repeat); otherwise they are
        pixel / (levels - 1).
    scale: images are scaled from [0, 1] to the range that `data.centered` says.
    """
    x = getattr(dataset, split)[index]
    if not dataset.is_image:
        return x
    noise = _uniform_noise(_EVAL_NOISE, seed, index, repeat, dataset.shape) if dequantize else None
    x = _to_unit(x, noise, dataset.levels)
    return get_data_scaler(data_config.centered)(x) if scale else x


def eval_batches(
    dataset: Dataset,
    data_config: Any,
    split: str,
    batch_size: int,
    *,
    limit: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    **options: Any,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields each example of a split once, in order: {'x': float32 [b, ...], 'index': int64 [b]}.

    Global batches hold `batch_size` examples, the last one what is left. Each process gets a contiguous part of each
    batch; the parts differ by one example at most, and some may be empty. limit > 0: the first `limit` examples only.
    options: of `eval_batch`.
    """
    length = len(getattr(dataset, split))
    count = min(limit or length, length)
    for start in range(0, count, batch_size):
        index = np.arange(start, min(start + batch_size, count))
        first, last = (len(index) * k // process_count for k in (process_index, process_index + 1))
        index = index[first:last]
        yield {"x": eval_batch(dataset, data_config, split, index, **options), "index": index}


def _points(make: Callable[[Any], synthetic.Points]) -> Callable[[Any], Dataset]:
    """The loader of the points that `make(config)` describes. Config keys of images have no effect on them."""

    def load(config: Any) -> Dataset:
        dim, n_uniforms, transform, log_prob, entropy, mixture, breaks = make(config)

        def source(use: int, length: int) -> _Lazy:
            def take(index: np.ndarray) -> np.ndarray:
                bits = splitmix.random_bits(use, 0, index, 0, n_uniforms)
                return transform(((bits >> np.uint64(11)) + 0.5) * 2.0**-53).astype(np.float32)

            return _Lazy(length, take)

        train, test = source(_SYNTHETIC_TRAIN, 2**20), source(_SYNTHETIC_TEST, 10_000)
        return Dataset(config.dataset, (dim,), False, train, test, log_prob, entropy, mixture, breaks)

    return load


def _images(config: Any, train: Any, test: Any, channels: int, levels: int = 256) -> Dataset:
    shape = config.image_size, config.image_size, channels
    return Dataset(config.dataset, shape, True, train, test, levels=levels)


def _require_size(config: Any, *sizes: int) -> None:
    if config.image_size not in sizes:
        known = " or ".join(map(str, sizes))
        raise UserError(f"data.image_size={config.image_size}: {config.dataset} comes at {known}; set it to that")


def _digits(config: Any) -> Dataset:
    """scikit-learn's 1,797 digits of 8x8 and 17 levels, in a fixed order: 1,500 train, 297 test."""
    from sklearn.datasets import load_digits

    _require_size(config, 8)
    pixels = load_digits().images.astype(np.uint8)[..., None]
    pixels = pixels[np.random.RandomState(0).permutation(len(pixels))]
    return _images(config, pixels[:1500], pixels[1500:], 1, levels=17)


def _idx_dataset(config: Any, default_dir: str = "") -> Dataset:
    """MNIST's files in `data.dir`: 28x28 as they are, 32x32 with a border of zeros, other sizes resized bilinearly."""
    folder, size = config.dir or default_dir, config.image_size
    splits = []
    for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"):
        paths = [Path(folder or "no folder", name + suffix).expanduser() for suffix in ("", ".gz")]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            hint = "; Debian: apt-get install dataset-fashion-mnist" if config.dataset == "FASHION_MNIST" else ""
            raise UserError(
                f"data.dataset={config.dataset!r} needs {name} or {name}.gz, not found in data.dir={folder!r}: "
                f"set data.dir to the folder with the train-images and t10k-images files{hint}"
            )
        pixels = idx.read(path)[..., None]
        if size == 32 and pixels.shape[1:3] == (28, 28):
            pixels = np.pad(pixels, ((0, 0), (2, 2), (2, 2), (0, 0)))
        elif pixels.shape[1:3] != (size, size):
            pixels = np.stack([images.fit(image, size=size, method="BILINEAR") for image in pixels])
        splits.append(pixels)
    return _images(config, splits[0], splits[1], 1)


def _lsun(config: Any) -> Dataset:
    """LSUN, resized bilinearly to 128 or bicubically to another size.

    At 128 Song et al. resize before they crop, so the outermost pixels differ from theirs.
    """
    if not config.category:
        raise UserError("data.category is empty: LSUN needs one, e.g. church_outdoor")
    method = "BILINEAR" if config.image_size == 128 else "BICUBIC"
    return _tfds(config, f"lsun/{config.category}", "dl.yf.io", method=method)


def _imagenet(config: Any) -> Dataset:
    """ImageNet at 32x32 or 64x64, in one of two copies.

    If `data.category` is empty it is `downsampled_imagenet`, which published bits/dim are of and which is no longer
    distributed. 'imagenet_resized' is the copy of Chrabaszcz et al. 2017, easier to compress and so not comparable.
    """
    name = config.category or "downsampled_imagenet"
    if name not in ("downsampled_imagenet", "imagenet_resized"):
        raise UserError(f"data.category={name!r} of ImageNet: use downsampled_imagenet (old) or imagenet_resized (new)")
    _require_size(config, 32, 64)
    if config.category == "imagenet_resized" and (splits := archives.imagenet(_folder(config), config.image_size)):
        return _images(config, *splits, 3)
    return _tfds(config, f"{name}/{config.image_size}x{config.image_size}", "image-net.org")


def _folder(config: Any) -> Path:
    """`data.dir`; of an empty one a folder that does not exist."""
    return Path(config.dir or "no folder").expanduser()


def _cifar10(config: Any) -> Dataset:
    """CIFAR-10 from its published archive in `data.dir`, else as tensorflow-datasets has it, in another order."""
    _require_size(config, 32)
    if splits := archives.cifar10(_folder(config)):
        return _images(config, *splits, 3)
    return _tfds(config, "cifar10", "www.cs.toronto.edu", test_split="test")


def _image_folder(config: Any) -> Dataset:
    """The image files below `data.dir`: central squares, resized bicubically (`sources.folder`)."""
    splits = folder.read(_folder(config), config.image_size, config.num_channels)
    train, test = (_Lazy(*split) for split in splits)
    return _images(config, train, test, config.num_channels)


def _patches(config: Any) -> Dataset:
    """Patches of the photographs in `data.dir` or, if it is empty, of the two in scikit-learn (`images.patches`).

    scikit-learn's give training patches at every quarter of a patch, a folder's patches that do not overlap.
    """
    size, channels = config.image_size, config.num_channels
    if config.dir:
        photographs, stride = images.photographs(_folder(config), channels), size
    else:
        from sklearn.datasets import load_sample_images

        embedded = map(Image.fromarray, load_sample_images().images)
        photographs, stride = [images.in_channels(image, channels) for image in embedded], size // 4 or 1
    train, test = images.patches(photographs, size, stride)
    if not len(train) or not len(test):
        raise UserError(f"data.image_size={size}: no photograph is large enough for patches of that size")
    return _images(config, train, test, channels)


def _tfds(config: Any, name: str, host: str, *sizes: int, test_split: str = "validation", **fit: Any) -> Dataset:
    """Images that tensorflow-datasets prepared, or downloads from `host` if there are none (`sources.tfds`).

    sizes: those that the images come at. fit: options of `images.fit`, which brings others to data.image_size.
    """
    if sizes:
        _require_size(config, *sizes)
    resize = functools.partial(images.fit, size=config.image_size, **fit) if fit else np.asarray
    builder = tfds.builder(config.dataset, name, config.dir, host)
    train, test = (_Lazy(*tfds.read_split(builder, name, config.image_size, resize)) for name in ("train", test_split))
    return _images(config, train, test, 3)


# A new data set is one function of the section `data` of the config (points: in `sources.synthetic`) and a line here.
_DATASETS: dict[str, Callable[[Any], Dataset]] = {
    "mog": _points(synthetic.mog),
    "checkerboard": _points(synthetic.checkerboard),
    "swissroll": _points(synthetic.swissroll),
    "DIGITS": _digits,
    "MNIST": _idx_dataset,
    "FASHION_MNIST": functools.partial(_idx_dataset, default_dir="/usr/share/datasets/fashion-mnist"),
    "CIFAR10": _cifar10,
    "SVHN": lambda config: _tfds(config, "svhn_cropped", "ufldl.stanford.edu", 32, test_split="test"),
    "CELEBA": lambda config: _tfds(config, "celeb_a", "drive.google.com", crop=140, method="BILINEAR"),
    "ImageNet": _imagenet,
    "IMAGE_FOLDER": _image_folder,
    "PATCHES": _patches,
    "LSUN": _lsun,
}
