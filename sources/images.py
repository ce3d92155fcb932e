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


def decoded(path: Path, channels: int) -> UInt8[np.ndarray, "H W C"]:
    """The image upright as its EXIF says, in grey or colour for 1 or 3 channels, without an alpha channel.

    Raises one of BROKEN if the file cannot be read.
    """
    with Image.open(path) as image:
        return in_channels(ImageOps.exif_transpose(image), channels)


def in_channels(image: Image.Image, channels: int) -> UInt8[np.ndarray, "H W C"]:
    """The pixels in grey or colour. UserError for another number of channels than 1 or 3."""
    if channels not in (1, 3):
        raise UserError(f"data.num_channels={channels}: image files are read with 1 or 3; set it to one of them")
    return np.asarray(image.convert("RGB" if channels == 3 else "L")).reshape(image.height, image.width, channels)


def photographs(folder: Path, channels: int) -> list[UInt8[np.ndarray, "H W C"]]:
    """All image files below a folder. UserError if there is none, or names the first that cannot be read."""
    found = []
    for path in files_of(folder):
        try:
            found.append(decoded(path, channels))
        except BROKEN as error:
            raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}); remove or mend it") from error
    return found


def fit(image: UInt8[np.ndarray, "H W C"], crop: int = 0, *, size: int, method: str) -> UInt8[np.ndarray, "S S C"]:
    """Crops the central crop x crop pixels (0: the largest square), resizes with antialiasing and rounds to 8 bits.

    method: 'BILINEAR' | 'BICUBIC' of Pillow, whose filters are those of tf.image.resize with antialiasing.
    """
    crop = crop or min(image.shape[:2])
    top, left = (image.shape[0] - crop) // 2, (image.shape[1] - crop) // 2
    image = image[top : top + crop, left : left + crop]
    # As floats: on 8 bits Pillow rounds and clips between the two axes, up to 5 levels off where bicubic overshoots.
    channels = [Image.fromarray(channel) for channel in np.moveaxis(image, -1, 0).astype(np.float32)]
    resized = [np.asarray(channel.resize((size, size), Image.Resampling[method])) for channel in channels]
    return np.clip(np.round(np.stack(resized, axis=-1)), 0, 255).astype(np.uint8)


def square(path: Path, size: int, channels: int) -> UInt8[np.ndarray, "S S C"]:
    """The largest central square of an image file, resized to `size` bicubically with antialiasing."""
    return fit(decoded(path, channels), size=size, method="BICUBIC")


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
