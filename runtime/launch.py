# SPDX-License-Identifier: Apache-2.0
"""What a run says about itself: tables on the console at its start and end, and `run.json`."""

import datetime
import platform
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging

import losses
from configs.check import differences
from configs.default_configs import get_default_configs
from runtime.records import read_json, write_json
from task import Config, Task

CODE = Path(__file__).parent.parent
WIDTH = 100


def git_commit(folder: Path) -> str:
    """The commit of `folder`, with a note of local changes; 'unknown' if it is not the top of a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder.resolve():
            return "unknown"  # a copy of the code inside another project's checkout
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" with local changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def record(directory: Path, config: Config, step: int) -> None:
    """Writes `config.json` and adds this launch, which goes on from `step`, to `run.json`; the first host alone."""
    if jax.process_index() != 0:
        return
    write_json(directory / "config.json", config.to_dict())
    path = directory / "run.json"
    launches = read_json(path)["launches"] if path.exists() else []
    facts = {
        "started": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        "step": step,
        "command": shlex.join(sys.argv),
        "precision": precision(config),
        "commit": git_commit(CODE),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        "devices": f"{jax.device_count()} x {_device_kinds()} of {jax.process_count()} host(s)",
        "platform": platform.platform(),
    }
    write_json(path, {"launches": [*launches, facts]})


def _device_kinds() -> str:
    return " and ".join(sorted({device.device_kind for device in jax.devices()}))


def precision(config: Config) -> str:
    """Names the precision of matrix products in each part of a run."""
    training, sampling = config.training.matmul_precision, config.sampling.matmul_precision
    return f"training {training}, samples {sampling}, likelihoods and test losses float32"


def log_start(task: Task, state: losses.TrainState, what: str, n_iters: int) -> None:
    """Logs devices, data, parameters, steps, memory and the config's differences from its defaults."""
    step, num_bytes = int(state.step), sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    rows = {
        **_facts(task, state, task.config.training.batch_size),
        "steps": f"{step} to {n_iters}" + (", resuming" if step else ""),
        "memory": f"{size(num_bytes)} a device for parameters, EMA and Adam's moments; see below for the step",
    }
    changed = differences(task.config, get_default_configs())
    changes = ", ".join(f"{key}={value!r}" for key, (_, value) in changed.items())
    text = f"differs from configs/default_configs.py in {changes}" if changes else "the default config"
    lines = textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    log_table(f"training {what}, on {task.dataset.name}", rows, lines)


def log_evaluation(task: Task, state: losses.TrainState, numbers: list[int], wanted: list[str]) -> None:
    """Logs devices, data, parameters, checkpoints (0: the newest) and evaluators."""
    rows = {
        **_facts(task, state, task.config.eval.batch_size),
        "checkpoints": "the newest" if numbers == [0] else f"{numbers[0]} to {numbers[-1]}",
        "computes": ", ".join(f"eval.{name}" for name in wanted) or "nothing",
    }
    log_table(f"evaluating {task.config.model.name} on {task.dataset.name}", rows)


def _facts(task: Task, state: losses.TrainState, batch_size: int) -> dict[str, str]:
    dataset, shape = task.dataset, " x ".join(map(str, task.dataset.shape))
    devices = f"{jax.device_count()} {jax.default_backend()} device(s) of {jax.process_count()} host(s)"
    return {
        "devices": f"batch {batch_size} on {devices}: {_device_kinds()}",
        "data": f"{len(dataset.train):,} training and {len(dataset.test):,} test examples of {shape}",
        "parameters": f"{sum(x.size for x in jax.tree.leaves(state.params)):,}",
        "products": precision(task.config),
    }


def log_table(title: str, rows: Mapping[str, str], more: Sequence[str] = ()) -> None:
    """Logs a title, `rows` in two columns, and `more` lines, as one message."""
    width = max(map(len, rows))
    lines = [f"  {name.ljust(width)}  {value}" for name, value in rows.items()]
    logging.info("%s", "\n".join([title, *lines, *more]))


class Memory(NamedTuple):
    """Bytes of a device that a program takes at once."""

    held: int  # arguments and results
    temporary: int

    @property
    def total(self) -> int:
        return self.held + self.temporary

    def __str__(self) -> str:
        parts = f"{size(self.held)} state and batch, {size(self.temporary)} intermediates"
        return f"{size(self.total)} a device ({parts})"


def program_memory(stats: Any) -> Memory | None:
    """What a compiled program's `memory_analysis()` tells, None if that is nothing."""
    if stats is None:
        return None
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return Memory(held, stats.temp_size_in_bytes)


def size(n: float | int) -> str:
    """Formats a number of bytes: '3.1 MiB'."""
    for unit in ("bytes", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.3g} {unit}"
        n /= 1024
    return f"{n:.3g} GiB"
