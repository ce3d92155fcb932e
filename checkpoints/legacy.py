# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files of the public code (flax 0.3 msgpack, Adam): read without trust, and written.

The layout has parameters under the same names as ours:

    step, lr, ema_rate, rng [2], model_state, params_ema,
    optimizer: {target: params, state: {step, param_states: {<parameter>: {grad_ema, grad_sq_ema}}}}

GroupNorm's scale and bias are [1, 1, 1, C] there and [C] here. A file is nested msgpack maps. An array is an extension
that holds (shape, dtype's name, bytes), or above a gigabyte a map of flat chunks.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import msgpack
import numpy as np

from errors import UserError

# Limits of a file. The largest public network has some 700 parameters, 150 names in a map, 8 levels.
_MAX_DEPTH, _MAX_IN_MAP, _MAX_ENTRIES, _MAX_NAME = 16, 1024, 100_000, 256
_DTYPES = {np.dtype(code).name: np.dtype(code) for code in "?bhilBHILefd"}
_ARRAY, _SCALAR = 1, 3  # flax's extension codes
_CHUNKED = "__msgpack_chunked_array__"
# Where a file has a parameter, its EMA and its moments: the names before and after the parameter's own.
_PLACES = {
    "params": (("optimizer", "target"), ()),
    "ema_params": (("params_ema",), ()),
    "mu": (("optimizer", "state", "param_states"), ("grad_ema",)),
    "nu": (("optimizer", "state", "param_states"), ("grad_sq_ema",)),
}

Names = tuple[str, ...]


def load_legacy(path: str | Path) -> dict[str, Any]:
    """Reads a file `checkpoint_N` of the public code.

    The memory it takes is at most the file's size and twice its largest array, whatever the file claims.

    Returns:
        The fields of a `TrainState` as nested dicts of numpy arrays, but for `opt_state`, which is
        {"count", "mu", "nu"}; also `lr` and `ema_rate`. `checkpoints.into` makes a `TrainState` of it.
    Raises:
        UserError: the file is missing, not whole or not of this layout. The message names the first difference.
    """
    path = Path(path)
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
    """The file's tree, read within limits, which flax's reader lacks. Raises ValueError or msgpack's errors."""
    size, entries = path.stat().st_size, 0
    if size == 0:
        raise ValueError("it is empty")

    def on_map(node: dict[str, Any]) -> Any:
        nonlocal entries
        entries += len(node)
        if entries > _MAX_ENTRIES:
            raise ValueError(f"it holds more than {_MAX_ENTRIES} entries")
        return _joined(node) if _CHUNKED in node else node

    with path.open("rb") as file:
        # No lists: flax writes sequences as maps, and a nest of lists would fill the memory.
        limits = {"max_array_len": 0, "max_map_len": _MAX_IN_MAP, "max_str_len": _MAX_NAME, "max_bin_len": 0}
        sizes = {"read_size": min(size, 2**20), "max_buffer_size": size, "max_ext_len": size}
        unpacker = msgpack.Unpacker(file, ext_hook=_array, object_hook=on_map, **limits, **sizes)
        tree = unpacker.unpack()
        if isinstance(tree, dict) and unpacker.tell() != size:
            raise ValueError(f"{size - unpacker.tell()} bytes follow its end")
    return tree


def _array(code: int, data: bytes) -> np.ndarray:
    """A flax extension as an array, after all that it claims has been checked against its length."""
    if code not in (_ARRAY, _SCALAR):
        raise ValueError(f"it has a msgpack extension {code}; an array is {_ARRAY}")
    parts: Any = msgpack.unpackb(data, use_list=False, max_str_len=16, max_map_len=0, max_array_len=32, max_ext_len=0)
    if not isinstance(parts, tuple) or [type(part) for part in parts] != [tuple, str, bytes]:
        raise ValueError("it has an array that is not (shape, dtype, bytes)")
    shape, name, buffer = parts
    if name not in _DTYPES:
        raise ValueError(f"it has an array of dtype {name!r}")
    if not _fills(len(buffer), shape, _DTYPES[name]):
        raise ValueError(f"it has an array of shape {shape}, {name}, whose bytes are not of that length")
    return np.frombuffer(buffer, _DTYPES[name]).reshape(shape)


def _joined(node: dict[str, Any]) -> np.ndarray:
    """An array that flax cut into flat chunks."""
    try:
        shape, chunks = ([node[key][str(i)] for i in range(len(node[key]))] for key in ("shape", "chunks"))
        flat = np.concatenate(chunks, dtype=chunks[0].dtype, casting="no")
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError("it has a chunked array whose chunks do not fit together") from error
    if not _fills(flat.nbytes, shape, flat.dtype):
        raise ValueError(f"it has a chunked array whose chunks do not fill its shape {shape}")
    return flat.reshape(shape)


def _fills(num_bytes: int, shape: Sequence[Any], dtype: np.dtype) -> bool:
    return all(type(n) is int and n >= 0 for n in shape) and math.prod(shape) * dtype.itemsize == num_bytes


def _train_state(tree: Any) -> dict[str, Any]:
    """The fields of a `TrainState` (see `load_legacy`). Raises ValueError at the first difference from the layout."""
    leaves = dict(_leaves(tree))

    def take(*names: str) -> Any:
        if names not in leaves:
            raise ValueError(f"it lacks {'/'.join(names)}")
        return leaves.pop(names)

    step, lr, ema_rate, rng = (take(name) for name in ("step", "lr", "ema_rate", "rng"))
    count = take("optimizer", "state", "step")
    if not isinstance(rng, np.ndarray) or rng.dtype != np.uint32 or rng.shape != (2,):
        raise ValueError("rng is not uint32 [2]")
    parameters = [names[2:] for names in leaves if names[:2] == ("optimizer", "target") and len(names) > 2]
    if not parameters:
        raise ValueError("optimizer/target holds no parameters")
    flat: dict[str, dict[Names, np.ndarray]] = {key: {} for key in _PLACES}
    for name in parameters:
        for key, (before, after) in _PLACES.items():
            place = (*before, *name, *after)
            flat[key][name] = value = _parameter(take(*place), name, where := "/".join(place))
            if value.shape != (wanted := flat["params"][name].shape):
                raise ValueError(f"it has {where} of shape {value.shape}; in optimizer/target it has {wanted}")
    model_state = {names[1:]: leaves.pop(names) for names in list(leaves) if names[0] == "model_state"}
    if not all(names and isinstance(value, np.ndarray) for names, value in model_state.items()):
        raise ValueError("model_state is not a map of arrays")
    for names in leaves:
        raise ValueError(f"it has {'/'.join(names)}, which the public code's lacks")
    trees = {key: flax.traverse_util.unflatten_dict(values) for key, values in flat.items()}
    return {
        "step": _number(step, "step", np.int32),
        "params": trees["params"],
        "ema_params": trees["ema_params"],
        "opt_state": {"count": _number(count, "optimizer/state/step", np.int32), "mu": trees["mu"], "nu": trees["nu"]},
        "model_state": flax.traverse_util.unflatten_dict(model_state),
        "key": rng,
        "lr": _number(lr, "lr", np.float32),
        "ema_rate": _number(ema_rate, "ema_rate", np.float32),
    }


def _leaves(node: Any, path: Names = ()) -> Iterator[tuple[Names, Any]]:
    """Yields (names, value) of all in the tree that is not a map."""
    if not isinstance(node, dict):
        yield path, node
        return
    if len(path) == _MAX_DEPTH:
        raise ValueError(f"{path[0]} is nested more than {_MAX_DEPTH} deep")
    for name, child in node.items():
        if not isinstance(name, str) or not name.isprintable() or "/" in name:
            raise ValueError(f"{'/'.join(path) or 'it'} has the name {name!r}")
        yield from _leaves(child, (*path, name))


def _parameter(value: Any, name: Names, where: str) -> np.ndarray:
    """The value of a parameter, its EMA or a moment; GroupNorm's as [C]."""
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        raise ValueError(f"{where} is {getattr(value, 'dtype', type(value).__name__)}, not a floating array")
    return value.reshape(-1) if _of_group_norm(name) and value.shape[:-1] == (1, 1, 1) else value


def _of_group_norm(name: Names) -> bool:
    """Whether a parameter of this name belongs to a GroupNorm."""
    *parents, leaf = name
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


def export_legacy(state: Mapping[str, Any], path: str | Path, lr: float, ema_rate: float) -> None:
    """Writes the state of `load_legacy` or of one of our checkpoints (nested dicts) as the public code would.

    Raises:
        UserError: the state has no Adam moments, or the file cannot be written.
    """
    adam = _find_adam(state["opt_state"])
    if adam is None:
        raise UserError(f"{path}: the checkpoint has no Adam moments, which the public code's layout wants")
    trees = {**state, "mu": adam["mu"], "nu": adam["nu"]}
    leaves = {("optimizer", "state", "step"): np.asarray(adam["count"], np.int32)}
    for key, (before, after) in _PLACES.items():
        for name, value in sorted(flax.traverse_util.flatten_dict(trees[key]).items()):
            old_shape = (1, 1, 1, -1) if _of_group_norm(name) else np.shape(value)
            leaves[*before, *name, *after] = np.asarray(value).reshape(old_shape)
    nested = flax.traverse_util.unflatten_dict(leaves)
    tree = {  # in the public code's order
        "step": np.asarray(state["step"], np.int32),
        "optimizer": {name: nested["optimizer"][name] for name in ("target", "state")},
        "lr": np.asarray(lr, np.float32),
        "model_state": dict(state.get("model_state") or {}),
        "ema_rate": np.asarray(ema_rate, np.float32),
        "params_ema": nested["params_ema"],
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
