# SPDX-License-Identifier: Apache-2.0
"""The modes of `main.py`: `train`, `train_deq`, `evaluate` and `stats`."""

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

import checkpoints
import datasets
import dequantization
import evaluation
import losses
import report
from configs.check import check_config, flatten
from configs.resume import BY_MACHINE, check_resumed
from errors import UserError
from evaluators import EVALUATORS
from evaluators.context import Context
from evaluators.dequantized import uniform, variational
from evaluators.inception import load_features
from evaluators.snapshots import sample_saver
from evaluators.units import code_digest
from models.flowpp import create_dequantizer
from runtime import hosts, launch, loop
from runtime.devices import all_devices, digest, on_this_host, replicate, shard
from runtime.locks import workdir_lock
from runtime.records import read_json, write_json
from task import Config, Task, build, dequantizer_state


def pmapped_steps(config: Config, step_fn_of: Callable) -> Any:
    """n steps of `step_fn_of(frozen)` as a pmap: (state, x [devices, n, b, ...], frozen) -> (state, metrics)."""

    @functools.partial(jax.pmap, axis_name="batch", donate_argnums=0, devices=all_devices())
    def steps(state, x, frozen):
        with jax.default_matmul_precision(config.training.matmul_precision):
            return jax.lax.scan(step_fn_of(frozen), state, x)

    return steps


def _snapshot_number(config, step: int) -> int:
    """Snapshot k is the one after k * snapshot_freq steps; the last one may be one step later (n_iters = k f + 1)."""
    return max(1, math.ceil((step - 1) / config.training.snapshot_freq))


def _resume(
    config: Config, directory: Path, target: losses.TrainState, fixed: tuple[str, ...] = ()
) -> tuple[losses.TrainState, dict] | None:
    """State and record of the newest readable checkpoint of a run's folder, of resuming ones before kept ones.

    fixed: config keys that may not differ from the checkpoint's, beside those of `check_resumed`. UserError if one
    does, or if the newest is a file of the public code.
    """
    folders = [directory / "checkpoints-meta", directory / "checkpoints"]
    newest = None
    if jax.process_index() == 0:
        newest = next(filter(None, map(checkpoints.newest_readable, folders)), None)
    # The first host chooses: each for itself, they might take different ones while a file system is slow to show them.
    chosen = -1 if newest is None else 2 * int(newest[0].name.rpartition("_")[2]) + folders.index(newest[0].parent)
    if (chosen := hosts.number_of_first(chosen)) < 0:
        return None
    path = folders[chosen % 2] / f"checkpoint_{chosen // 2}"
    restored = newest[1] if newest is not None else checkpoints.restore(path)
    if not restored.record:
        raise UserError(
            f"{path} is of the public code, whose runs are not resumed: train in a new --workdir with "
            f"--config.training.init_from={path} (--mode train_deq: in a new --deq_folder, from the start)"
        )
    check_resumed(config, restored.record["config"], path, fixed)
    logging.info("resuming from %s", path)
    return checkpoints.into(target, restored.state, path), restored.record


def _init_from(training: Config, state: losses.TrainState) -> tuple[losses.TrainState, str]:
    """A fresh state with the parameters and EMA of the checkpoint `training.init_from`, and the digest of its state.

    Without one the state as it is, and ''. With `training.init_optimizer` Adam's moments, its count (and the warm-up's)
    and the step go on from there as well. The digest is folded into the key, so that no noise of the run that made the
    checkpoint comes again; runs that start from one checkpoint, at any order, have the same.
    """
    path = training.init_from
    if not path:
        return state, ""
    source = checkpoints.into(state, checkpoints.restore(path, state).state, path)
    logging.info("starting from the parameters of %s, step %d", path, int(source.step))
    parent = digest(source)
    key = np.asarray(jax.random.fold_in(state.key, int(parent[:8], 16)))
    if not training.init_optimizer:
        fresh = state.replace(params=source.params, ema_params=source.ema_params, model_state=source.model_state)
        return fresh.replace(key=key), parent
    if int(source.step) >= training.n_iters:
        raise UserError(
            f"training.init_optimizer=True goes on from step {int(source.step)} of {path}: "
            f"training.n_iters={training.n_iters} must be above it"
        )
    return source.replace(key=key), parent


def _eval_fn(task: Task, loss_fn_of, frozen: Any = (), **options: Any):
    """(state) -> terms of `loss_fn_of(frozen)` on the first test examples: a batch of images, eight of points.

    Their means, and the terms of each of this host's examples [b]. The same examples, times, noise and probes every
    time, so that the curve shows the network and not the draw. options: of `datasets.eval_batch`.
    """
    config = task.config
    devices = jax.device_count()
    size = config.training.batch_size * (1 if task.dataset.is_image else 8)
    size = min(size, len(task.dataset.test)) // devices * devices
    if size == 0:
        raise UserError(f"the test split of {task.dataset.name} has fewer examples than there are devices, {devices}")
    index = np.arange(size).reshape(jax.process_count(), -1)[jax.process_index()]
    x = datasets.eval_batch(task.dataset, config.data, "test", index, seed=config.seed, **options)

    @functools.partial(jax.pmap, axis_name="batch", devices=all_devices())
    def terms(params, model_state, x, index, frozen):
        with jax.default_matmul_precision("float32"):
            _, values = loss_fn_of(frozen)(params, model_state, x, index, jax.random.PRNGKey(config.seed))
        return jax.lax.pmean(jax.tree.map(jnp.mean, values), "batch"), values

    x, index, copies = shard(x), shard(index.astype(np.int32)), replicate(frozen)

    def evaluate(state):
        means, values = terms(state.ema_params, state.model_state, x, index, copies)
        means = {name: float(value.addressable_data(0)[0]) for name, value in means.items()}
        return means, {name: on_this_host(value) for name, value in values.items()}

    return evaluate


def train(config: Config, workdir: str | Path) -> losses.TrainState:
    """Trains to `training.n_iters` steps, or on from the newest checkpoint in `workdir/checkpoints-meta`.

    Writes `checkpoints/` (kept), `checkpoints-meta/` (the newest two, for resuming), `metrics.jsonl`, `tensorboard/`,
    `samples/` and `report/` under `workdir`. A signal ends it early, saved. Returns the last state, on the host.
    """
    workdir = Path(workdir)
    task = build(config)
    with workdir_lock(workdir):
        training = config.training
        state = task.init_state()
        if (resumed := _resume(config, workdir, state)) is None:
            state, parent = _init_from(training, state)
            resumed = state, {"parent": parent}
        state, record = resumed
        _check_hosts(config, lambda: digest(state))
        launch.record(workdir, config, int(state.step))
        loss_fn = losses.get_loss_fn(training, task.sde, task.score_fn)
        plain_loss_fn = losses.get_loss_fn(training, task.sde, lambda p, s, _: task.score_fn(p, s))
        parts = training.num_microbatches
        step_fn = losses.get_step_fn(loss_fn, task.optimizer, config.model.ema_rate, num_microbatches=parts)
        order = training.score_matching_order
        launch.log_start(task, state, f"{config.model.name}, order {order}", training.n_iters)
        job = loop.Job(
            config=config,
            directory=workdir,
            state=state,
            record=record,
            loader=_train_loader(task, config.data, record.get("parent", "")),
            p_step=pmapped_steps(config, lambda _: step_fn),
            n_iters=training.n_iters,
            eval_fn=_eval_fn(task, lambda _: plain_loss_fn, dequantize=config.data.uniform_dequantization),
            on_snapshot=sample_saver(task, workdir) if training.snapshot_sampling else None,
            facts={"parent": record.get("parent", "")},
            snapshot_number=functools.partial(_snapshot_number, config),
        )
        return _run(job)


def train_deq(config: Config, workdir: str | Path, deq_folder: str = "flowpp_dequantizer") -> losses.TrainState:
    """Trains a variational dequantiser of 8-bit images for the score model `eval.ckpt_id` of `workdir` (0: the newest).

    The loss is the variational bound in bits/dim under the EMA parameters of the score model, which stay as they are
    (`dequantization.get_loss_fn`). It runs and resumes as `train` does, for `deq.n_iters` steps, with the other
    settings of `config.training` and `config.optim`, in `workdir/deq_folder`. UserError: no such score model, points.
    """
    workdir = Path(workdir)
    path = checkpoints.find(workdir / "checkpoints", config.eval.ckpt_id)
    task = build(config)
    if not task.dataset.is_image:
        raise UserError(f"--mode train_deq needs 8-bit images; data.dataset={config.data.dataset!r} has none")
    directory = workdir / deq_folder
    with workdir_lock(directory):
        target = task.init_state()
        score = checkpoints.into(target, checkpoints.restore(path, target).state, path)
        frozen = score.ema_params, score.model_state
        facts = {"score_model": digest(frozen)}
        model = create_dequantizer(config.deq.network, config.deq.dropout)
        resumed = _resume(config, directory, dequantizer_state(task, model), ("deq.network",))
        if resumed is not None and resumed[1]["score_model"] != facts["score_model"]:
            raise UserError(
                f"{directory} has a dequantiser of another score model than {path}; set another --deq_folder"
            )
        state, record = resumed or (_init_dequantizer(task, model), {})
        _check_hosts(config, lambda: digest((state, frozen)))
        launch.record(directory, config, int(state.step))

        loss_fn_of = _dequantizer_loss(task, model)

        def step_fn_of(frozen):
            parts = config.training.num_microbatches
            return losses.get_step_fn(loss_fn_of(frozen), task.optimizer, config.deq.ema_rate, num_microbatches=parts)

        launch.log_start(task, state, f"the dequantiser {config.deq.network} of {path}", config.deq.n_iters)
        job = loop.Job(
            config=config,
            directory=directory,
            state=state,
            record=record,
            loader=_train_loader(task, _as_levels(config.data)),
            p_step=pmapped_steps(config, step_fn_of),
            frozen=frozen,
            n_iters=config.deq.n_iters,
            eval_fn=_eval_fn(task, functools.partial(loss_fn_of, train=False), frozen, dequantize=False, scale=False),
            facts=facts,
            snapshot_number=functools.partial(_snapshot_number, config),
        )
        return _run(job)


def _dequantizer_loss(task: Task, model) -> Callable[..., losses.LossFn]:
    """(frozen parameters and model state of the score model, train) -> the loss of the dequantiser `model`."""
    scaler, config = datasets.get_data_scaler(task.config.data.centered), task.config
    options = {"eps": config.training.smallest_time, "offset": config.deq.offset}

    def loss_fn_of(frozen, train=True):
        score_fn = task.score_fn(*frozen)
        return dequantization.get_loss_fn(
            task.sde, score_fn, model, scaler, task.inverse_scaler, train=train, **options
        )

    return loss_fn_of


def _init_dequantizer(task: Task, model) -> losses.TrainState:
    """Initialised from the first training images, the same on every host."""
    index = np.arange(min(task.config.deq.init_batch_size, len(task.dataset.train)))
    images = datasets.eval_batch(
        task.dataset, task.config.data, "train", index, seed=task.config.seed, dequantize=False, scale=False
    )
    return jax.device_get(dequantizer_state(task, model, images))


def _as_levels(data_config: Config) -> Config:
    """The same data as multiples of 1/255 in [0, 1]."""
    levels = data_config.copy_and_resolve_references()
    levels.update(centered=False, uniform_dequantization=False)
    return levels


def _check_hosts(config: Config, digest_of_arrays: Callable[[], str]) -> None:
    """UserError, on every host, if they do not all have one config and the same arrays."""
    if jax.process_count() > 1:
        common = {key: value for key, value in flatten(config).items() if key not in BY_MACHINE}
        hosts.check_same("config or parameters", f"{common} {digest_of_arrays()}")


def _run(job: loop.Job) -> losses.TrainState:
    """The loop, and where it left things."""
    state = loop.run(job)
    if jax.process_index() == 0:
        folder = job.directory
        places = {
            "checkpoints": f"{folder / 'checkpoints'} (kept), {folder / 'checkpoints-meta'} (to resume from)",
            "metrics": f"{folder / 'metrics.jsonl'}; tensorboard --logdir {folder / 'tensorboard'}",
            **({"samples": str(folder / "samples")} if job.on_snapshot else {}),
            "report": str(report.write_report(folder)),
        }
        done = int(state.step) >= job.n_iters
        launch.log_end(f"{'done' if done else 'stopped'} at step {int(state.step)} of {job.n_iters}", places)
    return state


def _train_loader(task: Task, data_config: Config, parent: str = ""):
    """parent: digest of the state that `training.init_from` gave; the data then come in an order of their own."""
    seed = task.config.seed
    return datasets.train_loader(
        task.dataset,
        data_config,
        batch_size=task.config.training.batch_size,
        seed=seed if not parent else seed + (int(parent[:8], 16) << 32),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def evaluate(
    config: Config, workdir: str | Path, eval_folder: str = "eval", deq_folder: str = "flowpp_dequantizer"
) -> list[dict]:
    """Evaluates the checkpoints `eval.begin_ckpt` to `eval.end_ckpt` (0 and 0: the newest) with the EMA parameters.

    Runs the `evaluators.EVALUATORS` that `config.eval` turns on, each in units that a restart does not repeat. Writes
    `report_<n>.json` and the evaluators' npz files into `workdir/eval_folder`. Returns what the JSON files hold.
    UserError if there is no such checkpoint and, in the end, if examples or samples failed: what is written leaves them
    out and says so.
    """
    workdir = Path(workdir)
    check_config(config)
    settings, out = config.eval, workdir / eval_folder
    numbers = range(settings.begin_ckpt, settings.end_ckpt + 1)
    checkpoints.find(workdir / "checkpoints", numbers[0], settings.wait_for_checkpoints_s)
    task = build(config)
    with workdir_lock(out):
        dequantizer = variational(task, workdir / deq_folder) if settings.dequantizer else uniform()
        wanted = {name: make for name, make in EVALUATORS.items() if settings[name]}
        evaluators = [make(task, dequantizer) for make in wanted.values()]
        target = task.init_state()
        launch.log_evaluation(task, target, list(numbers), list(wanted))
        results, failed = [], []
        for number in numbers:
            path = checkpoints.find(workdir / "checkpoints", number, settings.wait_for_checkpoints_s)
            path = path.with_name(f"checkpoint_{hosts.number_of_first(int(path.name.rpartition('_')[2]))}")
            context, result = _load(task, target, path, out)
            _check_hosts(config, lambda facts=result: facts["parameters"])
            for evaluator in evaluators:
                result |= evaluator(context)
            failed += [f"checkpoint {context.number}: {text}" for text in _failures(result)]
            if jax.process_index() == 0:
                results.append(_write_result(out / f"report_{context.number}.json", result))
        if jax.process_index() == 0:
            print(report.results_table(results), flush=True)
            page = report.write_report(workdir, eval_folder=eval_folder)
            launch.log_end("evaluated", {"results": f"{out}/report_<checkpoint>.json, *.npz", "report": str(page)})
        if failed:
            raise UserError(
                f"{out}/report_<checkpoint>.json is incomplete: {'; '.join(failed)}. Warnings above tell why; with "
                "settings that mend it, run again"
            )
        return results


def _load(task: Task, target: losses.TrainState, path: Path, out: Path) -> tuple[Context, dict[str, Any]]:
    """What the evaluators are given of a checkpoint, and the facts about it that open its report."""
    state = checkpoints.into(target, checkpoints.restore(path, target).state, path)
    config, devices = task.config, jax.local_devices()
    number = int(path.name.rpartition("_")[2])
    facts = {
        "checkpoint": number,
        "step": int(state.step),
        "dataset": task.dataset.name,
        "parameters": digest((state.ema_params, state.model_state)),
    }
    identity = {
        **facts,
        "data": config.data.to_dict(),
        "code": code_digest(),
        "model": config.model.to_dict(),
        "sde": config.training.sde,
        "smallest_time": config.training.smallest_time,
        "seed": config.seed,
    }
    context = Context(
        params=replicate(state.ema_params, devices),
        model_state=replicate(state.model_state, devices),
        number=number,
        out=out,
        identity=identity,
    )
    return context, facts


def _failures(result: dict[str, Any], name: str = "") -> Iterator[str]:
    """'3 failed of bpd' for each quantity that leaves out some of its examples or samples."""
    for key, value in result.items():
        if key == "num_failed":
            yield f"{value} failed of {name}"
        elif isinstance(value, dict):
            yield from _failures(value, f"{name} {key}".strip())


def _write_result(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Adds to what earlier evaluations found of the same parameters; what they found of others is dropped."""
    earlier = read_json(path) if path.exists() else {}
    same = earlier.get("parameters") == result["parameters"]
    result = {**earlier, **result} if same else result
    write_json(path, result)
    return result


def stats(config: Config) -> Path:
    """Writes the file of the features of the config's training images. UserError if they are not images."""
    dataset = datasets.load(config.data)
    if not dataset.is_image:
        raise UserError(f"--mode stats needs images; data.dataset={config.data.dataset!r} has none")
    path = evaluation.statistics_path(config.data, config.eval.stats_path)
    features = load_features(config.eval.inception_path)
    return evaluation.compute_statistics(dataset, config.data, features, path, config.eval.inception_batch_size)
