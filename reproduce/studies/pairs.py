# SPDX-License-Identifier: Apache-2.0
"""Pairs of runs that are compared in detail: orders 1 and 2 of the digits, from the same first-order model."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from errors import UserError

STUDY = "digits_study"
PAIRS = {  # name: the variants of that experiment, and a title
    "ve": ("order1_long", "order2_long", "VE, 2,000 steps"),
    "vp": ("order1_vp_long", "order2_vp_long", "VP, 2,000 steps"),
    "vp_importance": ("order1_vp_importance", "order2_vp_importance", "VP, 500 steps, times for likelihood"),
}


def main(name: str, doc: str | None, counts: dict[str, int], measure: Callable, picture: Callable) -> None:
    """Writes `measure(title, *workdirs of a pair, *counts)` to <out>/digits_<name>.json, and a picture of all pairs.

    Numbers that the file holds of other pairs stay in it. counts: options whose values are 2 at least: default.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"python -m reproduce.studies.{name}", description=doc, formatter_class=formatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--out", type=Path, default=Path("assets/reproduce"), help="folder of numbers and picture")
    parser.add_argument("--only", default=",".join(PAIRS), help="names of pairs, with commas between them")
    for option, default in counts.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    args = parser.parse_args()
    given = {option: getattr(args, option) for option in counts}
    if too_small := [f"--{option} {value}" for option, value in given.items() if value < 2]:
        parser.error(f"{' '.join(too_small)}: a standard error needs two at least")
    if unknown := [pair for pair in args.only.split(",") if pair not in PAIRS]:
        parser.error(f"no pair {', '.join(unknown)}; there are {', '.join(PAIRS)}")
    path = args.out / f"digits_{name}.json"
    known = json.loads(path.read_text())["pairs"] if path.exists() else {}
    try:
        for pair in args.only.split(","):
            *variants, title = PAIRS[pair]
            folders = (args.workdir / STUDY / f"{variant}_seed0" for variant in variants)
            known[pair] = measure(title, *folders, *given.values())
    except UserError as error:
        sys.exit(f"error: {error}")
    known = {pair: known[pair] for pair in PAIRS if pair in known}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"pairs": known}, indent=1) + "\n")
    path.with_suffix(".png").write_bytes(picture(known))
    print(f"{path}\n{path.with_suffix('.png')}")
