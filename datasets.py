# SPDX-License-Identifier: Apache-2.0
"""Every data source, its scaling and dequantisation; the only reader of data.

`load` gives a `Dataset`, `train_loader` an endless shuffled stream of its training split, `eval_batches` one pass over
a split. A flip, a noise value or a synthetic example is a hash of the seed, the example's index and the epoch, so
neither the batch size, nor the number of hosts, nor a resume changes it.

Sources. Hash: SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 19).
Points: `synthetic`. Image sets: the splits and crops of Song et al. 2021, but rounded to 8 bits after resizing, because
bits/dim are about 8-bit images.
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
from jaxtyping import Float, Int64, UInt8, UInt64

from errors import UserError
from sources import idx, synthetic, tfds


@runtime_checkable
class Source(Protocol):
    """Random access: an int gives one example, an int64 array [B] gives B stacked ones. An ndarray [N, ...] is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Examples are uint8 [H, W, C] if `is_image`, else float32 [D]; log_prob [N, D] -> [N] and entropy are in nats.

    mixture: (weights [M], means [M, 1], variances [M, 1]) of data from M Gaussians, the same in every coordinate.
    breaks: where the density jumps, rising, the same in every coordinate.
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

    def digest(self, split: str, most: int = 10_000) -> str:
        """Of the number of examples in a split and of up to `most` of them, evenly spread."""
        source = {"train": self.train, "test": self.test}[split]
        sha = hashlib.sha256(str(len(source)).encode())
        index = np.unique(np.linspace(0, len(source) - 1, most).astype(np.int64))
        for start in range(0, len(index), 1024):
            sha.update(np.ascontiguousarray(source[index[start : start + 1024]]).tobytes())
        return sha.hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class _Lazy:
    """A source whose examples `take(index [B]) -> [B, ...]` makes or reads when they are asked for."""

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
    """The data set `data.dataset`. UserError: unknown name, missing or broken files, a size it does not have."""
    name = data_config.dataset
    if name not in _DATASETS:
        raise UserError(f"data.dataset={name!r} is not known; use one of {', '.join(sorted(_DATASETS))}")
    dataset = _DATASETS[name](data_config)
    if dataset.is_image and (dataset.shape[-1], data_config.num_channels) == (1, 3):
        return _gray_as_rgb(dataset)
    if dataset.is_image and dataset.shape[-1] != data_config.num_channels:
        raise UserError(f"data.num_channels={data_config.num_channels}: {name} has {dataset.shape[-1]}; set it to that")
    return dataset


def _gray_as_rgb(dataset: Dataset) -> Dataset:
    """The one channel three times, for a network of colour images."""

    def repeated(source: Source) -> Source:
        return _Lazy(len(source), lambda index: np.repeat(source[index], 3, axis=-1))

    shape = (*dataset.shape[:2], 3)
    return dataclasses.replace(dataset, shape=shape, train=repeated(dataset.train), test=repeated(dataset.test))


def get_data_scaler(centered: bool) -> Callable:
    """[0, 1] -> [-1, 1] if centered, else the identity."""
    return (lambda x: x * 2.0 - 1.0) if centered else (lambda x: x)


def get_data_inverse_scaler(centered: bool) -> Callable:
    """[-1, 1] -> [0, 1] if centered, else the identity."""
    return (lambda x: (x + 1.0) / 2.0) if centered else (lambda x: x)


# Randomness. One number for each use, so that no two uses share bits.
_SHUFFLE, _FLIP, _TRAIN_NOISE, _EVAL_NOISE, _SYNTHETIC_TRAIN, _SYNTHETIC_TEST = range(1, 7)
_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's bijection of uint64, elementwise and in place."""
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def _random_bits(use: int, seed: int, index: Int64[np.ndarray, "B"], epoch: Any, n: int) -> UInt64[np.ndarray, "B n"]:
    """n words of 64 random bits for each example, a function of (use, seed, index, epoch); epoch: int or [B]."""
    state = np.zeros(1, np.uint64)
    for value in (use, seed % 2**64, index, epoch):
        # Mixing after each value keeps examples and epochs off one another's arithmetic progression of counters.
        state = _mix((state + np.asarray(value).astype(np.uint64) + np.uint64(1)) * _GOLDEN_GAMMA)
    return _mix(state[:, None] + np.arange(1, n + 1, dtype=np.uint64) * _GOLDEN_GAMMA)


def _uniform_noise(use: int, seed: int, index: np.ndarray, epoch: Any, shape: tuple[int, ...]) -> np.ndarray:
    """float32 [B, *shape] uniform on the multiples of 2^-16 in [0, 1): pixel + noise is then exact and below 256."""
    dim = math.prod(shape)
    bits = _random_bits(use, seed, index, epoch, -(-dim // 4)).view(np.uint16)[:, :dim]
    return (bits.astype(np.float32) * np.float32(2**-16)).reshape(-1, *shape)


def _to_unit(pixels: UInt8[np.ndarray, "B H W C"], noise: np.ndarray | None) -> Float[np.ndarray, "B H W C"]:
    """x = pixel / 255 or, dequantised, (255 x + u) / 256: [0, 1] or [0, 1)."""
    if noise is None:
        return pixels.astype(np.float32) / np.float32(255)
    return (pixels + noise) / np.float32(256)


def train_loader(
    dataset: Dataset, data_config: Any, *, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Endless {'x': float32 [batch_size / process_count, ...], 'index': int64 [batch_size / process_count]}.

    Epochs, each its own permutation of the training split, follow one another without a gap and are cut into global
    batches of `batch_size`; process k gets the k-th contiguous part of each. No example is dropped: a batch may reach
    into the next epoch. x is scaled as `data.centered` says (images only), flipped left-right with probability 1/2 if
    `data.random_flip`, dequantised if `data.uniform_dequantization`. Threads prefetch; `get_state()` (JSON-able: the
    number of batches given) and `set_state(state)` resume exactly, under the same batch_size and seed.
    UserError if process_count does not divide batch_size.
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
                flip = _random_bits(_FLIP, seed, index, epoch, 1)[:, 0] >> np.uint64(63) == 1
                x = np.where(flip[:, None, None, None], x[:, :, ::-1], x)
            dequantize = data_config.uniform_dequantization
            noise = _uniform_noise(_TRAIN_NOISE, seed, index, epoch, dataset.shape) if dequantize else None
            x = scaler(_to_unit(x, noise))
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
    """The examples `index` of `split` ('train' | 'test'), float32.

    Images are never flipped. If `dequantize` they get noise that is a function of (seed, index, repeat), else they are
    pixel / 255. If `scale` they go from [0, 1] to the range that `data.centered` says.
    """
    x = {"train": dataset.train, "test": dataset.test}[split][index]
    if not dataset.is_image:
        return x
    noise = _uniform_noise(_EVAL_NOISE, seed, index, repeat, dataset.shape) if dequantize else None
    x = _to_unit(x, noise)
    return get_data_scaler(data_config.centered)(x) if scale else x


def eval_batches(
    dataset: Dataset,
    data_config: Any,
    split: str,
    batch_size: int,
    *,
    seed: int,
    repeat: int = 0,
    dequantize: bool = True,
    limit: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Each example of `split` ('train' | 'test') once, in order: {'x': float32 [b, ...], 'index': int64 [b]}.

    Global batches hold `batch_size` examples, the last one what is left; limit > 0: of the first `limit` examples. Each
    process gets a contiguous part of each, the parts as equal as can be (fewer examples than processes: some empty).
    See `eval_batch` for what is done to an example.
    """
    length = len({"train": dataset.train, "test": dataset.test}[split])
    count = min(limit, length) if limit > 0 else length
    for start in range(0, count, batch_size):
        index = np.arange(start, min(start + batch_size, count))
        first, last = (len(index) * k // process_count for k in (process_index, process_index + 1))
        index = index[first:last]
        x = eval_batch(dataset, data_config, split, index, seed=seed, repeat=repeat, dequantize=dequantize)
        yield {"x": x, "index": index}


# Synthetic data: example i is a function of (split, i) alone. Their config keys of images have no effect.
_SYNTHETIC_SEED, _SYNTHETIC_LENGTHS = 0, {_SYNTHETIC_TRAIN: 2**20, _SYNTHETIC_TEST: 10_000}


def _points(make: Callable[[Any], synthetic.Points]) -> Callable[[Any], Dataset]:
    """The loader of what `make(config)` describes."""

    def load(config: Any) -> Dataset:
        dim, n_uniforms, transform, log_prob, entropy, mixture, breaks = make(config)

        def source(use: int) -> _Lazy:
            def take(index: np.ndarray) -> np.ndarray:
                bits = _random_bits(use, _SYNTHETIC_SEED, index, 0, n_uniforms)
                return transform(((bits >> np.uint64(11)) + 0.5) * 2.0**-53).astype(np.float32)

            return _Lazy(_SYNTHETIC_LENGTHS[use], take)

        train, test = source(_SYNTHETIC_TRAIN), source(_SYNTHETIC_TEST)
        return Dataset(config.dataset, (dim,), False, train, test, log_prob, entropy, mixture, breaks)

    return load


# Images.
def _images(config: Any, train: Source, test: Source, channels: int) -> Dataset:
    return Dataset(config.dataset, (config.image_size, config.image_size, channels), True, train, test)


def _require_size(config: Any, *sizes: int) -> None:
    if config.image_size not in sizes:
        known = " or ".join(map(str, sizes))
        raise UserError(f"data.image_size={config.image_size}: {config.dataset} comes at {known}; set it to that")


def _fit(image: UInt8[np.ndarray, "H W C"], crop: int = 0, *, size: int, method: str) -> UInt8[np.ndarray, "S S C"]:
    """The central crop x crop pixels (0: the largest central square), resized with antialiasing and rounded to 8 bits.

    method: 'BILINEAR' | 'BICUBIC' of Pillow, which are the antialiased filters of tf.image.resize.
    """
    from PIL import Image

    crop = crop or min(image.shape[:2])
    top, left = (image.shape[0] - crop) // 2, (image.shape[1] - crop) // 2
    image = image[top : top + crop, left : left + crop]
    # As floats: on 8 bits Pillow rounds and clips between the two axes, up to 5 levels off where bicubic overshoots.
    channels = [Image.fromarray(channel) for channel in np.moveaxis(image, -1, 0).astype(np.float32)]
    resized = [np.asarray(channel.resize((size, size), Image.Resampling[method])) for channel in channels]
    return np.clip(np.round(np.stack(resized, axis=-1)), 0, 255).astype(np.uint8)


def _digits(config: Any) -> Dataset:
    """scikit-learn's 1,797 8x8 digits, 0..16 stretched to 0..255; 1,500 of a fixed permutation train, 297 test."""
    from sklearn.datasets import load_digits

    _require_size(config, 8)
    images = np.round(load_digits().images * 255 / 16).astype(np.uint8)[..., None]
    images = images[np.random.RandomState(0).permutation(len(images))]
    return _images(config, images[:1500], images[1500:], 1)


def _idx_dataset(config: Any, default_dir: str) -> Dataset:
    """MNIST's files in `data.dir`. 28x28 as it is, 32x32 with a border of zeros, any other size resized bilinearly."""
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
        images = idx.read(path)[..., None]
        if size == 32 and images.shape[1:3] == (28, 28):
            images = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
        elif images.shape[1:3] != (size, size):
            images = np.stack([_fit(image, size=size, method="BILINEAR") for image in images])
        splits.append(images)
    return _images(config, splits[0], splits[1], 1)


def _celeba(config: Any) -> Dataset:
    """The central 140x140 pixels, resized bilinearly; the validation split is the test."""
    fit = functools.partial(_fit, crop=140, size=config.image_size, method="BILINEAR")
    return _tfds(config, "celeb_a", "validation", "drive.google.com", fit)


def _lsun(config: Any) -> Dataset:
    """The largest central square, resized bilinearly to 128 or bicubically to another size; validation is the test.

    As Song et al., except that at 128 they resize before they crop, which differs in the outermost pixels.
    """
    if not config.category:
        raise UserError("data.category is empty: LSUN needs one, e.g. church_outdoor")
    fit = functools.partial(_fit, size=config.image_size, method="BILINEAR" if config.image_size == 128 else "BICUBIC")
    return _tfds(config, f"lsun/{config.category}", "validation", "dl.yf.io", fit)


def _imagenet(config: Any) -> Dataset:
    """ImageNet at 32x32 or 64x64; the validation split is the test.

    `data.category` empty: `downsampled_imagenet`, the copy of the published bits/dim, no longer distributed.
    'imagenet_resized': the copy of Chrabaszcz et al. 2017, easier to compress and not comparable.
    """
    _require_size(config, 32, 64)
    name = config.category or "downsampled_imagenet"
    if name not in ("downsampled_imagenet", "imagenet_resized"):
        raise UserError(f"data.category={name!r} of ImageNet: use downsampled_imagenet (old) or imagenet_resized (new)")
    return _tfds(config, f"{name}/{config.image_size}x{config.image_size}", "validation", "image-net.org")


def _tfds_32(config: Any, name: str, host: str) -> Dataset:
    _require_size(config, 32)
    return _tfds(config, name, "test", host)


def _tfds(config: Any, name: str, test_split: str, host: str, fit: Callable = lambda image: image) -> Dataset:
    """What tensorflow-datasets prepared in data.dir, $TFDS_DATA_DIR or ~/tensorflow_datasets, else downloads there.

    fit: uint8 [H, W, 3] -> image_size.
    """
    builder = tfds.builder(config.dataset, name, config.dir, host)
    train, test = (_Lazy(*tfds.read_split(builder, name, config.image_size, fit)) for name in ("train", test_split))
    return _images(config, train, test, 3)


# A new data set: one function of the section `data` of the config (points: in `synthetic`), and its line here.
_DATASETS: dict[str, Callable[[Any], Dataset]] = {
    "mog": _points(synthetic.mog),
    "checkerboard": _points(synthetic.checkerboard),
    "swissroll": _points(synthetic.swissroll),
    "DIGITS": _digits,
    "MNIST": functools.partial(_idx_dataset, default_dir=""),
    "FASHION_MNIST": functools.partial(_idx_dataset, default_dir="/usr/share/datasets/fashion-mnist"),
    "CIFAR10": functools.partial(_tfds_32, name="cifar10", host="www.cs.toronto.edu"),
    "SVHN": functools.partial(_tfds_32, name="svhn_cropped", host="ufldl.stanford.edu"),
    "CELEBA": _celeba,
    "ImageNet": _imagenet,
    "LSUN": _lsun,
}
