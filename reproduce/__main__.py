# SPDX-License-Identifier: Apache-2.0
"""Runs and tabulates the studies of the paper's claims: `make reproduce`, or some of them by name.

python -m reproduce [--only mog_ve,digits_ve] [--fast] [--seeds 1] [--workdir runs/reproduce] [--jobs 2]

Every training and evaluation is a `main.py` command, printed as it starts. The folder of a run is
<workdir>/<experiment>/<variant>_seed<k>. Finished commands are not repeated, and a training goes on where it was. Then
the numbers go to `assets/reproduce/<experiment>.json`, beside those of other runs, with pictures.
"""

import argparse
import itertools
import os
import sys
from pathlib import Path

from errors import UserError
from reproduce.runner import run_all
from reproduce.studies import experiments

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # as in main.py


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--out", type=Path, default=Path("assets/reproduce"), help="folder of numbers and pictures")
    parser.add_argument("--only", default="", help="names of experiments, with commas between them; all if empty")
    parser.add_argument("--fast", action="store_true", help="one seed of the mixtures, the digits at orders 1 and 3")
    parser.add_argument("--seeds", type=int, default=0, help="only the first so many of each; 0: all")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="commands at a time")
    parser.add_argument("--collect", action="store_true", help="run nothing; numbers and pictures of what is there")
    parser.add_argument("--missing", action="store_true", help="only runs of which --out has no numbers yet")
    args = parser.parse_args()
    known = experiments(args.fast)
    names = args.only.split(",") if args.only else list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no experiment {', '.join(unknown)}; there are {', '.join(known)}")
    known = {name: [run for run in known[name] if not args.seeds or run.seed < args.seeds] for name in names}
    from reproduce import results

    failures = []
    if not args.collect:
        wanted = (results.missing(name, known[name], args.out) if args.missing else known[name] for name in names)
        failures = run_all(args.workdir, list(itertools.chain(*wanted)), args.jobs)
    for name in names:
        for path in results.collect(args.workdir, name, known[name], args.out):
            print(path)
    if failures:
        sys.exit("error: " + "\n".join(failures))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
