# SPDX-License-Identifier: Apache-2.0
"""Formats and filters the log for the console and `stdout.txt`."""

import logging as std_logging
from pathlib import Path

from absl import logging

from errors import UserError


class _Console(std_logging.Formatter):
    """Shows the time of day and the message; marks a warning or an error as such."""

    def __init__(self):
        super().__init__("%(asctime)s %(mark)s%(message)s", "%H:%M:%S")

    def format(self, record: std_logging.LogRecord) -> str:
        record.mark = f"{record.levelname}: " if record.levelno >= std_logging.WARNING else ""
        return super().format(record)


def quieten_libraries() -> None:
    """Silences what libraries log below a warning; to be called before the first of them logs.

    jax reports every backend that it did not find, orbax and tensorboardX report every step that they take.
    """
    for name in ("jax", "orbax", "tensorboardX"):
        std_logging.getLogger(name).setLevel(std_logging.WARNING)
    logging.get_absl_handler().addFilter(_from_this_project)
    logging.get_absl_handler().setFormatter(_Console())


def set_up_logging(workdir: Path, to_file: bool) -> None:
    """Sends progress to the console and, if `to_file`, appends it to `workdir/stdout.txt`."""
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
    """Whether a record is this project's or a warning: orbax and grain log their routine through absl as well."""
    return record.levelno >= std_logging.WARNING or "site-packages" not in record.pathname
