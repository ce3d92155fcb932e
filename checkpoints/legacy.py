# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files of the public code (flax 0.3 msgpack, Adam), read without trust and written back.

The layout, with parameters under the same names as ours:

    step, lr, ema_rate, rng [2], model_state, params_ema,
    optimizer: {target: params, state: {step, param_states: {<parameter>: {grad_ema, grad_sq_ema}}}}

GroupNorm's scale and bias are [1, 1, 1, C] there and [C] here. A file is msgpack maps all the way down; an array is an
extension that holds (shape, dtype's name, bytes). One above a gigabyte is a map of flat chunks.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import msgpack
import numpy as np
import optax

from errors import UserError

# What a file may hold at most; the largest public network has some 700 parameters, 150 names in a map, 5 levels.
_MAX_DEPTH, _MAX_IN_MAP, _MAX_ENTRIES, _MAX_NAME = 16, 1024, 100_000, 256
_DTYPES = {np.dtype(code).name: np.dtype(code) for code in "?bhilBHILefd"}
_ARRAY, _SCALAR = 1, 3  # flax's extension codes
_CHUNKED = "__msgpack_chunked_array__"
_MOMENTS = "grad_ema", "grad_sq_ema"

Leaves = dict[tuple[str, ...], np.ndarray]


def load_legacy(path: str | Path) -> dict[str, Any]:
    """Reads a file `checkpoint_N` of the public code.

    Memory stays within twice the largest array above the file's size, whatever the file says of itself.

    Returns:
        The fields of a `TrainState` as nested dicts of numpy arrays, but for `opt_state`, which is
        {"count", "mu", "nu"}; `lr` and `ema_rate` too. `checkpoints.into` makes a `TrainState` of it.
    Raises:
        UserError: the file is missing, not whole or not of this layout; the first difference is named.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist or is not a file")
    try:
        return _train_state(_read(path))
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    except msgpack.OutOfData as error:
        raise UserError(f"checkpoint {path} is cut off: its {path.stat().st_size} bytes end too early") from error
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError, msgpack.UnpackException) as error:
        reason = " ".join(str(error).split())[:300] or f"msgpack: {type(error).__name__}"
        raise UserError(f"checkpoint {path} is not a checkpoint of the public code: {reason}") from error


def _read(path: Path) -> Any:
    """The file's tree with numpy arrays; ValueError or msgpack's errors where it is malformed."""
    size = path.stat().st_size
    if size == 0:
        raise ValueError("it is empty")
    entries = 0

    def on_map(node: dict[str, Any]) -> Any:
        nonlocal entries
        entries += len(node)
        if entries > _MAX_ENTRIES:
            raise ValueError(f"it holds more than {_MAX_ENTRIES} entries")
        return _joined(node) if _CHUNKED in node else node

    with path.open("rb") as file:
        # No lists: flax writes sequences as maps, and a nest of long lists, each empty so far, would fill the memory.
        limits = {"max_array_len": 0, "max_map_len": _MAX_IN_MAP, "max_str_len": _MAX_NAME, "max_bin_len": 0}
        sizes = {"read_size": min(size, 2**20), "max_buffer_size": size, "max_ext_len": size}
        unpacker = msgpack.Unpacker(file, ext_hook=_array, object_hook=on_map, **limits, **sizes)
        tree = unpacker.unpack()
        if isinstance(tree, dict) and unpacker.tell() != size:
            raise ValueError(f"{size - unpacker.tell()} bytes follow its end")
    return tree


def _array(code: int, data: bytes) -> np.ndarray:
    """A flax extension as an array, after every claim that it makes has been checked against its length."""
    if code not in (_ARRAY, _SCALAR):
        raise ValueError(f"it has a msgpack extension {code}; an array is {_ARRAY}")
    parts: Any = msgpack.unpackb(data, use_list=False, max_str_len=16, max_map_len=0, max_array_len=32, max_ext_len=0)
    if not isinstance(parts, tuple) or len(parts) != 3:
        raise ValueError("it has an array that is not (shape, dtype, bytes)")
    shape, name, buffer = parts
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"it has an array of shape {shape!r}")
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"it has an array of dtype {name!r}")
    dtype = _DTYPES[name]
    if not isinstance(buffer, bytes) or len(buffer) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"it has an array of shape {shape}, {name}, whose bytes are not of that length")
    return np.frombuffer(buffer, dtype).reshape(shape)


def _joined(node: dict[str, Any]) -> np.ndarray:
    """An array that flax cut into flat chunks."""
    shape, chunks = node.get("shape"), node.get("chunks")
    if not isinstance(shape, dict) or not isinstance(chunks, dict) or not chunks:
        raise ValueError("it has a chunked array without shape or chunks")
    sizes: list[Any] = [shape.get(str(i)) for i in range(len(shape))]
    parts: list[Any] = [chunks.get(str(i)) for i in range(len(chunks))]
    if not all(isinstance(part, np.ndarray) and part.ndim == 1 and part.dtype == parts[0].dtype for part in parts):
        raise ValueError("it has a chunked array whose chunks do not fit together")
    if not all(type(n) is int and n >= 0 for n in sizes) or math.prod(sizes) != sum(part.size for part in parts):
        raise ValueError(f"it has a chunked array whose chunks do not fill its shape {sizes}")
    return np.concatenate(parts).reshape(sizes)


def _train_state(tree: Any) -> dict[str, Any]:
    _check_names(tree, "", ("step", "optimizer", "lr", "model_state", "ema_rate", "params_ema", "rng"))
    _check_names(tree["optimizer"], "optimizer/", ("target", "state"))
    state = tree["optimizer"]["state"]
    _check_names(state, "optimizer/state/", ("step", "param_states"))
    params = _parameters(tree["optimizer"]["target"], "optimizer/target")
    ema_params = _parameters(tree["params_ema"], "params_ema")
    moments = _parameters(state["param_states"], "optimizer/state/param_states")
    if not params:
        raise ValueError("optimizer/target holds no parameters")
    _check_same(params, ema_params, "params_ema")
    _check_same(_with_moments(params, params), moments, "optimizer/state/param_states")
    mu, nu = ({name: moments[*name, moment] for name in params} for moment in _MOMENTS)
    rng = tree["rng"]
    if not isinstance(rng, np.ndarray) or rng.dtype != np.uint32 or rng.shape != (2,):
        raise ValueError("rng is not uint32 [2]")
    nested = flax.traverse_util.unflatten_dict
    count = _number(state["step"], "optimizer/state/step", np.int32)
    return {
        "step": _number(tree["step"], "step", np.int32),
        "params": nested(params),
        "ema_params": nested(ema_params),
        "opt_state": {"count": count, "mu": nested(mu), "nu": nested(nu)},
        "model_state": nested(dict(_leaves(tree["model_state"], "model_state"))),
        "key": rng,
        "lr": _number(tree["lr"], "lr", np.float32),
        "ema_rate": _number(tree["ema_rate"], "ema_rate", np.float32),
    }


def _check_names(node: Any, where: str, names: tuple[str, ...]) -> None:
    if not isinstance(node, dict):
        raise ValueError(f"{where or 'it '}is {type(node).__name__}, not a map")
    for name in names:
        if name not in node:
            raise ValueError(f"it lacks {where}{name}")
    for name in node:
        if name not in names:
            raise ValueError(f"it has {where}{name}, which the public code's lacks")


def _check_same(params: Leaves, others: Leaves, where: str) -> None:
    for name in [*params, *others]:
        joined = "/".join((where, *name))
        if name not in others:
            raise ValueError(f"it lacks {joined}")
        if name not in params:
            raise ValueError(f"it has {joined}, which is no parameter in optimizer/target")
        shape, wanted = others[name].shape, params[name].shape
        if shape != wanted:
            raise ValueError(f"it has {joined} of shape {shape}; in optimizer/target it has {wanted}")


def _leaves(node: Any, where: str, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """(names, array) of every leaf."""
    if isinstance(node, np.ndarray) and path:
        yield path, node
        return
    if not isinstance(node, dict):
        raise ValueError(f"{'/'.join((where, *path))} is {type(node).__name__}, not {'an array' if path else 'a map'}")
    if len(path) == _MAX_DEPTH:
        raise ValueError(f"{where} is nested more than {_MAX_DEPTH} deep")
    for name, child in node.items():
        if not isinstance(name, str) or not name.isprintable() or "/" in name:
            raise ValueError(f"{where} has the name {name!r}")
        yield from _leaves(child, where, (*path, name))


def _parameters(node: Any, where: str) -> Leaves:
    """The leaves, all floating, GroupNorm's as [C]."""
    leaves = dict(_leaves(node, where))
    for name, value in leaves.items():
        if value.dtype.kind != "f":
            raise ValueError(f"{where}/{'/'.join(name)} is {value.dtype}, not floating")
        if _of_group_norm(name) and value.shape[:-1] == (1, 1, 1):
            leaves[name] = value.reshape(-1)
    return leaves


def _with_moments(mu: Leaves, nu: Leaves) -> Leaves:
    return {(*name, moment): tree[name] for name in mu for moment, tree in zip(_MOMENTS, (mu, nu), strict=True)}


def _of_group_norm(name: tuple[str, ...]) -> bool:
    """Of a parameter's names, or of those of its Adam moments."""
    *parents, leaf = [part for part in name if part not in _MOMENTS]
    return leaf in ("scale", "bias") and bool(parents) and parents[-1].startswith("GroupNorm_")


def _number(value: Any, name: str, dtype: type) -> np.ndarray:
    """A python number or an array [] as an array [] of `dtype`; integers below zero or above its range are refused."""
    array = np.asarray(value if isinstance(value, int | float | np.ndarray) else ())
    integer = dtype is np.int32
    if array.shape != () or array.dtype.kind not in ("iu" if integer else "fiu"):
        raise ValueError(f"{name} is not {'an integer' if integer else 'a number'}")
    if integer and not 0 <= int(array) < 2**31:
        raise ValueError(f"{name} is {int(array)}")
    return array.astype(dtype)


def in_structure_of(target: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `load_legacy` for a `TrainState`: Adam's moments and count where `target.opt_state` has them.

    The count also goes to the learning rate's schedule, whose warm-up the public code counts by the same steps.
    """
    adam = state["opt_state"]

    def filled(node):
        if isinstance(node, optax.ScaleByAdamState):
            return node._replace(**adam)
        return node._replace(count=adam["count"]) if isinstance(node, optax.ScaleByScheduleState) else node

    stateful = (optax.ScaleByAdamState, optax.ScaleByScheduleState)
    opt_state = jax.tree.map(filled, target.opt_state, is_leaf=lambda node: isinstance(node, stateful))
    fields = ("step", "params", "ema_params", "model_state", "key")
    return {**{name: state[name] for name in fields}, "opt_state": opt_state}


def export_legacy(state: Mapping[str, Any], path: str | Path, lr: float, ema_rate: float) -> None:
    """Writes the state of `load_legacy` or of one of our checkpoints (nested dicts) as the public code would.

    Raises:
        UserError: the state has no Adam moments, or the file cannot be written.
    """
    adam = _find_adam(state["opt_state"])
    if adam is None:
        raise UserError(f"{path}: the checkpoint has no Adam moments, which the public code's layout wants")
    trees = state["params"], state["ema_params"], adam["mu"], adam["nu"]
    params, ema_params, mu, nu = (_old_shapes(tree) for tree in trees)
    nested = flax.traverse_util.unflatten_dict
    adam_state = {"step": np.asarray(adam["count"], np.int32), "param_states": nested(_with_moments(mu, nu))}
    tree = {
        "step": np.asarray(state["step"], np.int32),
        "optimizer": {"target": nested(params), "state": adam_state},
        "lr": np.asarray(lr, np.float32),
        "model_state": dict(state.get("model_state") or {}),
        "ema_rate": np.asarray(ema_rate, np.float32),
        "params_ema": nested(ema_params),
        "rng": np.asarray(state["key"], np.uint32),
    }
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(flax.serialization.msgpack_serialize(tree, in_place=True))
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def _find_adam(node: Any) -> Mapping[str, Any] | None:
    """The first map {count, mu, nu} in nested dicts."""
    if not isinstance(node, Mapping) or {"count", "mu", "nu"} <= node.keys():
        return node if isinstance(node, Mapping) else None
    return next(filter(None, map(_find_adam, node.values())), None)


def _old_shapes(tree: Mapping[str, Any]) -> Leaves:
    """Sorted by name; GroupNorm's leaves as [1, 1, 1, C]."""
    leaves = {name: np.asarray(value) for name, value in sorted(flax.traverse_util.flatten_dict(tree).items())}
    return {name: value.reshape(1, 1, 1, -1) if _of_group_norm(name) else value for name, value in leaves.items()}
