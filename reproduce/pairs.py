# SPDX-License-Identifier: Apache-2.0
"""Pairs of runs that are compared in detail: orders 1 and 2 of the digits, from the same first-order model."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

STUDY = "digits_study"
PAIRS = {  # name: the variants of that experiment, and a title
    "ve": ("order1_long", "order2_long", "VE, 2,000 steps"),
    "vp": ("order1_vp_long", "order2_vp_long", "VP, 2,000 steps"),
    "vp_importance": ("order1_vp_importance", "order2_vp_importance", "VP, 500 steps, times for likelihood"),
}


def parser(program: str, doc: str | None, num: int) -> argparse.ArgumentParser:
    """Of a script that compares pairs on `num` test images unless told otherwise."""
    result = argparse.ArgumentParser(program, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--workdir", type=Path, default=Path("runs/reproduce"))
    result.add_argument("--out", type=Path, default=Path("assets/reproduce"), help="folder of numbers and picture")
    result.add_argument("--only", type=names, default=list(PAIRS), help="of the pairs, with commas between them")
    result.add_argument("--num", type=int, default=num, help="test images")
    return result


def names(text: str) -> list[str]:
    """The names of pairs in "vp,ve"; an error of argparse for another."""
    found = text.split(",")
    if unknown := [name for name in found if name not in PAIRS]:
        raise argparse.ArgumentTypeError(f"no pair {', '.join(unknown)}; there are {', '.join(PAIRS)}")
    return found


def workdirs(workdir: Path, name: str) -> tuple[Path, Path]:
    """Of the pair's two runs."""
    first, second, _ = PAIRS[name]
    return workdir / STUDY / f"{first}_seed0", workdir / STUDY / f"{second}_seed0"


def write(path: Path, found: dict[str, Any], picture: Callable[[dict[str, Any]], bytes]) -> None:
    """Numbers by pair to `path`, beside those that it holds of other pairs, and the picture of all to its `.png`."""
    known = json.loads(path.read_text())["pairs"] if path.exists() else {}
    known |= found
    known = {name: known[name] for name in PAIRS if name in known}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"pairs": known}, indent=1) + "\n")
    path.with_suffix(".png").write_bytes(picture(known))
    print(f"{path}\n{path.with_suffix('.png')}")
