# SPDX-License-Identifier: Apache-2.0
"""Runs the commands of `python -m reproduce`, `-m reproduce.quickstart` and `-m benchmarks`."""

import subprocess
import sys
from pathlib import Path

from errors import UserError


def run_main(log: Path, *flags: str) -> None:
    """Runs `main.py` with the flags, as `run_python` does."""
    run_python(log, "main.py", *flags)


def run_python(log: Path, *command: str) -> None:
    """Runs `python` with the command, which it prints first. The output goes to `log`.

    Raises UserError with the last line of that output if the exit code is not 0.
    """
    print(" ".join(("python", *command)) + "\n", end="", flush=True)  # in one write: several threads print
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        code = subprocess.run([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        last = (log.read_text().strip().splitlines() or ["no output"])[-1]
        raise UserError(f"the command ended with exit code {code} ({last}); see {log}")
