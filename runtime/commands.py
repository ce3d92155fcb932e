# SPDX-License-Identifier: Apache-2.0
"""Runs commands for the scripts that are made of such: `quickstart.py`, `python -m reproduce`, `-m benchmarks`."""

import subprocess
import sys
from pathlib import Path

from errors import UserError


def run_main(log: Path, *flags: str) -> None:
    """`run_python` of `main.py` with the flags."""
    run_python(log, "main.py", *flags)


def run_python(log: Path, *command: str) -> None:
    """`python` with the command, printed as it starts; its output goes to `log`.

    UserError with the last line of that output if it ends with another exit code than 0.
    """
    print(" ".join(("python", *command)) + "\n", end="", flush=True)  # in one write: several threads print
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        code = subprocess.run([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        last = (log.read_text().strip().splitlines() or ["no output"])[-1]
        raise UserError(f"the command ended with exit code {code} ({last}); see {log}")
