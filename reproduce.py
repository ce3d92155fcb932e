# SPDX-License-Identifier: Apache-2.0
"""The paper's claims on data at hand: `make reproduce`, or a part of it by name.

python reproduce.py [--only mog_ve,digits_ve] [--fast] [--seeds 1] [--workdir runs/reproduce] [--jobs 2]

Every training and evaluation is a `main.py` command, printed as it starts; `--jobs` run at a time. What is finished is
not repeated, and a training goes on where it was. Afterwards (or alone, with `--collect`) the numbers of what is there
go to `assets/reproduce/<experiment>.json` and the pictures beside them (`reproduce_results.py`). A workdir is
<workdir>/<experiment>/<variant>_seed<k>.
"""

import argparse
import concurrent.futures
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from commands import run_main
from errors import UserError

ORDERS = (1, 2, 3)
FINE_TUNE_STEPS = {"digits_ve": 500, "digits_vp": 500, "fashion_ve": 300, "fashion_vp": 300}
FINE_TUNE = ("optim.lr=0.001", "optim.warmup=50")


class Run(NamedTuple):
    """A training and its evaluations."""

    experiment: str
    variant: str
    seed: int
    config: str
    overrides: tuple[str, ...]
    after: "Run | None" = None  # whose last checkpoint it starts from
    evaluations: tuple[tuple[str, tuple[str, ...]], ...] = (("eval", ()),)  # folder, overrides

    @property
    def folder(self) -> Path:
        return Path(self.experiment, f"{self.variant}_seed{self.seed}")


def order(n: int) -> str:
    return f"training.score_matching_order={n}"


def length(n: int) -> tuple[str, ...]:
    """n steps with one snapshot at the end, which alone is evaluated."""
    return f"training.n_iters={n}", f"training.snapshot_freq={n}", "eval.begin_ckpt=1", "eval.end_ckpt=1"


def from_scratch(name: str, seeds: int, curves: bool) -> Iterator[Run]:
    """Each order for the same steps from the same initial weights. curves: of the last checkpoint of seed 0."""
    for seed in range(seeds):
        for n in ORDERS:
            run = Run(name, f"order{n}", seed, f"configs/reproduce/{name}.py", (order(n),))
            if curves and seed == 0:
                fisher = ("eval.begin_ckpt=0", "eval.end_ckpt=0", "eval.enable_bpd=False", "eval.enable_fisher=True")
                run = run._replace(evaluations=(*run.evaluations, ("eval_fisher", fisher)))
            yield run


def study(seeds: int) -> Iterator[Run]:
    """When the higher orders pay, on the mixture under VE: weights, learning rate, input scale, starting point."""
    config = "configs/reproduce/mog_ve.py"
    weights = {
        "order2_w0.1": (2, "training.second_order_weight=0.1"),
        "order2_w1": (2, "training.second_order_weight=1.0"),
        "order3_w0.1_0.01": (3, "training.second_order_weight=0.1", "training.third_order_weight=0.01"),
        "order3_w0.5_0.01": (3, "training.third_order_weight=0.01"),
        "order3_w0.5_1": (3, "training.third_order_weight=1.0"),
        "order3_w1_1": (3, "training.second_order_weight=1.0", "training.third_order_weight=1.0"),
        "order1_lr0.0003": (1, "optim.lr=0.0003"),
        "order2_lr0.0003": (2, "optim.lr=0.0003"),
        "order3_lr0.0003": (3, "optim.lr=0.0003"),
        "order1_scale5": (1, "model.sigma_data=5.0"),
        "order2_scale5": (2, "model.sigma_data=5.0"),
        "order3_scale5": (3, "model.sigma_data=5.0"),
        "order1_wide": (1, "model.nf=128", "model.num_layers=3"),
        "order2_wide": (2, "model.nf=128", "model.num_layers=3"),
        "order3_wide": (3, "model.nf=128", "model.num_layers=3"),
    }
    for seed in range(seeds):
        for variant, (n, *overrides) in weights.items():
            yield Run("mog_study", variant, seed, config, (order(n), *length(20_000), *overrides))
        first = Run("mog_ve", "order1", seed, config, (order(1),))
        for n in ORDERS:
            yield Run("mog_study", f"order{n}_finetuned", seed, config, (order(n), *length(10_000)), after=first)


def fine_tuned(name: str, seeds: int, curves: bool) -> Iterator[Run]:
    """A first-order model, and from its checkpoint each order for the same further steps."""
    config = f"configs/reproduce/{name}.py"
    steps = FINE_TUNE_STEPS[name]
    for seed in range(seeds):
        base = Run(name, "base", seed, config, (order(1),))
        yield base
        for n in ORDERS:
            run = Run(name, f"order{n}", seed, config, (order(n), *length(steps), *FINE_TUNE), after=base)
            if curves and seed == 0:
                fisher = ("eval.enable_bpd=False", "eval.enable_sampling=False", "eval.enable_fisher=True")
                run = run._replace(evaluations=(*run.evaluations, ("eval_fisher", fisher)))
            yield run


def experiments(fast: bool) -> dict[str, list[Run]]:
    """By name, in the order in which they run. fast: the mixture with one seed, and the digits at orders 1 and 3."""
    if fast:
        mixture = {name: list(from_scratch(name, 1, curves=True)) for name in ("mog_ve", "mog_vp")}
        digits = [run for run in fine_tuned("digits_ve", 1, curves=False) if run.variant != "order2"]
        return {"digits_ve": digits, **mixture}
    return {
        "mog_ve": list(from_scratch("mog_ve", 5, curves=True)),
        "mog_vp": list(from_scratch("mog_vp", 5, curves=True)),
        "digits_ve": list(fine_tuned("digits_ve", 3, curves=True)),
        "checkerboard_ve": list(from_scratch("checkerboard_ve", 5, curves=False)),
        "swissroll_ve": list(from_scratch("swissroll_ve", 5, curves=False)),
        "mog_study": list(study(3)),
        "digits_vp": list(fine_tuned("digits_vp", 3, curves=True)),
        "fashion_ve": list(fine_tuned("fashion_ve", 3, curves=False)),
        "fashion_vp": list(fine_tuned("fashion_vp", 3, curves=False)),
    }


def command(workdir: Path, run: Run, mode: str, *overrides: str, eval_folder: str = "eval") -> None:
    """Runs `main.py`, its output in a file beside the run's workdir."""
    folder = workdir / run.folder
    flags = [f"--config={run.config}", f"--workdir={folder}", f"--mode={mode}"]
    flags += [f"--config.{override}" for override in (f"seed={run.seed}", *run.overrides, *overrides)]
    if mode == "eval":
        flags.append(f"--eval_folder={eval_folder}")
    run_main(folder.with_name(f"{folder.name}.{eval_folder if mode == 'eval' else mode}.log"), *flags)


def do(workdir: Path, run: Run, predecessor: concurrent.futures.Future | None) -> None:
    """Trains and evaluates a run, unless its results are there. A mark says that an evaluation is whole."""
    start = []
    if run.after is not None:
        if predecessor is not None:
            predecessor.result()
        checkpoints = workdir / run.after.folder / "checkpoints"
        numbers = [int(path.name.rpartition("_")[2]) for path in checkpoints.glob("checkpoint_*")]
        if not numbers:
            raise UserError(f"{checkpoints} has no checkpoint for {run.folder}; run {run.after.experiment} first")
        start = [f"training.init_from={checkpoints / f'checkpoint_{max(numbers)}'}"]
    marks = [workdir / run.folder / folder / "whole" for folder, _ in run.evaluations]
    if not all(mark.exists() for mark in marks):
        command(workdir, run, "train", *start)
    for (folder, overrides), mark in zip(run.evaluations, marks, strict=True):
        if not mark.exists():
            command(workdir, run, "eval", *start, *overrides, eval_folder=folder)
            mark.touch()


def run_all(workdir: Path, runs: list[Run], jobs: int) -> list[str]:
    """Runs them `jobs` at a time, each after the one it starts from; one line for each that failed."""
    futures: dict[Path, concurrent.futures.Future] = {}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for run in runs:
            before = None if run.after is None else futures.get(run.after.folder)
            futures[run.folder] = pool.submit(do, workdir, run, before)
    failures = {folder: future.exception() for folder, future in futures.items()}
    unexpected = [error for error in failures.values() if error is not None and not isinstance(error, UserError)]
    if unexpected:
        raise unexpected[0]
    return [f"{folder}: {error}" for folder, error in failures.items() if error is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--out", type=Path, default=Path("assets/reproduce"), help="folder of numbers and pictures")
    parser.add_argument("--only", default="", help="names of experiments, with commas between them; all if empty")
    parser.add_argument("--fast", action="store_true", help="one seed of the mixtures, the digits at orders 1 and 3")
    parser.add_argument("--seeds", type=int, default=0, help="only the first so many of each; 0: all")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="commands at a time")
    parser.add_argument("--collect", action="store_true", help="run nothing; numbers and pictures of what is there")
    args = parser.parse_args()
    known = experiments(args.fast)
    names = args.only.split(",") if args.only else list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no experiment {', '.join(unknown)}; there are {', '.join(known)}")
    known = {name: [run for run in runs if not args.seeds or run.seed < args.seeds] for name, runs in known.items()}
    failures = []
    if not args.collect:
        failures = run_all(args.workdir, [run for name in names for run in known[name]], args.jobs)
    import reproduce_results  # late: it imports JAX

    for name in names:
        for path in reproduce_results.collect(args.workdir, name, known[name], args.out):
            print(path)
    if failures:
        sys.exit("error: " + "\n".join(failures))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
