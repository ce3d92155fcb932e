# SPDX-License-Identifier: Apache-2.0
"""Programs kept on disk: used by the next process if nothing they depend on has changed, and never otherwise."""

import importlib
import os
import subprocess
import sys
import types
import zipfile
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import struct
from jax.experimental.compilation_cache import compilation_cache

from runtime import programs
from tests.test_interruptions import ROOT


@struct.dataclass
class State:
    """Is not pickled by JAX as part of a tree's structure."""

    x: jax.Array
    n: int = struct.field(pytree_node=False, default=3)


class Result(NamedTuple):
    state: State
    metrics: dict[str, jax.Array]


def step(state, x):
    return Result(state.replace(x=state.x + x), {"loss": (x**2).sum(), "none": None})


def compiled(function, args, facts):
    """The program, and whether it was kept."""
    place = programs.Kept(args, facts)
    program = place.read()
    return (place.compile(function), False) if program is None else (program, True)


class NotLowered:
    """Stands for a function that must not be traced."""

    def lower(self, *_):
        raise AssertionError("traced, though the program is kept")


ARGS = (State(np.arange(4.0, dtype=np.float32)), np.float32([1, 2, 3, 4]))


@pytest.fixture
def folder(tmp_path):
    programs.keep_in(tmp_path / "programs")
    yield tmp_path / "programs"
    programs.keep_in(None)


def assert_right(program):
    result = program(*ARGS)
    assert isinstance(result, Result) and result.state.n == 3 and result.metrics["none"] is None
    np.testing.assert_array_equal(result.state.x, [1, 3, 5, 7])
    assert result.metrics["loss"] == 30


@pytest.mark.parametrize("transformation", [jax.jit, jax.pmap])
def test_the_second_time_nothing_is_traced(folder, transformation):
    add = transformation(lambda state, x: (state, x + 1), donate_argnums=0)
    args = jax.tree.map(lambda x: x[None], ARGS)
    program, kept = compiled(add, args, {"lr": 1})
    assert not kept and len(list(folder.iterdir())) == 1
    again, kept = compiled(NotLowered(), args, {"lr": 1})
    assert kept
    for one in (program, again):
        np.testing.assert_array_equal(one(*args)[1], [[2, 3, 4, 5]])


def test_results_of_any_structure(folder):
    assert_right(compiled(jax.jit(step), ARGS, None)[0])
    assert_right(compiled(NotLowered(), ARGS, None)[0])


def test_a_change_of_anything_it_depends_on_compiles_anew(folder, tmp_path, monkeypatch):
    source = tmp_path / "extension.py"
    source.write_text("one = 1")
    module = types.ModuleType("extension")
    module.__file__ = str(source)
    monkeypatch.setitem(sys.modules, "extension", module)

    def is_kept(facts=1, args=ARGS):
        return compiled(jax.jit(step), args, facts)[1]

    assert not is_kept() and is_kept()
    assert not is_kept(facts=2), "the config"
    wider = (State(np.zeros(5, np.float32)), np.zeros(5, np.float32))
    assert not is_kept(args=wider), "the shapes"
    assert not is_kept(args=(State(ARGS[0].x, 4), ARGS[1])), "what a tree's structure holds"
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " ")
    assert not is_kept(), "the compiler's flags"
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "extension", module)
    assert is_kept()
    with jax.default_matmul_precision("highest"):
        assert not is_kept(), "JAX's settings"
    source.write_text("one = 2")
    assert not is_kept(), "the code"


@pytest.mark.parametrize("path", ["_classes.py", "/nowhere/module.py", None])
def test_a_module_without_its_file_does_no_harm(folder, monkeypatch, path):
    """`torch._classes` names one that there is not, relative to nothing; found on a machine with torch."""
    module = types.ModuleType("classes")
    module.__file__ = path
    monkeypatch.setitem(sys.modules, "classes", module)
    assert not compiled(jax.jit(step), ARGS, None)[1]
    assert compiled(NotLowered(), ARGS, None)[1]


def test_a_change_of_an_archive_of_modules_compiles_anew(folder, tmp_path, monkeypatch):
    archive = tmp_path / "packed.zip"
    for number in (1, 2):
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("packed.py", f"one = {number}")
        with monkeypatch.context() as patch:
            patch.syspath_prepend(archive)
            patch.delitem(sys.modules, "packed", raising=False)
            importlib.invalidate_caches()
            patch.setitem(sys.modules, "packed", importlib.import_module("packed"))
            assert not compiled(jax.jit(step), ARGS, None)[1]
            assert compiled(NotLowered(), ARGS, None)[1]


def test_a_damaged_file_is_replaced(folder, caplog):
    compiled(jax.jit(step), ARGS, None)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    for damaged in (b"", b"no pickle", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        program, kept = compiled(jax.jit(step), ARGS, None)
        assert not kept and "cannot be used" in caplog.text
        assert_right(program)
        assert compiled(NotLowered(), ARGS, None)[1]


def test_the_oldest_goes_first(folder, monkeypatch):
    monkeypatch.setattr(programs, "KEPT", 2)

    def keep(facts):
        known = set(folder.glob("*"))
        compiled(jax.jit(step), ARGS, facts)
        for path in set(folder.glob("*")) - known:
            os.utime(path, (facts, facts))

    keep(1)
    keep(2)
    compiled(NotLowered(), ARGS, 1)  # used now
    keep(3)
    assert len(list(folder.iterdir())) == 2
    compiled(NotLowered(), ARGS, 1)
    assert not compiled(jax.jit(step), ARGS, 2)[1]


def test_what_a_killed_process_left_goes_and_what_is_being_written_stays(folder):
    folder.mkdir()
    abandoned, under_way = folder / "a.program.123", folder / "b.program.456"
    for path in (abandoned, under_way):
        path.write_bytes(b"unfinished")
    os.utime(abandoned, (1, 1))
    compiled(jax.jit(step), ARGS, None)
    assert under_way.exists() and not abandoned.exists()
    assert len(list(folder.glob("*.program"))) == 1


def test_without_a_folder_nothing_is_written_and_a_file_in_its_place_does_no_harm(tmp_path, caplog):
    assert not compiled(jax.jit(step), ARGS, None)[1] and not compiled(jax.jit(step), ARGS, None)[1]
    (tmp_path / "file").touch()
    programs.keep_in(tmp_path / "file" / "programs")
    try:
        program, kept = compiled(jax.jit(step), ARGS, None)
    finally:
        programs.keep_in(None)
    assert not kept
    assert_right(program)


def test_a_program_from_the_cache_of_jax_is_not_written(folder, tmp_path):
    """XLA's CPU back end loses functions of a program that it has read when it writes it again."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        jax.clear_caches()
        compilation_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        compiled(jax.jit(step), ARGS, 1)
        assert len(list(folder.iterdir())) == 1
        jax.clear_caches()
        assert not compiled(jax.jit(step), ARGS, 2)[1]
        assert len(list(folder.iterdir())) == 1
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
        compilation_cache.reset_cache()


def test_a_second_launch_makes_the_same_steps_with_the_program_of_the_first(tmp_path):
    """Of `main.py`, in another workdir."""
    metrics = []
    flags = ["--config=configs/toy/mog_ve.py", "--mode=train", f"--compilation_cache={tmp_path / 'cache'}"]
    flags += [
        "--config.training.n_iters=4",
        "--config.training.n_jitted_steps=2",
        "--config.training.log_freq=2",
        "--config.training.snapshot_sampling=False",
    ]
    for name in ("one", "two"):
        workdir = tmp_path / name
        arguments = [sys.executable, "main.py", f"--workdir={workdir}", *flags]
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert ("training step of an earlier launch read" in done.stderr) == (name == "two")
        metrics.append((workdir / "metrics.jsonl").read_text())
    assert metrics[0] == metrics[1]
