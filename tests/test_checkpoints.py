# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that replace one another, and that claim more than there is."""

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

import checkpoints
from errors import UserError

ROOT = Path(__file__).parent.parent


def state(value):
    return {"params": {"w": np.full(5, value, np.float32)}, "step": np.int32(value)}


def restored(path):
    return float(checkpoints.restore(path).state["params"]["w"][0]), checkpoints.restore(path).record


def test_the_old_one_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = checkpoints.save(tmp_path, state(1), 3, {"of": "one"})

    def breaks(*args, **kwargs):
        assert restored(path) == (1, {"of": "one"})  # while the new one is written
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CompositeCheckpointHandler, "save", breaks)
        with pytest.raises(UserError, match=r"cannot be written.*the ones before it are whole"):
            checkpoints.save(tmp_path, state(2), 3)
    assert restored(path) == (1, {"of": "one"}) and checkpoints.latest(tmp_path) == path
    checkpoints.save(tmp_path, state(2), 3, {"of": "two"})
    assert restored(path) == (2, {"of": "two"})
    assert sorted(p.name for p in tmp_path.glob("checkpoint_*")) == ["checkpoint_3"]


@pytest.mark.parametrize("removed", ["checkpoint_3/state", "checkpoint_3"])
def test_a_run_killed_while_the_new_one_takes_the_place_of_the_old(tmp_path, monkeypatch, removed):
    """The old one is half deleted, or gone and the new one still under its own name."""
    path = checkpoints.save(tmp_path, state(1), 3)

    def killed(new):
        shutil.rmtree(tmp_path / removed)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_take_place", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(tmp_path, state(2), 3, {"of": "two"})
    assert checkpoints.all_numbers(tmp_path) == [3]
    assert checkpoints.find(tmp_path, 3) == checkpoints.find(tmp_path, 0) == checkpoints.latest(tmp_path) == path
    assert restored(path) == (2, {"of": "two"})
    checkpoints.save(tmp_path, state(4), 4)  # the next one tidies up
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_3", "checkpoint_4"]
    assert restored(path) == (2, {"of": "two"})


def test_a_damaged_one_that_was_to_take_a_place_is_set_aside(tmp_path):
    checkpoints.save(tmp_path, state(1), 2)
    new = checkpoints.save(tmp_path, state(2), 3).rename(tmp_path / "checkpoint_3.new")
    shutil.rmtree(new / "state")
    path, found = checkpoints.newest_readable(tmp_path)
    assert path.name == "checkpoint_2" and found.state["step"] == 1
    assert (tmp_path / "damaged_checkpoint_3.new").is_dir()


def test_a_file_of_the_public_code_is_kept_aside(tmp_path):
    (tmp_path / "checkpoint_3").write_bytes(b"downloaded")
    path = checkpoints.save(tmp_path, state(1), 3)
    assert restored(path)[0] == 1 and (tmp_path / "checkpoint_3.legacy").read_bytes() == b"downloaded"


def test_shapes_are_checked_before_any_array_is_allocated(tmp_path):
    """1 GiB of zeros is a few kB on the disk; a process that may not have as much refuses it by name."""
    huge = {"params": {"w": np.zeros(2**28, np.float32)}, "step": np.int32(0)}
    path = checkpoints.save(tmp_path, huge, 1)
    program = f"""
import numpy as np, resource, checkpoints
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    checkpoints.restore({str(path)!r}, {{"params": {{"w": np.zeros(5, np.float32)}}, "step": np.int32(0)}})
except checkpoints.UserError as error:
    print(error)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    message, kilobytes = done.stdout.splitlines()
    assert f"{path} has params/w of shape (268435456,), this config wants (5,)" in message
    assert int(kilobytes) < 2**19  # half of it


def test_more_arrays_than_memory_are_refused(tmp_path, monkeypatch):
    path = checkpoints.save(tmp_path, state(1), 1)
    monkeypatch.setattr(checkpoints, "_memory", lambda: 20)
    with pytest.raises(UserError, match=r"checkpoint_1 claims .* GiB of arrays, more than there is memory"):
        checkpoints.restore(path)
    monkeypatch.undo()
    assert (
        2**28 < checkpoints._memory()
        and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < checkpoints._memory()
    )
