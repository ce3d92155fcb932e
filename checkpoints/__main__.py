# SPDX-License-Identifier: Apache-2.0
"""`python -m checkpoints export PATH OUT`: writes one of our checkpoints in the public code's layout."""

import sys
from pathlib import Path

from checkpoints import restore
from checkpoints.legacy import export_legacy
from errors import UserError


def export(path: str | Path, out: str | Path) -> None:
    """Writes the file `out`. Raises UserError if `path` is not one of ours, or if `out` exists or cannot be written."""
    if Path(path).is_file():
        raise UserError(f"{path} is a file, so in the public code's layout already; give one of our checkpoint folders")
    if Path(out).exists():
        raise UserError(f"{out} exists; give the name of a new file")
    state, record = restore(path)
    try:
        lr, ema_rate = record["config"]["optim"]["lr"], record["config"]["model"]["ema_rate"]
    except KeyError as error:
        raise UserError(f"checkpoint {path} has no {error} in its record, which says lr and EMA rate") from error
    export_legacy(state, out, lr, ema_rate)


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] != "export":
        sys.exit("usage: python -m checkpoints export PATH OUT   (PATH: a folder checkpoint_<number>; OUT: a new file)")
    try:
        export(*sys.argv[2:])
    except UserError as error:
        sys.exit(f"error: {error}")
