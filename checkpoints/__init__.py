# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: saved atomically by orbax as plain nested dicts of arrays, checked against the config when read.

A checkpoint is a folder `checkpoint_<number>` with the training state and a JSON record (config, position of the data
iterator, metrics not yet logged). A folder of the final name is whole. A FILE of that name is one of the public code,
see `legacy`. It is read like ours.
"""

import math
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from absl import logging

from checkpoints.legacy import load_legacy
from errors import UserError

_NEW = ".new"  # ends the name of a checkpoint that is whole and about to take the place of one of its number
_NAME = re.compile(rf"checkpoint_(\d+)(?:{re.escape(_NEW)})?")


class Checkpoint(NamedTuple):
    """The state as nested dicts of numpy arrays, and the JSON record saved with it."""

    state: dict[str, Any]
    record: dict[str, Any]


def _flat(tree: Any) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(flax.serialization.to_state_dict(tree), sep="/")


def _checkpointer() -> ocp.Checkpointer:
    """A checkpointer of this process alone: every host has whole arrays, so no barrier between hosts is needed."""
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"process{process}"
    )
    handlers = {
        "state": ocp.PyTreeCheckpointHandler(multiprocessing_options=alone),
        "record": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
    }
    options = ocp.CompositeOptions(multiprocessing_options=alone)
    composite = ocp.CompositeCheckpointHandler(composite_options=options, **handlers)
    return ocp.Checkpointer(composite, multiprocessing_options=alone)


def save(directory: str | Path, state: Any, number: int, record: dict[str, Any] | None = None, keep: int = 0) -> Path:
    """Writes `directory/checkpoint_<number>` and returns its path. An old one stays until the new one is whole.

    Args:
        state: any pytree that flax can turn into a state dict, e.g. a `TrainState` on one device.
        record: goes into the checkpoint as JSON.
        keep: the number of newest checkpoints that stay in the folder after a successful write; 0: all.
    Raises:
        UserError: the disk is full, or the folder cannot be written. The checkpoints before stay.
    """
    path = Path(directory).absolute() / f"checkpoint_{number}"
    arrays = {k: np.asarray(v) for k, v in _flat(jax.device_get(state)).items()}
    nested = flax.traverse_util.unflatten_dict(arrays, sep="/")
    items = ocp.args.Composite(state=ocp.args.PyTreeSave(nested), record=ocp.args.JsonSave(record or {}))
    try:
        for abandoned in path.parent.glob("checkpoint_*.orbax-checkpoint-tmp*"):  # the run was killed as it wrote this
            shutil.rmtree(abandoned)
        for new in path.parent.glob(f"checkpoint_*{_NEW}"):  # the run was killed as this took the place of the old one
            _take_place(new)
        written = path.with_name(path.name + _NEW) if path.exists() else path
        with _checkpointer() as checkpointer:
            checkpointer.save(written, items)
        if written != path:
            _take_place(written)
    except (OSError, ValueError) as error:  # tensorstore raises ValueError if the disk is full
        raise UserError(
            f"checkpoint {path} cannot be written ({str(error).splitlines()[0][-200:]}); the ones before it are whole. "
            "Make room, or the folder writable, and run again"
        ) from error
    for old in all_numbers(directory)[:-keep] if keep else []:
        outdated = Path(directory) / f"checkpoint_{old}"
        if outdated.is_dir():
            shutil.rmtree(outdated)
    return path


def _whole(path: Path) -> Path:
    """The checkpoint that is about to take the place of `path`, which may be half deleted meanwhile, else `path`."""
    new = path.with_name(path.name + _NEW)
    return new if new.is_dir() else path


def _take_place(new: Path) -> None:
    """Puts a new checkpoint in the place of the old one; meanwhile `restore` reads the new one."""
    path = new.with_name(new.name.removesuffix(_NEW))
    if path.is_file():  # a file of the public code, perhaps a download, is kept
        path.replace(path.with_name(f"{path.name}.legacy"))
    elif path.exists():
        shutil.rmtree(path)
    new.rename(path)


def all_numbers(directory: str | Path) -> list[int]:
    """The numbers of the checkpoints in a folder, rising."""
    names = (_NAME.fullmatch(p.name) for p in Path(directory).glob("checkpoint_*"))
    return sorted({int(name[1]) for name in names if name})


def latest(directory: str | Path) -> Path | None:
    """The checkpoint of the highest number in a folder, or None."""
    numbers = all_numbers(directory)
    return Path(directory) / f"checkpoint_{numbers[-1]}" if numbers else None


def find(directory: str | Path, number: int, wait_s: float = 0) -> Path:
    """The checkpoint of a number, the newest if it is 0. Raises UserError if there is none after `wait_s` seconds."""
    deadline, is_told = time.monotonic() + wait_s, False
    while not (numbers := [n for n in all_numbers(directory) if number in (0, n)]):
        if (left := deadline - time.monotonic()) <= 0:
            have = ", ".join(map(str, all_numbers(directory))) or "none"
            wanted = "no checkpoint" if number == 0 else f"no checkpoint_{number}"
            raise UserError(
                f"{directory} holds {wanted} (it has: {have}); train first, give another --workdir or number, or wait "
                "for it with eval.wait_for_checkpoints_s"
            )
        if not is_told:
            logging.info("waiting up to %.0f s for checkpoint %s in %s", wait_s, number or "(any)", directory)
            is_told = True
        time.sleep(min(left, 1 + wait_s / 100))
    return Path(directory) / f"checkpoint_{numbers[-1]}"


def newest_readable(directory: str | Path) -> tuple[Path, "Checkpoint"] | None:
    """The path and content of the newest checkpoint in a folder, or None. Only the first host calls it.

    A checkpoint that cannot be read is set aside as `damaged_<name>`, with a warning, and the one before it is taken.
    Raises UserError if there are checkpoints and none can be read.
    """
    numbers = all_numbers(directory)
    for number in reversed(numbers):
        path = Path(directory) / f"checkpoint_{number}"
        try:
            return path, restore(path)
        except UserError as error:
            logging.warning("%s; set aside as damaged_%s", error, path.name)
            damaged = _whole(path)
            aside = damaged.with_name(f"damaged_{damaged.name}")
            if aside.exists():
                shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
            damaged.replace(aside)
    if numbers:
        raise UserError(f"no checkpoint in {directory} can be read; they are set aside as damaged_checkpoint_*")
    return None


def restore(path: str | Path, target: Any = None) -> Checkpoint:
    """Reads a checkpoint that `save` wrote, or a file of the public code, whose record is empty. Arrays are numpy's.

    Args:
        target: the target that `into` gets afterwards; other shapes are then refused before any array is allocated.
    Raises:
        UserError: the checkpoint is missing, cannot be read, or is not of `target`'s shapes.
    """
    path = Path(path).absolute()
    if path.is_file():
        return Checkpoint(load_legacy(path), {})
    path = _whole(path)
    if not path.is_dir():
        raise UserError(f"checkpoint {path} does not exist")
    try:
        with _checkpointer() as checkpointer:
            saved = checkpointer.metadata(path).item_metadata["state"].tree
            size = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(saved))
            if size > _memory():
                raise UserError(f"checkpoint {path} claims {size / 2**30:.3g} GiB of arrays, more than there is memory")
            if target is not None:
                _check_shapes(_flat(target), flax.traverse_util.flatten_dict(saved, sep="/"), path)
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
            state, record = ocp.args.PyTreeRestore(restore_args=as_numpy), ocp.args.JsonRestore()
            items = checkpointer.restore(path, ocp.args.Composite(state=state, record=record))
    except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint {path} cannot be read ({reason})") from error
    return Checkpoint(items["state"], items["record"])


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def into(target: Any, state: dict[str, Any], where: str | Path) -> Any:
    """Puts the values of a restored state into the structure of `target` (arrays or `jax.ShapeDtypeStruct`s).

    Raises:
        UserError: the state is of another architecture. The message names the first parameter that is missing, extra,
            or of another shape.
    """
    if "ema_rate" in state:  # a file of the public code; its one count is Adam's and the warm-up's
        opt_state = optax.tree.set(target.opt_state, **state["opt_state"])
        fields = ("step", "params", "ema_params", "model_state", "key")
        state = {**{name: state[name] for name in fields}, "opt_state": opt_state}
    have = _flat(state)
    _check_shapes(_flat(target), have, where)

    def value(path, leaf):
        return np.asarray(have["/".join(key.key for key in path)], leaf.dtype)

    values = jax.tree.map_with_path(value, flax.serialization.to_state_dict(target))
    return flax.serialization.from_state_dict(target, values)


def _check_shapes(wanted: dict[str, Any], have: dict[str, Any], where: str | Path) -> None:
    hint = "it was made with another config; use the one that made it"
    for name, leaf in wanted.items():
        if name not in have:
            raise UserError(f"checkpoint {where} lacks {name}: {hint}")
        shape = getattr(have[name], "shape", ())
        if shape != leaf.shape:
            raise UserError(f"checkpoint {where} has {name} of shape {shape}, this config wants {leaf.shape}: {hint}")
    for name in have:
        if name not in wanted:
            raise UserError(f"checkpoint {where} has {name}, which this config's network lacks: {hint}")
