# SPDX-License-Identifier: Apache-2.0
"""What of the logs reaches the console and `stdout.txt`, and how it looks there."""

import logging as std_logging
from pathlib import Path

from absl import logging

from errors import UserError


class _Console(std_logging.Formatter):
    """Time of day and message; a warning or an error says that it is one."""

    def __init__(self):
        super().__init__("%(asctime)s %(mark)s%(message)s", "%H:%M:%S")

    def format(self, record: std_logging.LogRecord) -> str:
        record.mark = f"{record.levelname}: " if record.levelno >= std_logging.WARNING else ""
        return super().format(record)


def quieten_libraries() -> None:
    """Leaves out what they log below a warning, before the first of them logs; their warnings stay.

    jax tells of every backend it looked for and did not find, orbax and tensorboardX of every step they take.
    """
    for name in ("jax", "orbax", "tensorboardX"):
        std_logging.getLogger(name).setLevel(std_logging.WARNING)
    logging.get_absl_handler().addFilter(_from_this_project)
    logging.get_absl_handler().setFormatter(_Console())


def set_up_logging(workdir: Path, to_file: bool) -> None:
    """Progress to the console and, of the first host, appended to `workdir/stdout.txt`."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = std_logging.FileHandler(workdir / "stdout.txt") if to_file else std_logging.NullHandler()
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {error.strerror}") from error
    file.setFormatter(std_logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    std_logging.getLogger().addHandler(file)
    logging.set_verbosity(logging.INFO)
    file.addFilter(_from_this_project)


def _from_this_project(record: std_logging.LogRecord) -> bool:
    """orbax and grain log their routine through absl as well; their warnings stay."""
    return record.levelno >= std_logging.WARNING or "site-packages" not in record.pathname
