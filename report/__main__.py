# SPDX-License-Identifier: Apache-2.0
"""`python -m report WORKDIR [WORKDIR2 ...]`: a page of each run, and one that compares several."""

import sys
from collections.abc import Sequence
from pathlib import Path

from errors import UserError
from report import write_report, write_summary


def main(workdirs: Sequence[str]) -> None:
    """Reports on each workdir and compares several in the first one's `report/comparison.html`; prints the paths."""
    if not workdirs:
        raise UserError("usage: python -m report WORKDIR [WORKDIR2 ...]")
    for workdir in workdirs:
        print(write_report(workdir))
    if len(workdirs) > 1:
        names = [Path(workdir).resolve().name for workdir in workdirs]
        labels = names if len(set(names)) == len(names) else list(workdirs)
        path = Path(workdirs[0]) / "report" / "comparison.html"
        print(write_summary(path, f"Comparison of {len(labels)} runs", dict(zip(labels, workdirs, strict=True))))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as user_error:
        sys.exit(f"error: {user_error}")
