# SPDX-License-Identifier: Apache-2.0
"""The files of MNIST and its relatives."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from errors import UserError

MAX_BYTES = 2**31  # of a file's images, held in memory; EMNIST, the largest, has 0.6e9


def read(path: Path) -> UInt8[np.ndarray, "N H W"]:
    """The images of an idx3 file of unsigned bytes, gzipped if its name ends in .gz. UserError if it is not one.

    Holds no more bytes than the file's header announces, whatever a gzipped file expands to.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(16)
            if len(header) < 16 or header[:4] != b"\x00\x00\x08\x03":
                raise UserError(f"{path} does not start with the header of an idx3-ubyte image file; fetch it again")
            shape = struct.unpack(">3I", header[4:])
            expected = math.prod(shape)
            if expected > MAX_BYTES:
                raise UserError(
                    f"{path} has {expected} bytes of images by its header, above {MAX_BYTES}; fetch it again"
                )
            data = file.read(expected + 1)  # at the byte too many gzip checks its sum
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}); fetch it again") from error
    if len(data) > expected:
        raise UserError(f"{path} has more than the {16 + expected} bytes of its header; fetch it again")
    if len(data) < expected:
        found = f"{16 + len(data)} bytes, not the {16 + expected} of its header"
        raise UserError(f"{path} has {found}: truncated; fetch it again")
    return np.frombuffer(data, np.uint8).reshape(shape)
