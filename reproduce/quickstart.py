# SPDX-License-Identifier: Apache-2.0
"""The main job in minutes on embedded data: `make quickstart`.

Trains the 1-D mixture of Gaussians at orders 1, 2 and 3 (same steps, same seed), evaluates each exactly, trains the 8x8
digits briefly and evaluates their test bits/dim. Every step is a `main.py` command, printed as it starts; two run at a
time. Started again, it does not repeat what is finished. A run's folder is named after its number of steps, so a call
with another number trains anew.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import report
from errors import UserError
from runtime.commands import run_main

MOG = "configs/toy/mog_ve.py"
DIGITS = "configs/digits/ve_ncsnpp.py"


def command(config: str, workdir: Path, mode: str, *overrides: str) -> None:
    """Runs `main.py`, its output in a file beside the workdir."""
    flags = (f"--config={config}", f"--workdir={workdir}", f"--mode={mode}", *overrides)
    run_main(workdir.with_suffix(f".{mode}.log"), *flags)


def train_and_evaluate(config: str, workdir: Path, *overrides: str) -> dict:
    """The result of evaluating a run's last checkpoint, from disk if it is there."""
    if not list((workdir / "eval").glob("report_*.json")):
        command(config, workdir, "train", *overrides)
        command(config, workdir, "eval", *overrides)
    results = [json.loads(path.read_text()) for path in (workdir / "eval").glob("report_*.json")]
    return max(results, key=lambda result: result["step"])


def steps(n: int) -> tuple[str, str]:
    """Overrides: n training steps, one snapshot at their end."""
    return f"--config.training.n_iters={n}", f"--config.training.snapshot_freq={n}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--mog_steps", type=int, default=20_000, help="training steps of each order")
    parser.add_argument("--digits_steps", type=int, default=1_800)
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    mixtures = {order: args.workdir / f"mog_order{order}_{args.mog_steps}" for order in (1, 2, 3)}
    digits = args.workdir / f"digits_{args.digits_steps}"
    with ThreadPoolExecutor(2 if (os.cpu_count() or 1) > 1 else 1) as pool:
        # longest first, so that the two columns end together
        jobs: dict[Any, Future] = {"digits": pool.submit(train_and_evaluate, DIGITS, digits, *steps(args.digits_steps))}
        for order in (3, 2, 1):
            overrides = (f"--config.training.score_matching_order={order}", *steps(args.mog_steps))
            jobs[order] = pool.submit(train_and_evaluate, MOG, mixtures[order], *overrides)
        results = {name: job.result() for name, job in jobs.items()}

    summary = {f"mog_order{order}_nll": results[order]["exact_nll"] for order in (1, 2, 3)}
    summary["mog_true_entropy"] = results[1]["true_entropy"]
    summary["digits_bpd"] = results["digits"]["bpd"]["mean"]
    summary["digits_bpd_stderr"] = results["digits"]["bpd"]["stderr"]
    summary["digits_gaussian_bpd"] = results["digits"]["gaussian_bpd"]
    summary["seconds"] = round(time.monotonic() - start, 1)
    (args.workdir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")

    rows = [
        {
            "run": f"1-D mixture, VE, order {order}",
            "NLL or bpd": f"{results[order]['exact_nll']:.4f} nats",
            "reference": f"{results[order]['true_entropy']:.4f} nats (entropy of the data)",
            "difference": f"{results[order]['kl']:.4f} nats = KL(data || model)",
        }
        for order in (1, 2, 3)
    ]
    rows.append(
        {
            "run": "8x8 digits, VE, order 1",
            "NLL or bpd": f"{summary['digits_bpd']:.3f} ± {summary['digits_bpd_stderr']:.3f} bits/dim",
            "reference": f"{summary['digits_gaussian_bpd']:.3f} bits/dim (Gaussian fitted to the training images)",
            "difference": f"{summary['digits_bpd'] - summary['digits_gaussian_bpd']:.3f} bits/dim",
        }
    )
    runs = {**{f"mixture, order {order}": folder for order, folder in mixtures.items()}, "8x8 digits": digits}
    page = report.write_summary(args.workdir / "report.html", "Quickstart", runs, rows)
    print(json.dumps(summary, indent=1))
    print(f"numbers: {args.workdir / 'summary.json'}\npictures: {page}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
