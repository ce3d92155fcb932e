# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a workdir."""

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path

import jax

from errors import UserError


@contextlib.contextmanager
def workdir_lock(workdir: Path):
    """Holds `workdir/.lock` against other processes; the operating system releases it however this process ends.

    Of several hosts the first holds it. Raises UserError if another run has it, or if the folder cannot be written.
    """
    if jax.process_index() != 0:
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(workdir / ".lock", os.O_RDWR | os.O_CREAT, 0o644), "r+")
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = file.read().strip() or "another process"
            raise UserError(
                f"another run is at work in --workdir {workdir} ({holder}); wait for it, stop it, or use another folder"
            ) from error
        file.seek(0)
        file.truncate()
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
        file.flush()
        yield
