# SPDX-License-Identifier: Apache-2.0
"""What orders 2 and 3 are worth on images: fine-tunings of the models of `reproduce.studies.recipes`.

python -m reproduce.studies.orders [--only digits,patches,fashion_mnist] [--seeds 3] [--workdir runs/reproduce]
                                   [--collect]

From the 2,000 steps of a recipe (ve, vp, vp_weighted, ml_vp) each order is trained for 500 more. Order 3 also with its
weight raised by the dimension (`training.third_order_scaling`) so far that its share of the gradient is about a tenth
and a third, and order 1 for as many seconds as order 3 takes. Writes <out>/orders_<data>.json as `python -m reproduce`
does: differences to order 1 are seed by seed, and paired over the test images.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from errors import UserError
from reproduce import results
from reproduce.runner import Run, run_all
from reproduce.studies import FINE_TUNE, length, order, recipes

STEPS = 500
STEPS_OF_EQUAL_TIME = 1_800  # of order 1: a step of order 3 takes some 3.6 times as long (`python -m benchmarks.step`)
BASES = ("ve", "vp", "vp_weighted", "ml_vp")
SCALED = ("ve", "ml_vp")  # whose third order is tried with larger weights, too
SHARES = {"share10": 0.4, "share30": 1.6}  # weight with third_order_scaling: `reproduce.studies.shares` of the digits


def runs_of(data: str, seeds: int) -> Iterator[Run]:
    for base in recipes.runs_of("recipes", data, seeds):
        if base.variant not in BASES:
            continue
        variants: dict[str, tuple[int, int, tuple[str, ...]]]
        variants = {f"order{n}_{base.variant}": (n, STEPS, ()) for n in (1, 2, 3)}
        if base.variant in SCALED:
            variants[f"order1_{base.variant}_time"] = 1, STEPS_OF_EQUAL_TIME, ()
            for name, weight in SHARES.items():
                scaled = "training.third_order_scaling=dimension", f"training.third_order_weight={weight}"
                variants[f"order3_{base.variant}_{name}"] = 3, STEPS, (*scaled, "training.grad_shares=True")
        for variant, (n, steps, overrides) in variants.items():
            keys = *base.overrides, *length(steps), order(n), *FINE_TUNE, *overrides, "eval.enable_sampling=False"
            yield Run(f"orders_{data}", variant, base.seed, base.config, keys, after=base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--out", type=Path, default=Path("assets/reproduce"))
    parser.add_argument("--only", default=",".join(recipes.DATA), help="names of data sets, with commas between them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time")
    parser.add_argument("--collect", action="store_true", help="run nothing; the numbers of what is there")
    args = parser.parse_args()
    if unknown := [name for name in args.only.split(",") if name not in recipes.DATA]:
        parser.error(f"no data {', '.join(unknown)}; there are {', '.join(recipes.DATA)}")
    failures = []
    for data in args.only.split(","):
        runs = list(runs_of(data, args.seeds))
        failures += [] if args.collect else run_all(args.workdir, runs, args.jobs)
        for path in results.collect(args.workdir, f"orders_{data}", runs, args.out):
            print(path)
    if failures:
        raise UserError("; ".join(failures))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
