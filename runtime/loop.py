# SPDX-License-Identifier: Apache-2.0
"""The training loop of `--mode train` and `--mode train_deq`: steps, logs, checkpoints, signals, bad steps."""

import collections
import contextlib
import datetime
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

import checkpoints
import losses
from errors import UserError
from runtime.devices import first, replicate, shard
from runtime.interrupts import StopRequest
from runtime.launch import program_memory
from runtime.records import MetricsLog, Pending
from runtime.trackers import open_trackers
from task import Config

# Calls of the step that may be under way while the host goes on; their metrics are read afterwards.
_IN_FLIGHT = 2


class Job(NamedTuple):
    """What is trained, and how.

    p_step is a pmap of n steps: (state, x [devices, n, B / devices, ...], frozen) -> (state, metrics [devices, n]).
    """

    config: Config  # its `training` section sets the frequencies
    directory: Path
    state: losses.TrainState  # on the host
    record: dict[str, Any]  # of the checkpoint that the state comes from
    loader: Any  # iterator of {'x', 'index'} with get_state and set_state
    p_step: Any
    n_iters: int
    eval_fn: Callable[[losses.TrainState], tuple[dict[str, float], dict[str, np.ndarray]]]  # means, of each example [b]
    frozen: Any = ()  # parameters that do not change; as constants of the program they would swell it
    on_snapshot: Callable[[losses.TrainState, int], bytes | None] | None = None  # saves samples; gives a PNG of them
    facts: dict[str, Any] | None = None  # saved with each checkpoint
    snapshot_number: Callable[[int], int] = lambda step: step


def compiled(p_step: Any, *args: Any) -> Any:
    """The pmapped step, compiled for arguments of these shapes. Logs its compile time and the memory it needs."""
    if jax.process_count() > 1:  # only the pmap itself joins the hosts' arrays
        return p_step
    logging.info("compiling the training step; minutes for a large network or an order above 1")
    start = time.monotonic()
    program = p_step.lower(*args).compile()
    seconds, memory = time.monotonic() - start, program_memory(program.memory_analysis())
    logging.info("compiled in %.1f s%s", seconds, f"; it needs {memory}" if memory else "")
    return program


def run(job: Job) -> losses.TrainState:
    """Trains to `n_iters` steps or to a SIGTERM or SIGINT; returns the state, on the host, saved either way.

    UserError after `training.max_bad_steps` bad steps in a row, with the last good state saved.
    """
    with StopRequest() as stop, contextlib.closing(_Loop(job)) as loop:
        return loop.run(stop)


class _Loop:
    def __init__(self, job: Job):
        self.job, self.training = job, job.config.training
        self.step = int(job.state.step)
        self.state, self.frozen = replicate(job.state), replicate(job.frozen)
        self.is_writer = jax.process_index() == 0
        if "loader" in job.record:
            job.loader.set_state(job.record["loader"])
        self.pending = Pending(job.record.get("pending"))
        self.bad_in_a_row = job.record.get("bad_in_a_row", 0)
        self.in_flight: collections.deque = collections.deque()
        self.log = None
        if self.is_writer:
            trackers = open_trackers(job.directory, self.step, self.training.wandb_project, job.config.to_dict())
            self.log = MetricsLog(job.directory, self.step, trackers)

    def run(self, stop: StopRequest) -> losses.TrainState:
        job, training, jitted = self.job, self.training, self.training.n_jitted_steps
        clock, programs = None, {}
        for x, index in _grouped(job.loader, jitted, first=jitted - self.step % jitted):
            if self.step >= job.n_iters:
                break
            if x.shape not in programs:  # the first call after a resume may be shorter
                programs[x.shape] = compiled(job.p_step, self.state, x, self.frozen)
            clock = clock or _Clock(self.step)
            self.state, metrics = programs[x.shape](self.state, x, self.frozen)
            self.step += len(index)
            self.in_flight.append((self.step, metrics, index))
            self._settle(_IN_FLIGHT)
            final = self.step >= job.n_iters
            if self.step % training.log_freq == 0:
                self._log_train(clock)
            evaluating = self.step % training.eval_freq == 0
            snapshot = self.step % training.snapshot_freq == 0 or final
            if evaluating or snapshot:  # on every host: its means go over all of them
                means, per_example = job.eval_fn(self.state)
                if evaluating:
                    self._write("eval", means)
                if snapshot:
                    self._save("checkpoints", job.snapshot_number(self.step), keep=0)
                    self._track_snapshot(per_example)
            stopping, due = stop.agreed(clock.minutes_since_save() >= training.snapshot_minutes_for_preemption > 0)
            stopping = stopping and not final
            if self.step % training.snapshot_freq_for_preemption == 0 or final or due or stopping:
                path = self._save("checkpoints-meta", self.step, keep=2)
                clock.saved()
            if stopping:
                logging.info("stopped by %s after step %d; run again to go on from %s", stop.signal, self.step, path)
                break
        return first(self.state)

    def close(self) -> None:
        if self.log is not None:
            self.log.close()

    def _track_snapshot(self, per_example: dict[str, np.ndarray]) -> None:
        """Histograms of the losses of the first host's test examples, and samples, which all hosts draw."""
        picture = self.job.on_snapshot(self.state, self.step) if self.job.on_snapshot is not None else None
        if self.log is not None:
            self.log.histograms(self.step, "eval_examples", per_example)
            if picture is not None:
                self.log.image(self.step, "samples", "grid", picture)

    def _settle(self, allowed: int) -> None:
        """Reads the metrics of all but the last `allowed` calls; tells of skipped steps and may end the run."""
        while len(self.in_flight) > allowed:
            step, metrics, index = self.in_flight.popleft()
            values = {name: _of_first_device(value) for name, value in metrics.items()}
            self.pending.add(values)
            for i, skipped in enumerate(values["skipped"]):
                self.bad_in_a_row = self.bad_in_a_row + 1 if skipped else 0
                if skipped:
                    bad_step = step - len(values["skipped"]) + i + 1
                    self._tell_of(bad_step, {name: float(v[i]) for name, v in values.items()}, index[i])
                if self.bad_in_a_row >= self.training.max_bad_steps:
                    self._give_up()

    def _tell_of(self, step: int, values: dict[str, float], index: np.ndarray) -> None:
        logging.warning(
            "step %d skipped: loss %s, gradient norm %s; its examples are in metrics.jsonl",
            step,
            values["loss"],
            values["grad_norm"],
        )
        if self.log is not None:
            values = {"loss": values["loss"], "grad_norm": values["grad_norm"], "index": index.tolist()}
            self.log.note(step, "skipped", values)

    def _give_up(self) -> None:
        bad, self.bad_in_a_row = self.bad_in_a_row, 0
        self.in_flight.clear()  # skipped or not, they are in the state; their metrics are lost
        path = self._save("checkpoints-meta", self.step, keep=2)
        raise UserError(
            f"training.max_bad_steps={bad} steps in a row, before step {self.step}, had a loss or gradient that is not "
            f"finite; the last good state is in {path}. Lower optim.lr, or look at the examples in metrics.jsonl"
        )

    def _log_train(self, clock: "_Clock") -> None:
        self._settle(0)
        means = self.pending.means()
        self._write("train", means)
        n_iters = self.job.n_iters
        speed, left = clock.speed(self.step), clock.left(self.step, n_iters)
        logging.info("step %d/%d  %s  %.3g steps/s  ETA %s", self.step, n_iters, shown(means), speed, left)

    def _write(self, split: str, values: dict[str, float]) -> None:
        if self.log is not None:
            self.log.write(self.step, split, values)

    def _save(self, folder: str, number: int, keep: int) -> Path:
        self._settle(0)
        directory = self.job.directory / folder
        if not self.is_writer:
            return directory / f"checkpoint_{number}"
        record = {
            "loader": self.job.loader.get_state(),
            "pending": self.pending.values,
            "bad_in_a_row": self.bad_in_a_row,
            "config": self.job.config.to_dict(),
            **(self.job.facts or {}),
        }
        return checkpoints.save(directory, first(self.state), number, record, keep)


def shown(means: dict[str, float]) -> str:
    """For the console: the loss, its terms if there are several, the gradient's norm. A term that is off is 0."""
    terms = [name for name, value in means.items() if value and name not in ("loss", "grad_norm", "skipped")]
    names = ["loss", *(terms if len(terms) > 1 else ()), "grad_norm"]
    return "  ".join(f"{name} {means[name]:.4g}" for name in names)


class _Clock:
    """Of this launch, from its first step on, compiled already."""

    def __init__(self, step: int):
        self._start = self._time = self._saved = time.monotonic()
        self._first_step = self._step = step

    def speed(self, step: int) -> float:
        """Steps a second since the last call."""
        now = time.monotonic()
        speed = (step - self._step) / (now - self._time)
        self._time, self._step = now, step
        return speed

    def left(self, step: int, n_iters: int) -> datetime.timedelta:
        """To the last step, at the mean pace of this launch, evaluations and snapshots included."""
        seconds = (time.monotonic() - self._start) / (step - self._first_step)
        return datetime.timedelta(seconds=round((n_iters - step) * seconds))

    def minutes_since_save(self) -> float:
        return (time.monotonic() - self._saved) / 60

    def saved(self) -> None:
        self._saved = time.monotonic()


def _of_first_device(value: jax.Array) -> np.ndarray:
    """[n], of metrics [devices, n] that are equal on all devices."""
    return np.asarray(value.addressable_data(0)).reshape(-1)


def _grouped(loader: Any, n: int, first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """n batches for one call of the step: x [local devices, n, B / devices, ...], example index [n, B].

    The first call has `first` batches: what a run stopped between multiples of n lacks to the next one, at which all
    that is due every so many steps falls due.
    """
    for count in itertools.chain([first], itertools.repeat(n)):
        batches = [next(loader) for _ in range(count)]
        yield np.stack([shard(b["x"]) for b in batches], axis=1), np.stack([b["index"] for b in batches])
