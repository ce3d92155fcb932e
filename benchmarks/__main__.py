# SPDX-License-Identifier: Apache-2.0
"""All of the benchmarks, `make bench`, or a part of them by name: some three hours on 2 idle cores.

python -m benchmarks [--only step,memory] [--workdir runs/bench]

Runs one script after the other, each printed as it starts, and trains first what they measure: two networks on the
digits and one on Fashion-MNIST, whose data set is to be at hand (docs/data.md). What a script prints goes to
<workdir>/<name>.txt, and its last line, one JSON object, here too. What is finished is not repeated, unless its file
<name>.whole is removed.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from errors import UserError
from reproduce.runner import run_unless_done

NETWORKS = {  # name: config file
    "digits_ve": "configs/digits/ve_ncsnpp.py",
    "digits_vp": "configs/digits/vp_ddpmpp.py",
    "fashion_ve": "configs/reproduce/fashion_ve.py",
}
COMMANDS = {  # name: module of this package, flags, and the network that is measured
    "step": ("step", (), None),
    "convolution": ("convolution", (), None),
    "convolution_shapes": ("convolution", ("--shapes",), None),
    "unrolled_steps": ("unrolled_steps", (), None),
    "input": ("input", (), None),
    "image_folder": ("image_folder", (), None),
    "startup": ("startup", (), None),
    "likelihood_digits_ve": ("likelihood", ("--repeats=3",), "digits_ve"),
    "likelihood_digits_vp": ("likelihood", ("--repeats=3",), "digits_vp"),
    "likelihood_fashion_ve": ("likelihood", ("--batch=8", "--repeats=1", "--steps=160"), "fashion_ve"),
    "likelihood_random": ("likelihood", ("--ends", "--repeats=1"), None),
    "precision": ("precision", (), "digits_ve"),
    "memory": ("memory", (), None),
}


def of_network(workdir: Path, name: str) -> tuple[str, ...]:
    """The flags that name a trained network, which is trained first unless it is there."""
    flags = f"--workdir={workdir / name}", f"--config={NETWORKS[name]}"
    run_unless_done(workdir / name / "whole", workdir / f"{name}.log", "main.py", *flags, "--mode=train")
    return flags


def measure(workdir: Path, name: str) -> None:
    """Runs a script unless it has run, and prints what it found."""
    module, flags, network = COMMANDS[name]
    if network is not None:
        flags = *of_network(workdir, network), *flags
    output = workdir / f"{name}.txt"
    run_unless_done(output.with_suffix(".whole"), output, "-m", f"benchmarks.{module}", "--json", *flags)
    found = json.loads(output.read_text().splitlines()[-1])
    print(f"{name}: {json.dumps(found, indent=2)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/bench"))
    parser.add_argument("--only", default="", help="names, with commas between them; all if empty")
    args = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # as in main.py
    names = args.only.split(",") if args.only else list(COMMANDS)
    if unknown := [name for name in names if name not in COMMANDS]:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(COMMANDS)}")
    failures = []
    for name in names:
        try:
            measure(args.workdir, name)
        except UserError as error:
            failures.append(f"{name}: {error}")
            print(f"error: {failures[-1]}", file=sys.stderr, flush=True)
    if failures:
        sys.exit(f"error: {len(failures)} of {len(names)} benchmarks failed")


if __name__ == "__main__":
    main()
