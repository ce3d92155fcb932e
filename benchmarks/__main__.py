# SPDX-License-Identifier: Apache-2.0
"""All of the benchmarks, `make bench`, or a part of them by name: some five hours on 2 idle cores.

python -m benchmarks [--only step,input] [--workdir runs/bench]

Runs one script after the other, each printed as it starts, and trains first what they measure: three networks on the
digits and two on Fashion-MNIST, whose data set is to be at hand (docs/data.md). What a script prints goes to
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
    "digits_ml": "configs/ml/digits.py",
    "fashion_ml": "configs/ml/fashion_mnist.py",
}
COMMANDS = {  # name: module of this package, flags, and the networks that are measured, the second a recipe's
    "step": ("step", (), ()),
    "convolution": ("convolution", (), ()),
    "input": ("input", (), ()),
    "image_folder": ("image_folder", (), ()),
    "startup": ("startup", (), ()),
    "likelihood_digits_ve": ("likelihood", ("--repeats=3",), ("digits_ve",)),
    "likelihood_digits_vp": ("likelihood", ("--repeats=3",), ("digits_vp",)),
    "likelihood_fashion_ve": ("likelihood", ("--batch=8", "--repeats=1", "--steps=160"), ("fashion_ve",)),
    "likelihood_digits_recipe": ("likelihood", ("--repeats=3",), ("digits_ve", "digits_ml")),
    "likelihood_fashion_recipe": ("likelihood", ("--batch=8", "--repeats=1"), ("fashion_ve", "fashion_ml")),
    "likelihood_random": ("likelihood", ("--ends", "--repeats=1"), ()),
    "precision": ("precision", (), ("digits_ve",)),
    "full_size": ("full_size", (), ()),
    "accelerator": ("accelerator", ("--only=machine",), ()),
}


def train(workdir: Path, name: str) -> tuple[Path, str]:
    """A network's run and config file. It is trained unless it is there."""
    run, config = workdir / name, NETWORKS[name]
    command = "main.py", f"--workdir={run}", f"--config={config}", "--mode=train"
    run_unless_done(run / "whole", workdir / f"{name}.log", *command)
    return run, config


def measure(workdir: Path, name: str) -> None:
    """Runs a script unless it has run, and prints what it found."""
    module, flags, networks = COMMANDS[name]
    for names, network in zip((("workdir", "config"), ("recipe", "recipe-config")), networks, strict=False):
        flags = *(f"--{flag}={value}" for flag, value in zip(names, train(workdir, network), strict=True)), *flags
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
