# SPDX-License-Identifier: Apache-2.0
"""Image files, and what is made of them: squares of one size, or patches of natural images."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# What Pillow raises for a file that is damaged, cut short, of an unknown format, or too large to be meant.
BROKEN = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
TEST_SHARE = 0.2  # of the width of a photograph, at its right


def files_of(folder: Path) -> list[Path]:
    """The image files below a folder, sorted. UserError if there is none."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        known = ", ".join(SUFFIXES)
        raise UserError(f"data.dir={str(folder)!r} has no image ({known}) in it or below; set it to a folder with some")
    return files


def decoded(path: Path, channels: int) -> Image.Image:
    """The image upright as its EXIF says, in colour or grey for 3 or 1 channels. An alpha channel is dropped."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB" if channels == 3 else "L")


def square(path: Path, size: int, channels: int) -> UInt8[np.ndarray, "S S C"]:
    """The largest central square of an image file, resized to `size` bicubically with antialiasing."""
    image = decoded(path, channels)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    resized = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(resized).reshape(size, size, channels)


def halved(photograph: UInt8[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "h w C"]:
    """The means of 2x2 pixels, rounded: without the blocks of JPEG and the interpolation of a camera's sensor."""
    height, width = (n // 2 * 2 for n in photograph.shape[:2])
    blocks = photograph[:height, :width].astype(np.float32).reshape(height // 2, 2, width // 2, 2, -1)
    return np.round(blocks.mean(axis=(1, 3))).astype(np.uint8)


def patches(
    photographs: list[UInt8[np.ndarray, "H W C"]], size: int, stride: int
) -> tuple[UInt8[np.ndarray, "N S S C"], UInt8[np.ndarray, "M S S C"]]:
    """Training and test patches of photographs, each averaged down by 2 first.

    The right fifth of a photograph gives test patches that do not overlap. The rest gives training patches at every
    `stride` pixels, except for a margin of `size` pixels, so no patch of one is next to one of the other.
    """
    train, test = [], []
    for photograph in map(halved, photographs):
        border = round((1 - TEST_SHARE) * photograph.shape[1])
        train.append(_windows(photograph[:, : max(0, border - size)], size, stride))
        test.append(_windows(photograph[:, border:], size, size))
    return np.concatenate(train), np.concatenate(test)


def _windows(image: np.ndarray, size: int, stride: int) -> np.ndarray:
    """[N, size, size, C]; none of an image that is too small."""
    if min(image.shape[:2]) < size:
        return np.empty((0, size, size, image.shape[2]), np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(image, (size, size), axis=(0, 1))[::stride, ::stride]
    return np.moveaxis(windows, 2, -1).reshape(-1, size, size, image.shape[2])
