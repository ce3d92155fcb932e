# SPDX-License-Identifier: Apache-2.0
"""The main job in minutes on embedded data: `make quickstart`.

Trains the 1-D mixture of Gaussians at orders 1, 2 and 3 (same steps, same seed), evaluates each exactly, trains the 8x8
digits by the recipe for bits/dim and evaluates them on the test images. Every step is a `main.py` command, printed as
it starts; two run at a time. What is finished is not repeated, but another number of steps is another run.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import report
from errors import UserError
from report.run_files import load
from reproduce.runner import Run, run_all

ORDERS = (1, 2, 3)


def runs_of(mog_steps: int, digits_steps: int) -> dict[str, Run]:
    """Label -> run."""

    def run(name: str, config: str, steps: int, *overrides: str) -> Run:
        length = f"training.n_iters={steps}", f"training.snapshot_freq={steps}"
        return Run("", f"{name}_{steps}", 42, config, (*overrides, *length))

    order = {n: f"training.score_matching_order={n}" for n in ORDERS}
    runs = {f"mixture, order {n}": run(f"mog_order{n}", "configs/toy/mog_ve.py", mog_steps, order[n]) for n in ORDERS}
    return {**runs, "8x8 digits": run("digits", "configs/ml/digits.py", digits_steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--mog_steps", type=int, default=10_000, help="training steps of each order")
    parser.add_argument("--digits_steps", type=int, default=1_200)
    args = parser.parse_args()
    start = time.monotonic()
    runs = runs_of(args.mog_steps, args.digits_steps)
    longest_first = list(runs.values())[::-1]  # so that the two columns end together
    if failures := run_all(args.workdir, longest_first, min(2, os.cpu_count() or 1)):
        raise UserError("; ".join(failures))
    folders = {label: args.workdir / run.folder for label, run in runs.items()}
    *mixtures, digits = (load(folder).results[-1] for folder in folders.values())
    bpd, baselines = digits["bpd"], {**digits["baselines"], "gaussian": digits["gaussian_bpd"]}
    summary, rows = {}, []
    for n, result in zip(ORDERS, mixtures, strict=True):
        summary[f"mog_order{n}_nll"] = result["exact_nll"]
        nll, entropy = (f"{result[key]:.4f} nats" for key in ("exact_nll", "true_entropy"))
        gap = f"{result['kl']:.4f} nats = KL(data || model)"
        rows.append((f"1-D mixture, VE, order {n}", nll, f"{entropy} (entropy of the data)", gap))
    summary |= {"mog_true_entropy": mixtures[0]["true_entropy"], "digits_bpd": bpd["mean"]}
    summary |= {"digits_bpd_stderr": bpd["stderr"], "digits_baselines_bpd": baselines}
    summary |= {f"digits_{name}_bpd": baselines[name] for name in ("histogram", "png")}
    summary["seconds"] = round(time.monotonic() - start, 1)
    (args.workdir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    of_digits = f"{bpd['mean']:.3f} ± {bpd['stderr']:.3f} bits/dim"
    beside = f"{baselines['histogram']:.3f} (histogram of each pixel), {baselines['png']:.3f} (PNG)"
    rows.append(("8x8 digits, order 1", of_digits, beside, f"{bpd['mean'] - baselines['histogram']:.3f} bits/dim"))
    columns: list[str] = ["run", "NLL or bpd", "reference", "difference"]
    table = [dict(zip(columns, row, strict=True)) for row in rows]
    page = report.write_summary(args.workdir / "report.html", "Quickstart", folders, table)
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    print(f"numbers: {args.workdir / 'summary.json'}\npictures: {page}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
