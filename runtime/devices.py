# SPDX-License-Identifier: Apache-2.0
"""Arrays between the host and the devices of a pmap, and the memory of a device."""

import hashlib
import math

import jax
import numpy as np


def all_devices() -> list:
    """The devices of all hosts, those of host 0 first: host k's part of a batch is the k-th contiguous part."""
    return sorted(jax.devices(), key=lambda device: (device.process_index, device.id))


def replicate(tree, devices: list | None = None):
    """Copies the arrays to each device of this host, on a new leading axis, for a pmap over `devices` (default: all).

    The pmapped identity puts them where pmap's own results lie; else the first step would be compiled twice.
    """
    copies = jax.tree.map(lambda x: np.stack([x] * jax.local_device_count()), tree)
    p_identity = jax.pmap(lambda x: x, devices=devices or all_devices())
    return p_identity(copies) if jax.tree.leaves(copies) else copies


def first(tree):
    """The first device's copy of replicated arrays, as numpy."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0))[0], tree)


def on_this_host(x: jax.Array) -> np.ndarray:
    """This host's part [local devices * b, ...] of a pmap's result [devices, b, ...]."""
    shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data).reshape(-1, *x.shape[2:]) for shard in shards])


def shard(x: np.ndarray) -> np.ndarray:
    """Splits this host's batch [B, ...] over its devices: [local devices, B / local devices, ...]."""
    return x.reshape(jax.local_device_count(), -1, *x.shape[1:])


def memory_limit(gib: float) -> float:
    """Bytes of a device for programs: `gib` GiB, or for 0 what the back end tells, infinity if it does not."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return gib * 2**30 if gib else stats.get("bytes_limit", math.inf)


def digest(tree) -> str:
    """12 hexadecimal digits that tell two trees of arrays apart."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(tree)):
        array = np.ascontiguousarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()[:12]
