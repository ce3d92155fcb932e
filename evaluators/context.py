# SPDX-License-Identifier: Apache-2.0
"""What an evaluator is given, and the batches of examples that most of them go through."""

import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import datasets
from evaluators.units import Units
from runtime.devices import shard
from runtime.records import write_npz, write_npz_rows
from task import Task


class Context(NamedTuple):
    """A checkpoint under evaluation: its EMA parameters on the local devices, and where results go."""

    params: Any
    model_state: Any
    number: int
    out: Path
    identity: dict[str, Any]  # what all results depend on, beside an evaluator's own settings

    def run(self, kind: str, settings: dict[str, Any], count: int, unit: Callable, label: str = "") -> Units:
        """Runs `Units` of one kind of work, apart from those of another checkpoint, data set or setting."""
        units = Units(self.out / "units", f"{kind}_{self.number}", {**self.identity, **settings})
        return units.run(count, unit, label)

    def file(self, name: str, suffix: str = "npz") -> Path:
        """The path of <name>_<checkpoint>.<suffix>, for a result."""
        return self.out / f"{name}_{self.number}.{suffix}"

    def write(self, name: str, **arrays: np.ndarray) -> None:
        """Writes `file(name)`, on the first host."""
        if jax.process_index() == 0:
            write_npz(self.file(name), **arrays)

    def write_rows(self, name: str, count: int, chunks: Iterable[np.ndarray]) -> None:
        """Writes `file(name)` with one array [count, ...], itself called `name`, whose rows come in chunks."""
        if jax.process_index() == 0:
            write_npz_rows(self.file(name), name, count, chunks)


Evaluator = Callable[[Context], dict[str, Any]]


def settings_of(config: Any, *keys: str) -> dict[str, Any]:
    """{key: value} of these keys of a config section, for `Context.run`."""
    return {key: config[key] for key in keys}


def settings_except(config: Any, *keys: str) -> dict[str, Any]:
    """{key: value} of all keys of a config section, also those that are new, except these, which cannot matter."""
    return {key: value for key, value in config.to_dict().items() if key not in keys}


def fold_in_each(key: jax.Array, *numbers: Any) -> jax.Array:
    """A key for each example: `key` with the example's entry of each of `numbers` [b] folded in, one after another."""
    return jax.vmap(lambda *entries: functools.reduce(jax.random.fold_in, entries, key))(*numbers)


def per_example(fn: Callable, size: int) -> Callable:
    """fn(params, model_state, *arrays [b, ...]) -> pytree of [b, ...] numpy arrays, over this process's devices.

    A batch of b <= size examples is filled up to `size` with copies of its last, so that one program serves all.
    Matrix products are in float32: the TF32 of some accelerators has 10 bits, which bits/dim show.
    """
    p_fn = jax.pmap(fn, devices=jax.local_devices())

    def call(params, model_state, *arrays):
        count = len(arrays[0])
        rows = np.minimum(np.arange(size), count - 1)
        with jax.default_matmul_precision("float32"):
            out = p_fn(params, model_state, *(shard(a[rows]) for a in arrays))
        return jax.tree.map(lambda a: np.asarray(a).reshape(-1, *a.shape[2:])[:count], out)

    return call


def round_up(n: int) -> int:
    """The next multiple of the number of this process's devices."""
    return math.ceil(n / jax.local_device_count()) * jax.local_device_count()


class Split(NamedTuple):
    """A split of the data in batches. Each unit number stands for a repeat and a batch of its examples."""

    task: Task
    name: str  # train | test
    count: int  # examples of a repeat
    size: int  # of a batch
    repeats: int

    @property
    def settings(self) -> dict[str, Any]:
        """Tells which examples a unit's number stands for."""
        content = self.task.dataset.digest(self.name)
        return {"split": self.name, "content": content, "count": self.count, "size": self.size}

    @property
    def num_units(self) -> int:
        return self.repeats * math.ceil(self.count / self.size)

    def batch(self, unit: int, draw: int = 0, **options: bool) -> tuple[int, np.ndarray, np.ndarray]:
        """The repeat, x [b, ...] and the examples' index int32 [b] of a unit.

        draw: the number of the dequantisation noise, of several in a repeat. options: of `datasets.eval_batch`.
        """
        repeat, batch = divmod(unit, math.ceil(self.count / self.size))
        index = np.arange(batch * self.size, min((batch + 1) * self.size, self.count))
        dataset, config = self.task.dataset, self.task.config
        noise = {"seed": config.seed, "repeat": self.number_of_noise(repeat, draw)}
        x = datasets.eval_batch(dataset, config.data, self.name, index, **noise, **options)
        return repeat, x, index.astype(np.int32)

    def number_of_noise(self, repeat: int, draw: int) -> int:
        """Tells the draws of all repeats apart; the first draw of a repeat has the repeat's number."""
        return repeat + draw * self.repeats

    def run(
        self, context: Context, kind: str, settings: dict[str, Any], unit: Callable[[int], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Runs `unit(k) -> {name: [b, ...]}` as units of work and returns {name: [repeats, count, ...]}."""
        label = f"{kind}, {self.name} split"
        rows = context.run(kind, {**self.settings, **settings}, self.num_units, unit, label)
        arrays = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        return {name: array.reshape(self.repeats, self.count, *array.shape[1:]) for name, array in arrays.items()}


def split_name(config: Any) -> str:
    """The likelihoods' split: `eval.dataset`, the name in the public README, else `eval.bpd_dataset`, in its code."""
    return config.dataset or config.bpd_dataset


def of_split(kind: str, config: Any) -> str:
    """The name of results of `kind`: that of the training split ends in _train."""
    return kind + ("_train" if split_name(config) == "train" else "")


def split(task: Task, name: str, *, limit: int = 0, repeats: int = 1) -> Split:
    """Cuts a split, or its first `limit` > 0 examples, into batches of `eval.batch_size` or fewer."""
    size = len(getattr(task.dataset, name))
    count = min(size, limit) if limit else size
    return Split(task, name, count, min(task.config.eval.batch_size, round_up(count)), repeats)
