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


def read(path: Path) -> UInt8[np.ndarray, "N H W"]:
    """The images of an idx3 file of unsigned bytes, gzipped if its name ends in .gz. UserError if it is not one."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}); fetch it again") from error
    if len(data) < 16 or data[:4] != b"\x00\x00\x08\x03":
        raise UserError(f"{path} does not start with the header of an idx3-ubyte image file; fetch it again")
    shape = struct.unpack(">3I", data[4:16])
    expected = 16 + math.prod(shape)
    if len(data) != expected:
        raise UserError(f"{path} has {len(data)} bytes, not the {expected} of its header: truncated; fetch it again")
    return np.frombuffer(data, np.uint8, offset=16).reshape(shape)
