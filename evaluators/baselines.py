# SPDX-License-Identifier: Apache-2.0
"""What bits/dim are worth: those of simple models and of image formats, on the same images."""

import io
import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image

import datasets

MOST = 50_000  # images of either split
WEBP_WIDTH = 16_383  # pixels, the most that the format takes


def baselines(dataset: datasets.Dataset, split: str, limit: int = 0) -> dict[str, float]:
    """Bits/dim of the first `limit` images of a split as whole numbers, by models that need no training.

    limit 0: all images. More than 50,000 are never taken. The result has four keys.
    `uniform`: log2 of the number of levels. `histogram`: each pixel by itself, its levels counted in the training
    split. `png` and `webp`: lossless files of all images side by side, so that their headers count once.
    """
    source = getattr(dataset, split)
    images = source[np.arange(min(len(source), limit or MOST, MOST))]
    return {
        "uniform": math.log2(dataset.levels),
        "histogram": histogram_bits(dataset.train, images, dataset.levels),
        "png": lossless_bits(images, "PNG", len(images) * images.shape[2], optimize=True),
        "webp": lossless_bits(images, "WEBP", WEBP_WIDTH, lossless=True),
    }


def histogram_bits(train: datasets.Source, images: UInt8[np.ndarray, "N H W C"], levels: int) -> float:
    """-log2 of (count + 1/2) / (N + levels / 2), the smoothed share of each pixel's level in N training images.

    The N are evenly spread over the split.
    """
    dim, total = math.prod(images.shape[1:]), min(len(train), MOST)
    index = np.linspace(0, len(train) - 1, total).astype(np.int64)
    counts = np.zeros(dim * levels, np.int64)
    first = levels * np.arange(dim)  # of the counts of each pixel
    for start in range(0, total, 1024):
        batch = train[index[start : start + 1024]].reshape(-1, dim)
        counts += np.bincount((batch + first).reshape(-1), minlength=dim * levels)
    share = (counts + 0.5) / (total + 0.5 * levels)
    return float(-np.mean(np.log2(share[images.reshape(-1, dim) + first])))


def lossless_bits(images: UInt8[np.ndarray, "N H W C"], file_format: str, most_width: int, **options) -> float:
    """Bits/dim of the images side by side in files of at most `most_width` pixels; options: of Pillow's `save`."""
    count = max(1, most_width // images.shape[2])
    size = 0
    for start in range(0, len(images), count):
        strip = np.concatenate(list(images[start : start + count]), axis=1)
        buffer = io.BytesIO()
        Image.fromarray(strip[..., 0] if strip.shape[-1] == 1 else strip).save(buffer, file_format, **options)
        size += buffer.tell()
    return 8 * size / images.size
