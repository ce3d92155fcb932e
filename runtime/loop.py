# SPDX-License-Identifier: Apache-2.0
"""The training loop of `--mode train` and `--mode train_deq`: steps, logs, checkpoints, signals, bad steps."""

import collections
import contextlib
import datetime
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

import checkpoints
import datasets
import losses
import report
from configs.check import flatten
from configs.resume import BY_MACHINE
from errors import UserError
from runtime import hosts, launch
from runtime.devices import all_devices, digest, first, memory_limit, on_this_host, replicate, shard
from runtime.records import MetricsLog, Pending
from runtime.trackers import open_trackers
from task import Config, Task

# Calls of the step that may be under way while the host goes on; their metrics are read afterwards.
_IN_FLIGHT = 2


class Job(NamedTuple):
    """What is trained, and how. The config's `training` section sets the frequencies."""

    task: Task
    what: str  # the console's name of it
    directory: Path
    state: losses.TrainState  # on the host
    record: dict[str, Any]  # of the checkpoint that the state comes from
    facts: dict[str, str]  # saved with each checkpoint; with a `parent` the data come in an order of their own
    loss_fn_of: Callable[..., losses.LossFn]  # (frozen, train=True) -> loss, with dropout if `train`
    data_config: Config
    n_iters: int
    ema_rate: float
    term_weights: Mapping[str, float] | None = None  # of terms whose shares in the gradient are logged
    frozen: Any = ()  # parameters that do not change; as constants of the program they would swell it
    on_snapshot: Callable[[losses.TrainState, int], bytes | None] | None = None  # saves samples; returns a PNG of them


def run(job: Job) -> losses.TrainState:
    """Trains to `n_iters` steps or to a SIGTERM or SIGINT. Returns the state, on the host, saved either way.

    Raises UserError after `training.max_bad_steps` bad steps in a row, with the last good state saved.
    """
    config, directory = job.task.config, job.directory
    if jax.process_count() > 1:
        check_hosts(config, digest((job.state, job.frozen)))
    launch.record(directory, config, int(job.state.step))
    launch.log_start(job.task, job.state, job.what, job.n_iters)
    with hosts.StopRequest() as stop, contextlib.closing(_Loop(job)) as loop:
        state = loop.run(stop)
    if jax.process_index() == 0:
        places = {
            "checkpoints": f"{directory / 'checkpoints'} (kept), {directory / 'checkpoints-meta'} (to resume from)",
            "metrics": f"{directory / 'metrics.jsonl'}; tensorboard --logdir {directory / 'tensorboard'}",
            **({"samples": str(directory / "samples")} if job.on_snapshot else {}),
            "report": str(report.write_report(directory)),
        }
        done = "done" if int(state.step) >= job.n_iters else "stopped"
        launch.log_table(f"{done} at step {int(state.step)} of {job.n_iters}", places)
    return state


def check_hosts(config: Config, digest_of_arrays: str) -> None:
    """Raises UserError, on every host, if they do not all have one config and the same arrays."""
    common = {key: value for key, value in flatten(config).items() if key not in BY_MACHINE}
    hosts.check_same(f"{common} {digest_of_arrays}")


def compiled(step_of: Callable[[int], Any], parts: int, batch: int, limit: float, *args: Any) -> Any:
    """The pmapped step `step_of(parts)` in `parts` micro-batches, compiled for arguments of these shapes.

    Logs its compile time and the memory it needs. If that is more than `limit` bytes of a device, raises UserError
    with the number of micro-batches that fits, a divisor of the device's `batch`, found by compiling.
    """
    if jax.process_count() > 1:  # only the pmap itself joins the hosts' arrays
        return step_of(parts)
    program, memory = _with_memory(step_of(parts), args)
    if memory is None or memory.total <= limit:
        return program
    found = "no training.num_microbatches makes it fit: try model.remat, a smaller batch or network, or more devices"
    for count in (count for count in range(parts + 1, batch + 1) if batch % count == 0):
        if memory.held + memory.temporary * parts / count > limit:
            continue
        _, smaller = _with_memory(step_of(count), args)
        if smaller and smaller.total <= limit:
            found = f"with --config.training.num_microbatches={count}, and the same gradients, it takes {smaller}"
            break
    raise UserError(f"the training step takes {memory}, which has {launch.size(limit)}; {found}")


def _with_memory(p_step: Any, args: tuple) -> tuple[Any, launch.Memory | None]:
    logging.info("compiling the training step; minutes for a large network or an order above 1")
    start = time.monotonic()
    program = p_step.lower(*args).compile()
    seconds, memory = time.monotonic() - start, launch.program_memory(program.memory_analysis())
    logging.info("compiled in %.1f s%s", seconds, f"; it needs {memory}" if memory else "")
    return program, memory


class _Loop:
    def __init__(self, job: Job):
        config = job.task.config
        self.job, self.training = job, config.training
        self.step = int(job.state.step)
        self.state, self.frozen = replicate(job.state), replicate(job.frozen)
        self.is_writer = jax.process_index() == 0
        self.eval_fn, self.shares_fn = _eval_fn(job), _pmapped_shares(job)
        self.loader = datasets.train_loader(
            job.task.dataset,
            job.data_config,
            batch_size=self.training.batch_size,
            seed=config.seed + (int(job.facts.get("parent", "")[:8] or "0", 16) << 32),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        if "loader" in job.record:
            self.loader.set_state(job.record["loader"])
        self.pending = Pending(job.record.get("pending"))
        self.bad_in_a_row = job.record.get("bad_in_a_row", 0)
        self.in_flight: collections.deque = collections.deque()
        path, trackers = Path(os.devnull), []  # of the hosts that do not write
        if self.is_writer:
            path = job.directory / "metrics.jsonl"
            trackers = open_trackers(job.directory, self.step, self.training.wandb_project, config.to_dict())
        self.log = MetricsLog(path, self.step, trackers)

    def run(self, stop: hosts.StopRequest) -> losses.TrainState:
        job, training, jitted = self.job, self.training, self.training.n_jitted_steps
        clock, programs = None, {}
        for x, index in _grouped(self.loader, jitted, first=jitted - self.step % jitted):
            if self.step >= job.n_iters:
                break
            if x.shape not in programs:  # the first call after a resume may be shorter
                programs[x.shape] = self._compiled(x)
            clock = clock or _Clock(self.step)
            self.state, metrics = programs[x.shape](self.state, x, self.frozen)
            self.step += len(index)
            self.in_flight.append((self.step, metrics, index))
            self._settle(_IN_FLIGHT)
            final = self.step >= job.n_iters
            if self.step % training.log_freq == 0:
                self._log_train(clock, x)
            evaluating = self.step % training.eval_freq == 0
            snapshot = self.step % training.snapshot_freq == 0 or final
            if evaluating or snapshot:  # on every host: its means go over all of them
                means, per_example = self.eval_fn(self.state)
                if evaluating:
                    self.log.write(self.step, "eval", means)
                if snapshot:
                    self._snapshot(per_example)
            stopping, due = stop.agreed(clock.minutes_since_save() >= training.snapshot_minutes_for_preemption > 0)
            stopping = stopping and not final
            if self.step % training.snapshot_freq_for_preemption == 0 or final or due or stopping:
                path = self._save("checkpoints-meta", self.step, keep=2)
                clock.saved = time.monotonic()
            if stopping:
                logging.info("stopped by %s after step %d; run again to go on from %s", stop.signal, self.step, path)
                break
        return first(self.state)

    def close(self) -> None:
        self.log.close()

    def _compiled(self, x: np.ndarray) -> Any:
        limit = memory_limit(self.training.device_memory_gib)
        step_of = functools.partial(_pmapped_steps, self.job)
        return compiled(step_of, self.training.num_microbatches, x.shape[2], limit, self.state, x, self.frozen)

    def _snapshot(self, per_example: dict[str, np.ndarray]) -> None:
        """Saves a kept checkpoint, histograms of the losses of the first host's test examples, and samples."""
        # Snapshot k is the one after k * snapshot_freq steps; the last one may be one step later (n_iters = k f + 1).
        self._save("checkpoints", max(1, math.ceil((self.step - 1) / self.training.snapshot_freq)), keep=0)
        self.log.histograms(self.step, "eval_examples", per_example)
        if self.job.on_snapshot is not None:  # on every host: each draws its share
            picture = self.job.on_snapshot(self.state, self.step)
            if picture is not None:
                self.log.image(self.step, "samples", "grid", picture)

    def _settle(self, allowed: int) -> None:
        """Reads the metrics of all but the last `allowed` calls, warns of skipped steps and may end the run."""
        while len(self.in_flight) > allowed:
            last_step, metrics, index = self.in_flight.popleft()
            # [n]: the metrics [devices, n] are equal on all devices
            values = {name: np.asarray(value.addressable_data(0)).reshape(-1) for name, value in metrics.items()}
            self.pending.add(values)
            for i, skipped in enumerate(values["skipped"]):
                self.bad_in_a_row = self.bad_in_a_row + 1 if skipped else 0
                if skipped:
                    step = last_step - len(index) + i + 1
                    loss, norm = float(values["loss"][i]), float(values["grad_norm"][i])
                    note = "step %d skipped: loss %s, gradient norm %s; its examples are in metrics.jsonl"
                    logging.warning(note, step, loss, norm)
                    self.log.note(step, "skipped", {"loss": loss, "grad_norm": norm, "index": index[i].tolist()})
                if self.bad_in_a_row >= self.training.max_bad_steps:
                    self._give_up()

    def _give_up(self) -> None:
        bad, self.bad_in_a_row = self.bad_in_a_row, 0
        self.in_flight.clear()  # these steps, skipped or not, are in the state; their metrics are lost
        path = self._save("checkpoints-meta", self.step, keep=2)
        raise UserError(
            f"training.max_bad_steps={bad} steps in a row, before step {self.step}, had a loss or gradient that is not "
            f"finite; the last good state is in {path}. Lower optim.lr, or look at the examples in metrics.jsonl"
        )

    def _log_train(self, clock: "_Clock", x: np.ndarray) -> None:
        self._settle(0)
        means, n_iters = self.pending.means(), self.job.n_iters
        shares = self.shares_fn(self.state, x[:, -1]) if self.job.term_weights else {}
        shares = {name: float(value.addressable_data(0)[0]) for name, value in shares.items()}
        self.log.write(self.step, "train", means | shares)
        speed, left = clock.speed(self.step), clock.left(self.step, n_iters)
        logging.info("step %d/%d  %s  %.3g steps/s  ETA %s", self.step, n_iters, shown(means), speed, left)

    def _save(self, folder: str, number: int, keep: int) -> Path:
        self._settle(0)
        directory = self.job.directory / folder
        if not self.is_writer:
            return directory / f"checkpoint_{number}"
        record = {
            "loader": self.loader.get_state(),
            "pending": self.pending.values,
            "bad_in_a_row": self.bad_in_a_row,
            "config": self.job.task.config.to_dict(),
            **self.job.facts,
        }
        return checkpoints.save(directory, first(self.state), number, record, keep)


def _pmapped_steps(job: Job, parts: int) -> Any:
    """n steps as a pmap: (state, x [devices, n, B / devices, ...], frozen) -> (state, metrics [devices, n]).

    Each takes its batch in `parts` micro-batches.
    """
    training, optimizer = job.task.config.training, job.task.optimizer

    @functools.partial(jax.pmap, axis_name="batch", donate_argnums=0, devices=all_devices())
    def steps(state, x, frozen):
        step_fn = losses.get_step_fn(job.loss_fn_of(frozen), optimizer, job.ema_rate, num_microbatches=parts)
        with jax.default_matmul_precision(training.matmul_precision):
            return jax.lax.scan(step_fn, state, x)

    return steps


def _pmapped_shares(job: Job) -> Any:
    """`losses.get_grad_shares_fn` as a pmap: (state, x [devices, B / devices, ...]) -> shares [devices]."""
    training = job.task.config.training

    @functools.partial(jax.pmap, axis_name="batch", devices=all_devices())
    def shares(state, x):
        parts, loss_fn = training.num_microbatches, job.loss_fn_of(job.frozen)
        with jax.default_matmul_precision(training.matmul_precision):
            return losses.get_grad_shares_fn(loss_fn, job.term_weights or {}, num_microbatches=parts)(state, x)

    return shares


def _eval_fn(job: Job) -> Callable[[losses.TrainState], tuple[dict[str, float], dict[str, np.ndarray]]]:
    """(state) -> the means of the loss terms on the first test examples, and the terms of this host's examples [b].

    The examples are a batch of images or eight batches of points. Examples, times, noise and probes are the same every
    time, so the curve shows the network and not the draw.
    """
    dataset, data_config, config = job.task.dataset, job.data_config, job.task.config
    devices = jax.device_count()
    size = config.training.batch_size * (1 if dataset.is_image else 8)
    size = min(size, len(dataset.test)) // devices * devices
    if size == 0:
        raise UserError(f"the test split of {dataset.name} has fewer examples than there are devices, {devices}")
    index = np.arange(size).reshape(jax.process_count(), -1)[jax.process_index()]
    dequantize = data_config.uniform_dequantization
    x = datasets.eval_batch(dataset, data_config, "test", index, seed=config.seed, dequantize=dequantize)

    @functools.partial(jax.pmap, axis_name="batch", devices=all_devices())
    def terms(params, model_state, x, index, frozen):
        loss_fn = job.loss_fn_of(frozen, train=False)
        with jax.default_matmul_precision("float32"):
            _, values = loss_fn(params, model_state, x, index, jax.random.PRNGKey(config.seed))
        return jax.lax.pmean(jax.tree.map(jnp.mean, values), "batch"), values

    x, index, frozen = shard(x), shard(index.astype(np.int32)), replicate(job.frozen)

    def evaluate(state):
        means, values = terms(state.ema_params, state.model_state, x, index, frozen)
        means = {name: float(value.addressable_data(0)[0]) for name, value in means.items()}
        return means, {name: on_this_host(value) for name, value in values.items()}

    return evaluate


def shown(means: dict[str, float]) -> str:
    """Formats means for the console: the loss, its terms if several are on (not 0), the gradient's norm."""
    terms = [name for name, value in means.items() if value and name not in ("loss", "grad_norm", "skipped")]
    names = ["loss", *(terms if len(terms) > 1 else ()), "grad_norm"]
    return "  ".join(f"{name} {means[name]:.4g}" for name in names)


class _Clock:
    """Times this launch from its first step on; compilation is over by then."""

    def __init__(self, step: int):
        self._start = self._time = self.saved = time.monotonic()
        self._first_step = self._step = step

    def speed(self, step: int) -> float:
        """Steps per second since the last call."""
        now = time.monotonic()
        speed = (step - self._step) / (now - self._time)
        self._time, self._step = now, step
        return speed

    def left(self, step: int, n_iters: int) -> datetime.timedelta:
        """The time to the last step at the mean pace of this launch, evaluations and snapshots included."""
        seconds = (time.monotonic() - self._start) / (step - self._first_step)
        return datetime.timedelta(seconds=round((n_iters - step) * seconds))

    def minutes_since_save(self) -> float:
        return (time.monotonic() - self.saved) / 60


def _grouped(loader: Any, n: int, first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields n batches for one call of the step: x [local devices, n, B / devices, ...], example index [n, B].

    The first call has `first` batches, after which a run that was stopped between multiples of n is at one again.
    """
    for count in itertools.chain([first], itertools.repeat(n)):
        batches = [next(loader) for _ in range(count)]
        yield np.stack([shard(b["x"]) for b in batches], axis=1), np.stack([b["index"] for b in batches])
