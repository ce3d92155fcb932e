# SPDX-License-Identifier: Apache-2.0
"""Runs a `main.py` command for the scripts that are made of such: `quickstart.py` and `python -m reproduce`."""

import subprocess
import sys
from pathlib import Path

from errors import UserError


def run_main(log: Path, *flags: str) -> None:
    """`python main.py` with the flags, printed as it starts; its output goes to `log`.

    UserError with the last line of that output if it ends with another exit code than 0.
    """
    print(" ".join(("python main.py", *flags)) + "\n", end="", flush=True)  # in one write: several threads print
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        command = [sys.executable, "main.py", *flags]
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        last = (log.read_text().strip().splitlines() or ["no output"])[-1]
        raise UserError(f"the command ended with exit code {code} ({last}); see {log}")
