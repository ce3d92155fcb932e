# SPDX-License-Identifier: Apache-2.0
"""Random bits as a hash of what they are for: SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
number generators", figure 19)."""

from typing import Any

import numpy as np
from jaxtyping import Int64, UInt64

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def mix(z: np.ndarray) -> np.ndarray:
    """Applies SplitMix64's bijection to each uint64, in place."""
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def random_bits(use: int, seed: int, index: Int64[np.ndarray, "B"], epoch: Any, n: int) -> UInt64[np.ndarray, "B n"]:
    """n words of 64 random bits for each example, a function of (use, seed, index, epoch). epoch: an int or [B]."""
    state = np.zeros(1, np.uint64)
    for value in (use, seed % 2**64, index, epoch):
        # Mixing after each value keeps examples and epochs off one another's arithmetic progression of counters.
        state = mix((state + np.asarray(value).astype(np.uint64) + np.uint64(1)) * GOLDEN_GAMMA)
    return mix(state[:, None] + np.arange(1, n + 1, dtype=np.uint64) * GOLDEN_GAMMA)
