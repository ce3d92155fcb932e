# SPDX-License-Identifier: Apache-2.0
"""Runs experiments as `main.py` commands, several at a time, and goes on where an earlier call was stopped."""

import concurrent.futures
from collections.abc import Sequence
from pathlib import Path

from errors import UserError
from reproduce.experiments import Run
from runtime.commands import run_main


def command(workdir: Path, run: Run, mode: str, *overrides: str, eval_folder: str = "eval") -> None:
    """Runs `main.py`, its output in a file beside the run's workdir."""
    folder = workdir / run.folder
    flags = [f"--config={run.config}", f"--workdir={folder}", f"--mode={mode}"]
    flags += [f"--config.{override}" for override in (f"seed={run.seed}", *run.overrides, *overrides)]
    if mode == "eval":
        flags.append(f"--eval_folder={eval_folder}")
    run_main(folder.with_name(f"{folder.name}.{eval_folder if mode == 'eval' else mode}.log"), *flags)


def with_predecessors(runs: Sequence[Run]) -> list[Run]:
    """The runs, each behind the one it starts from; of one that was not asked for there is no evaluation."""
    listed = {run.folder: run for run in runs}
    result: dict[Path, Run] = {}

    def add(run: Run) -> None:
        if run.after is not None:
            add(listed.get(run.after.folder, run.after._replace(evaluations=())))
        result.setdefault(run.folder, run)

    for run in runs:
        add(run)
    return list(result.values())


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
    if not marks or not all(mark.exists() for mark in marks):
        command(workdir, run, "train", *start)
    for (folder, overrides), mark in zip(run.evaluations, marks, strict=True):
        if not mark.exists():
            command(workdir, run, "eval", *start, *overrides, eval_folder=folder)
            mark.touch()


def run_all(workdir: Path, runs: Sequence[Run], jobs: int) -> list[str]:
    """Runs them `jobs` at a time, each after the one it starts from; one line for each that failed, in their order."""
    everything = with_predecessors(runs)
    waiting = list(everything)
    futures: dict[Path, concurrent.futures.Future] = {}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        while waiting:
            under_way = [future for future in futures.values() if not future.done()]
            ready = [run for run in waiting if run.after is None or _is_done(futures.get(run.after.folder))]
            for run in ready[: jobs - len(under_way)]:
                waiting.remove(run)
                before = None if run.after is None else futures[run.after.folder]
                futures[run.folder] = pool.submit(do, workdir, run, before)
                under_way.append(futures[run.folder])
            concurrent.futures.wait(under_way, return_when=concurrent.futures.FIRST_COMPLETED)
    failures = {run.folder: futures[run.folder].exception() for run in everything}
    unexpected = [error for error in failures.values() if error is not None and not isinstance(error, UserError)]
    if unexpected:
        raise unexpected[0]
    return [f"{folder}: {error}" for folder, error in failures.items() if error is not None]


def _is_done(future: concurrent.futures.Future | None) -> bool:
    return future is not None and future.done()
