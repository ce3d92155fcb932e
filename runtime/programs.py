# SPDX-License-Identifier: Apache-2.0
"""Compiled programs kept on disk whole, so that a second launch neither traces nor lowers them in Python.

JAX's own cache keeps what the compiler makes, by the text of the program; that text is to be made first, which takes
longer than all else in a second launch. Here a program is kept by what its text is made from: the code, the libraries,
the settings and the shapes of its arguments.
"""

import contextlib
import hashlib
import json
import os
import pickle
import sys
import sysconfig
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.experimental import serialize_executable

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy", "ml_collections")
ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
KEPT = 16  # programs; the one that was used longest ago goes first
ABANDONED_S = 3600  # after which an unfinished file is of a process that was killed; writing one takes seconds

_folder: Path | None = None


def keep_in(folder: Path | None) -> None:
    """From now on programs are read from this folder and left there; None, as at first: neither."""
    global _folder
    _folder = folder


class Kept:
    """The place of one program in `keep_in`'s folder, by its arguments and all that it depends on."""

    def __init__(self, args: tuple, facts: Any):
        """facts: what the program depends on beside code, libraries, devices and the shapes of args, for JSON."""
        self._args = args
        self._path = None if _folder is None else _folder / f"{_key(args, facts)}.program"

    def read(self) -> jax.stages.Compiled | None:
        """What an earlier process left there; None without a file or, with a warning, if it cannot be used."""
        if self._path is None or not self._path.exists():
            return None
        try:
            payload, out = pickle.loads(self._path.read_bytes())
            in_tree, out_tree = jax.tree.structure((self._args, {})), jax.tree.structure(out)
            program = serialize_executable.deserialize_and_load(payload, in_tree, out_tree)
            os.utime(self._path)
            return program
        except Exception as error:  # of any kind: the file's contents come from another process
            logging.warning("%s cannot be used (%s); compiling anew", self._path, str(error).partition("\n")[0])
            return None

    def compile(self, function: Any) -> jax.stages.Compiled:
        """`function.lower(*args).compile()`, left there for the next process.

        function: a `jax.jit` or `jax.pmap` whose results are plain trees (dicts, NamedTuples, Flax dataclasses). What
        JAX's own cache had is not written: on the CPU a program that was read cannot be written again.
        """
        with _CacheHits() as hits:
            program = function.lower(*self._args).compile()
        if self._path is not None and not hits.count:
            _write(self._path, program)
        return program


def _write(path: Path, program: jax.stages.Compiled) -> None:
    """Whole or not at all; a full disk costs the file, not the run."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        payload, _, out_tree = serialize_executable.serialize(program)
        out = jax.tree.unflatten(out_tree, [0] * out_tree.num_leaves)  # a PyTreeDef of dataclasses is not pickled
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(pickle.dumps((payload, out)))
        temporary.replace(path)
        programs = sorted(path.parent.glob("*.program"), key=lambda p: p.stat().st_mtime)
        unfinished = [p for p in path.parent.glob("*.program.*") if p.stat().st_mtime < time.time() - ABANDONED_S]
        for old in programs[:-KEPT] + unfinished:
            old.unlink(missing_ok=True)
    except (OSError, ValueError, TypeError, pickle.PicklingError, jax.errors.JaxRuntimeError) as error:
        logging.info("the compiled program is not kept: %s", str(error).partition("\n")[0])
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _key(args: tuple, facts: Any) -> str:
    leaves, tree = jax.tree.flatten(args)
    devices = jax.devices()
    what = {
        "facts": facts,
        "code": _code(),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "python": sys.version,
        "jax": jax.config.values,
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
        "devices": [str(d) for d in devices],
        "kind": [devices[0].device_kind, devices[0].client.platform_version, _cpu()],
        "tree": str(tree),
        "leaves": [(x.shape, str(x.dtype), str(getattr(x, "sharding", None))) for x in leaves],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=repr).encode()).hexdigest()[:32]


def _code() -> str:
    """Of the sources of every module of this process that does not belong to Python or an installed package.

    A module of an archive names a file below it, and torch's `_classes` one that there is not.
    """
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    installed = tuple(f"{sysconfig.get_path(name)}{os.sep}" for name in names)
    sha = hashlib.sha256()
    for name, module in sorted(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if path is not None and not path.startswith(installed):
            file = next((p for p in (Path(path), *Path(path).parents) if p.is_file()), None)
            sha.update(f"{name}\n".encode() + (file.read_bytes() if file else b""))
    return sha.hexdigest()


def _cpu() -> str:
    """The instructions that this machine's processor knows; '' where they are not told."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return ""


class _CacheHits:
    """Counts the programs that JAX takes from its own cache meanwhile."""

    def __enter__(self) -> "_CacheHits":
        self.count = 0
        jax.monitoring.register_event_listener(self._listen)
        return self

    def __exit__(self, *_: Any) -> None:
        jax.monitoring.unregister_event_listener(self._listen)

    def _listen(self, event: str, **_: Any) -> None:
        self.count += event == "/jax/compilation_cache/cache_hits"
