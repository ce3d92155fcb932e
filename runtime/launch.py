# SPDX-License-Identifier: Apache-2.0
"""What a run tells of itself: at its start, in `run.json`, and where it has left things at its end."""

import datetime
import platform
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

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
    """The commit that `folder`, the top of a checkout, is at, with a note of local changes; else 'unknown'."""

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


def environment() -> dict[str, Any]:
    """Python, libraries, devices and machine of this process."""
    kinds = sorted({device.device_kind for device in jax.devices()})
    return {
        "commit": git_commit(CODE),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        "devices": f"{jax.device_count()} x {' and '.join(kinds)} of {jax.process_count()} host(s)",
        "platform": platform.platform(),
    }


def record(directory: Path, config: Config, step: int) -> None:
    """Writes `directory/config.json` and adds this launch, which goes on from `step`, to `run.json`; first host alone.

    UserError if the file is damaged.
    """
    if jax.process_index() != 0:
        return
    write_json(directory / "config.json", config.to_dict())
    path = directory / "run.json"
    launches = read_json(path)["launches"] if path.exists() else []
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    facts = {"started": now, "step": step, "command": shlex.join(sys.argv), "precision": precision(config)}
    launches.append({**facts, **environment()})
    write_json(path, {"launches": launches})


def precision(config: Config) -> str:
    """Of matrix products, by what they are for."""
    training, sampling = config.training.matmul_precision, config.sampling.matmul_precision
    return f"training {training}, samples {sampling}, likelihoods and test losses float32"


def log_start(task: Task, state: losses.TrainState, what: str, n_iters: int) -> None:
    """Devices, data, parameters, steps, memory and the config's differences from its defaults, to the console."""
    step = int(state.step)
    rows = {
        "steps": f"{step} to {n_iters}" + (", resuming" if step else ""),
        "memory": f"{size(num_bytes(state))} a device for parameters, EMA and Adam's moments; see below for the step",
    }
    lines = _facts(task, state, task.config.training.batch_size) | rows
    logging.info("%s", "\n".join([f"training {what}, on {task.dataset.name}", *table(lines), *_changes(task.config)]))


def log_evaluation(task: Task, state: losses.TrainState, numbers: list[int], wanted: list[str]) -> None:
    """Devices, data, parameters, checkpoints (0: the newest) and evaluators, to the console."""
    rows = {
        "checkpoints": "the newest" if numbers == [0] else f"{numbers[0]} to {numbers[-1]}",
        "computes": ", ".join(f"eval.{name}" for name in wanted) or "nothing",
    }
    lines = _facts(task, state, task.config.eval.batch_size) | rows
    logging.info("%s", "\n".join([f"evaluating {task.config.model.name} on {task.dataset.name}", *table(lines)]))


def _facts(task: Task, state: losses.TrainState, batch_size: int) -> dict[str, str]:
    dataset, shape = task.dataset, " x ".join(map(str, task.dataset.shape))
    devices = f"{jax.device_count()} {jax.default_backend()} device(s) of {jax.process_count()} host(s)"
    kinds = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    return {
        "devices": f"batch {batch_size} on {devices}: {kinds}",
        "data": f"{len(dataset.train):,} training and {len(dataset.test):,} test examples of {shape}",
        "parameters": f"{sum(x.size for x in jax.tree.leaves(state.params)):,}",
        "products": precision(task.config),
    }


def _changes(config: Config) -> list[str]:
    changes = [f"{key}={value!r}" for key, (_, value) in differences(config, get_default_configs()).items()]
    text = f"differs from configs/default_configs.py in {', '.join(changes)}" if changes else "the default config"
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def log_end(title: str, places: Mapping[str, str]) -> None:
    """Where things are, to the console."""
    logging.info("%s", "\n".join([title, *table(places)]))


def table(rows: Mapping[str, str]) -> list[str]:
    """Lines of two columns, indented by two."""
    width = max(map(len, rows), default=0)
    return [f"  {name.ljust(width)}  {value}" for name, value in rows.items()]


def num_bytes(tree: Any) -> int:
    """Of all arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def program_memory(stats: Any) -> str:
    """Of a compiled program's `memory_analysis()`, for people: what it holds of a device at once; '' if unknown."""
    if stats is None:
        return ""
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    temporary = stats.temp_size_in_bytes
    return f"{size(held + temporary)} a device ({size(held)} state and batch, {size(temporary)} intermediates)"


def size(n: float | int) -> str:
    """Bytes for people: '3.1 MiB'."""
    for unit in ("bytes", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.3g} {unit}"
        n /= 1024
    return f"{n:.3g} GiB"
