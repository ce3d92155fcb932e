# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a workdir."""

import os
import signal
import subprocess
import sys

import pytest

from errors import UserError
from runtime.records import workdir_lock

HOLD = """
import pathlib, sys, time
from runtime import records
with records.workdir_lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path):
    workdir = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, workdir], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"another run is at work in --workdir .*\"pid\": {holder.pid}"):
        with workdir_lock(workdir):
            raise AssertionError("two runs at once")
    os.kill(holder.pid, signal.SIGKILL)  # leaves the file behind, not the lock
    holder.communicate()
    with workdir_lock(workdir):
        pass
    with workdir_lock(workdir):  # and again, after a proper end
        pass


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"--workdir .*file/run cannot be written"):
        with workdir_lock(tmp_path / "file" / "run"):
            pass
