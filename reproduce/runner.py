# SPDX-License-Identifier: Apache-2.0
"""Runs commands unless they are done, and lists of runs several at a time."""

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from errors import UserError

TELL_S = 15.0
# of a training, "step 300/1800  loss 0.31 ... ETA 0:02:00", or of an evaluation, "sampling: 1 of 4  ETA 0:00:30"
PROGRESS = re.compile(r"^[\d:]{8} ((?:step |[\w ,]+: )(?P<done>\d+)(?:/| of )(?P<total>\d+)(?P<what>.*))", re.M)


class Run(NamedTuple):
    """A training and its evaluations. `overrides` are 'section.key=value' of the config."""

    experiment: str
    variant: str
    seed: int
    config: str  # its file
    overrides: tuple[str, ...]
    after: "Run | None" = None  # the run whose last checkpoint this one starts from
    evaluations: tuple[tuple[str, tuple[str, ...]], ...] = (("eval", ()),)  # folder, overrides

    @property
    def folder(self) -> Path:
        return Path(self.experiment, f"{self.variant}_seed{self.seed}")


def run_python(log: Path, *command: str) -> None:
    """Runs `python` with the command, which is printed. Its output goes to `log`, and its progress to the terminal.

    UserError with the last line of that output if the exit code is not 0.
    """
    tqdm.write(" ".join(("python", *command)))
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w") as file,
        subprocess.Popen([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT) as run,
    ):
        try:
            code = _watched(run, log)
        except BaseException:
            run.kill()
            raise
    if code:
        last = (log.read_text().strip().splitlines() or ["no output"])[-1]
        raise UserError(f"the command ended with exit code {code} ({last}); see {log}")


def _watched(run: subprocess.Popen, log: Path) -> int:
    """Waits for the exit code. Shows how far the run is: a bar in a terminal, else a line every `TELL_S` seconds."""
    told = time.monotonic()
    with log.open(errors="replace") as lines, tqdm(desc=log.stem, leave=False, disable=None) as bar:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.wait(1.0)
            code = run.poll()
            for step in PROGRESS.finditer(lines.read()):
                number, bar.total, what = int(step["done"]), int(step["total"]), step["what"].strip()
                if time.monotonic() - told >= TELL_S and bar.disable:
                    print(f"  {log.stem}: {step[1]}\n", end="", flush=True)  # in one write: several threads print
                    told = time.monotonic()
                bar.set_postfix_str(what, refresh=False)
                bar.update(number - bar.n)
            if code is not None:
                return code


def run_unless_done(mark: Path, log: Path, *command: str) -> None:
    """Runs `python` with the command unless the file `mark` exists, and then makes that file."""
    if not mark.exists():
        run_python(log, *command)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def do(workdir: Path, run: Run, predecessor: Future | None) -> None:
    """Trains and evaluates a run, except for what is done. Outputs go to files beside its folder.

    Raises what the predecessor, the run that this one starts from, has raised.
    """
    folder, start = workdir / run.folder, ()
    if run.after is not None:
        if predecessor is not None:
            predecessor.result()
        checkpoints = workdir / run.after.folder / "checkpoints"
        numbers = [int(path.name.rpartition("_")[2]) for path in checkpoints.glob("checkpoint_*")]
        if not numbers:
            raise UserError(f"{checkpoints} has no checkpoint for {run.folder}; run {run.after.experiment} first")
        start = (f"training.init_from={checkpoints / f'checkpoint_{max(numbers)}'}",)

    def command(mode: str, *overrides: str) -> list[str]:
        keys = (f"seed={run.seed}", *run.overrides, *start, *overrides)
        flags = (f"--config={run.config}", f"--workdir={folder}", f"--mode={mode}")
        return ["main.py", *flags, *(f"--config.{key}" for key in keys)]

    marks = [folder / name / "whole" for name, _ in run.evaluations]
    if not marks or not all(mark.exists() for mark in marks):
        run_python(Path(f"{folder}.train.log"), *command("train"))
    for (name, overrides), mark in zip(run.evaluations, marks, strict=True):
        run_unless_done(mark, Path(f"{folder}.{name}.log"), *command("eval", *overrides), f"--eval_folder={name}")


def with_predecessors(runs: Sequence[Run]) -> list[Run]:
    """The runs, each behind the one it starts from. That one is not evaluated unless it is among `runs`."""
    listed = {run.folder: run for run in runs}
    result: dict[Path, Run] = {}

    def add(run: Run) -> None:
        if run.after is not None:
            add(listed.get(run.after.folder, run.after._replace(evaluations=())))
        result.setdefault(run.folder, run)

    for run in runs:
        add(run)
    return list(result.values())


def run_all(workdir: Path, runs: Sequence[Run], jobs: int) -> list[str]:
    """Runs them `jobs` at a time, each after the one it starts from. Returns a line for each that failed, in order."""
    everything = with_predecessors(runs)
    futures: dict[Path, Future] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while waiting := [run for run in everything if run.folder not in futures]:
            under_way = {future for future in futures.values() if not future.done()}
            for run in waiting:
                predecessor = futures.get(run.after.folder) if run.after else None
                if run.after is None or (predecessor is not None and predecessor not in under_way):
                    futures[run.folder] = pool.submit(do, workdir, run, predecessor)
                    under_way.add(futures[run.folder])
            wait(under_way, return_when=FIRST_COMPLETED)
    failures = {run.folder: error for run in everything if (error := futures[run.folder].exception()) is not None}
    for error in failures.values():
        if not isinstance(error, UserError):
            raise error
    return [f"{folder}: {error}" for folder, error in failures.items()]
