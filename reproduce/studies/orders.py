# SPDX-License-Identifier: Apache-2.0
"""What orders 2 and 3 are worth: fine-tunings of first-order models, on mixtures and images.

python -m reproduce.studies.orders [--only mixture_1,mixture_2,mixture_8,digits,patches,fashion_mnist] [--seeds 3]
                                   [--workdir runs/reproduce] [--collect]

On images, from the 2,000 steps of a recipe (ve, vp, vp_weighted, ml_vp; `reproduce.studies.recipes`) each order is
trained for 500 more. Order 3 also with its weight raised by the dimension (`training.third_order_scaling`) so far that
its share of the gradient is about a tenth and a third, and order 1 for as many seconds as order 3 takes. On mixtures
of 1, 2 and 8 dimensions (VE, exact Jacobians) from 10,000 steps for 5,000 more, with the weights of the config, and
with weights of such shares. Writes <out>/orders_<data>.json as `python -m reproduce` does: differences to order 1 are
seed by seed, and paired over the test images.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from errors import UserError
from reproduce import results
from reproduce.runner import Run, run_all
from reproduce.studies import FINE_TUNE, fine_tuning, length, order, recipes

STEPS = 500
STEPS_OF_EQUAL_TIME = 1_800  # of order 1: a step of order 3 takes some 3.6 times as long (`python -m benchmarks.step`)
BASES = ("ve", "vp", "vp_weighted", "ml_vp")
SCALED = ("ve", "ml_vp")  # whose third order is tried with larger weights, too
SHARES = {"share10": 0.4, "share30": 1.6}  # weight with third_order_scaling: `reproduce.studies.shares` of the digits
MIXTURE_STEPS = 5_000
# dimensions: how many times a step of order 1 order 3's takes, the weight of the second order at which it is a fifth of
# the gradient, and those of the third at which it is a tenth and a third (`training.grad_shares`, after 3,000 steps)
MIXTURES = {1: (2, 0.5, 0.06, 0.21), 2: (2, 2.0, 0.15, 0.56), 8: (4, 12.0, 0.25, 0.95)}
DATA = (*(f"mixture_{dim}" for dim in MIXTURES), *recipes.DATA)


def runs_of(data: str, seeds: int) -> Iterator[Run]:
    """The fine-tunings of each seed, each after its base."""
    kind, _, dim = data.partition("_")
    return mixture_runs(int(dim), seeds) if kind == "mixture" else image_runs(data, seeds)


def mixture_runs(dim: int, seeds: int) -> Iterator[Run]:
    slower, second, tenth, third = MIXTURES[dim]
    keys = f"data.dim={dim}", "training.grad_shares=True", "eval.enable_sampling=False", "eval.bound=True"
    weights = {f"order3_{name}": (3, second, weight) for name, weight in (("share10", tenth), ("share30", third))}
    variants = {"order2_share20": (2, second, 0.0), **weights}
    for seed in range(seeds):
        name, config = f"orders_mixture_{dim}", "configs/reproduce/mog_ve.py"
        base = Run(name, "base", seed, config, (order(1), *length(2 * MIXTURE_STEPS), *keys))
        yield base
        yield fine_tuning(name, "order1_time", base, 1, slower * MIXTURE_STEPS, *keys)
        for n in (1, 2, 3):
            yield fine_tuning(name, f"order{n}", base, n, MIXTURE_STEPS, *keys)
        for variant, (n, *of_terms) in variants.items():
            of_orders = zip(("second", "third"), of_terms, strict=True)
            factors = (f"training.{term}_order_weight={weight}" for term, weight in of_orders)
            yield fine_tuning(name, variant, base, n, MIXTURE_STEPS, *keys, *factors)


def image_runs(data: str, seeds: int) -> Iterator[Run]:
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
    parser.add_argument("--only", default=",".join(DATA), help="names of data sets, with commas between them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time")
    parser.add_argument("--collect", action="store_true", help="run nothing; the numbers of what is there")
    args = parser.parse_args()
    if unknown := [name for name in args.only.split(",") if name not in DATA]:
        parser.error(f"no data {', '.join(unknown)}; there are {', '.join(DATA)}")
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
