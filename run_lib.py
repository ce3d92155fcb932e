# SPDX-License-Identifier: Apache-2.0
"""The modes of `main.py`: `train`, `train_deq`, `evaluate` and `stats`."""

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

import checkpoints
import datasets
import dequantization
import evaluation
import losses
import report
from configs.check import check_config
from configs.resume import check_resumed
from errors import UserError
from evaluators import EVALUATORS, dequantized
from evaluators.context import Context
from evaluators.inception import load_features
from evaluators.samples import sample_saver
from evaluators.units import code_digest
from models.flowpp import create_dequantizer
from runtime import hosts, launch, loop
from runtime.devices import digest, replicate
from runtime.records import read_json, workdir_lock, write_json
from task import Config, Task, build, dequantizer_state


def train(config: Config, workdir: str | Path) -> losses.TrainState:
    """Trains to `training.n_iters` steps, or on from the newest checkpoint in `workdir/checkpoints-meta`.

    Writes `checkpoints/` (kept), `checkpoints-meta/` (the newest two, for resuming), `metrics.jsonl`, `tensorboard/`,
    `samples/` and `report/` under `workdir`. A signal ends the run early, after a save. Returns the last state, on the
    host.
    """
    workdir = Path(workdir)
    task = build(config)
    with workdir_lock(workdir):
        training, state = config.training, task.init_state()
        state, record = _resume(config, workdir, state) or _init_from(training, state)
        antithetic = training.batch_size if training.antithetic_times else 0
        loss_fn, test_loss_fn = (  # without dropout keys the second has no dropout
            losses.get_loss_fn(training, task.sde, score_fn, config.model.sigma_data, antithetic)
            for score_fn in (task.score_fn, lambda params, model_state, _: task.score_fn(params, model_state))
        )
        job = loop.Job(
            task=task,
            what=f"{config.model.name}, order {training.score_matching_order}",
            directory=workdir,
            state=state,
            record=record,
            facts={"parent": record.get("parent", "")},
            loss_fn_of=lambda _, train=True: loss_fn if train else test_loss_fn,
            data_config=config.data,
            n_iters=training.n_iters,
            ema_rate=config.model.ema_rate,
            on_snapshot=sample_saver(task, workdir) if training.snapshot_sampling else None,
            term_weights=losses.term_weights(training, math.prod(task.dataset.shape)) if training.grad_shares else None,
        )
        return loop.run(job)


def train_deq(config: Config, workdir: str | Path, deq_folder: str = "flowpp_dequantizer") -> losses.TrainState:
    """Trains a variational dequantiser of images for the score model `eval.ckpt_id` of `workdir` (0: the newest).

    The loss is the variational bound in bits/dim under the EMA parameters of the score model, which stay as they are
    (`dequantization.get_loss_fn`). The run writes to `workdir/deq_folder`. It trains and resumes as `train` does, for
    `deq.n_iters` steps, with the other settings of `config.training` and `config.optim`. Raises UserError if there is
    no such score model, or if the data are points.
    """
    workdir = Path(workdir)
    path = checkpoints.find(workdir / "checkpoints", config.eval.ckpt_id)
    task = build(config)
    if not task.dataset.is_image:
        raise UserError(f"--mode train_deq needs images; data.dataset={config.data.dataset!r} has none")
    directory = workdir / deq_folder
    with workdir_lock(directory):
        target = task.init_state()
        score = checkpoints.into(target, checkpoints.restore(path, target).state, path)
        frozen = score.ema_params, score.model_state
        facts = {"score_model": digest(frozen)}
        data_config = config.data.copy_and_resolve_references()
        data_config.update(centered=False, uniform_dequantization=False)  # in [0, 1]
        model = create_dequantizer(config.deq.network, config.deq.dropout)
        resumed = _resume(config, directory, dequantizer_state(task, model), ("deq.network",))
        if resumed is None:  # the first training images initialise it, the same on every host
            index = np.arange(min(config.deq.init_batch_size, len(task.dataset.train)))
            images = datasets.eval_batch(task.dataset, data_config, "train", index, seed=config.seed, dequantize=False)
            resumed = jax.device_get(dequantizer_state(task, model, images)), {}
        elif resumed[1]["score_model"] != facts["score_model"]:
            raise UserError(
                f"{directory} has a dequantiser of another score model than {path}; set another --deq_folder"
            )
        state, record = resumed
        job = loop.Job(
            task=task,
            what=f"the dequantiser {config.deq.network} of {path}",
            directory=directory,
            state=state,
            record=record,
            facts=facts,
            loss_fn_of=functools.partial(_dequantizer_loss, task, model),
            data_config=data_config,
            n_iters=config.deq.n_iters,
            ema_rate=config.deq.ema_rate,
            frozen=frozen,
        )
        return loop.run(job)


def _resume(
    config: Config, directory: Path, target: losses.TrainState, fixed: tuple[str, ...] = ()
) -> tuple[losses.TrainState, dict] | None:
    """State and record of the newest readable checkpoint in `checkpoints-meta`, else in `checkpoints`, or None.

    fixed: config keys that may not differ from the checkpoint's, beside those of `check_resumed`. Raises UserError if
    one does, or if the newest checkpoint is a file of the public code.
    """
    folders = [directory / "checkpoints-meta", directory / "checkpoints"]
    newest = None
    if jax.process_index() == 0:
        newest = next(filter(None, map(checkpoints.newest_readable, folders)), None)
    # The first host chooses for all: while a file system is slow to show new files, hosts may see different ones.
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


def _init_from(training: Config, state: losses.TrainState) -> tuple[losses.TrainState, dict]:
    """A fresh state with the parameters and EMA of the checkpoint `training.init_from`, and a record with its digest.

    Without such a checkpoint it returns `state` and {}. With `training.init_optimizer` the step, Adam's moments,
    its count and the warm-up's go on from there as well. The digest is folded into the key, so that no noise of the run
    that made the checkpoint comes again. Runs of any order that start from one checkpoint have the same noise.
    """
    path = training.init_from
    if not path:
        return state, {}
    source = checkpoints.into(state, checkpoints.restore(path, state).state, path)
    logging.info("starting from the parameters of %s, step %d", path, int(source.step))
    parent = digest(source)
    key = np.asarray(jax.random.fold_in(state.key, int(parent[:8], 16)))
    if not training.init_optimizer:
        return source.replace(step=state.step, opt_state=state.opt_state, key=key), {"parent": parent}
    if int(source.step) >= training.n_iters:
        raise UserError(
            f"training.init_optimizer=True goes on from step {int(source.step)} of {path}: "
            f"training.n_iters={training.n_iters} must be above it"
        )
    return source.replace(key=key), {"parent": parent}


def _dequantizer_loss(task: Task, model, frozen: tuple, train: bool = True) -> losses.LossFn:
    """The dequantiser's loss. frozen: (params, model_state) of the score model."""
    scaler, score_fn = datasets.get_data_scaler(task.config.data.centered), task.score_fn(*frozen)
    options = {"train": train, "eps": task.config.training.smallest_time, "offset": task.config.deq.offset}
    options["levels"] = task.dataset.levels
    return dequantization.get_loss_fn(task.sde, score_fn, model, scaler, task.inverse_scaler, **options)


def evaluate(
    config: Config, workdir: str | Path, eval_folder: str = "eval", deq_folder: str = "flowpp_dequantizer"
) -> list[dict]:
    """Evaluates the checkpoints `eval.begin_ckpt` to `eval.end_ckpt` (0 and 0: the newest) with the EMA parameters.

    Runs the `evaluators.EVALUATORS` that `config.eval` turns on, each in units that a restart does not repeat. Writes
    `report_<n>.json` and the evaluators' npz files into `workdir/eval_folder`. Returns what the JSON files hold.
    Raises UserError if there is no such checkpoint. Raises it after the last one if examples or samples failed; the
    files then leave those out and say so.
    """
    workdir = Path(workdir)
    check_config(config)
    settings, out = config.eval, workdir / eval_folder
    numbers = range(settings.begin_ckpt, settings.end_ckpt + 1)
    checkpoints.find(workdir / "checkpoints", numbers[0], settings.wait_for_checkpoints_s)
    task = build(config)
    with workdir_lock(out):
        dequantizer = dequantized.create(task, workdir / deq_folder)
        wanted = {name: make for name, make in EVALUATORS.items() if settings[name]}
        evaluators = [make(task, dequantizer) for make in wanted.values()]
        target = task.init_state()
        launch.log_evaluation(task, target, list(numbers), list(wanted))
        results, failed = [], []
        for number in numbers:
            path = checkpoints.find(workdir / "checkpoints", number, settings.wait_for_checkpoints_s)
            path = path.with_name(f"checkpoint_{hosts.number_of_first(int(path.name.rpartition('_')[2]))}")
            context, result = _load(task, target, path, out)
            loop.check_hosts(config, result["parameters"])
            for evaluator in evaluators:
                result |= evaluator(context)
            failed += [f"checkpoint {context.number}: {text}" for text in _failures(result)]
            if jax.process_index() == 0:
                results.append(_write_result(out / f"report_{context.number}.json", result))
        if jax.process_index() == 0:
            print(report.results_table(results), flush=True)
            page = report.write_report(workdir, eval_folder=eval_folder)
            launch.log_table("evaluated", {"results": f"{out}/report_<checkpoint>.json, *.npz", "report": str(page)})
        if failed:
            raise UserError(
                f"{out}/report_<checkpoint>.json is incomplete: {'; '.join(failed)}. Warnings above tell why; with "
                "settings that mend it, run again"
            )
        return results


def _load(task: Task, target: losses.TrainState, path: Path, out: Path) -> tuple[Context, dict[str, Any]]:
    """The evaluators' view of a checkpoint, and the facts about it that open its report."""
    state = checkpoints.into(target, checkpoints.restore(path, target).state, path)
    config, number, network = task.config, int(path.name.rpartition("_")[2]), (state.ema_params, state.model_state)
    facts = {"checkpoint": number, "step": int(state.step), "dataset": task.dataset.name, "parameters": digest(network)}
    identity = {
        **facts,
        "data": config.data.to_dict(),
        "code": code_digest(),
        "model": config.model.to_dict(),
        "sde": config.training.sde,
        "smallest_time": config.training.smallest_time,
        "seed": config.seed,
    }
    params, model_state = replicate(network, jax.local_devices())
    return Context(params, model_state, number, out, identity), facts


def _failures(result: dict[str, Any], name: str = "") -> Iterator[str]:
    """Yields '3 failed of bpd' for each quantity that leaves out some of its examples or samples."""
    for key, value in result.items():
        if key == "num_failed":
            yield f"{value} failed of {name}"
        elif isinstance(value, dict):
            yield from _failures(value, f"{name} {key}".strip())


def _write_result(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Adds the result to those of earlier evaluations of the same parameters; results of others are dropped."""
    earlier = read_json(path) if path.exists() else {}
    if earlier.get("parameters") == result["parameters"]:
        result = {**earlier, **result}
    write_json(path, result)
    return result


def stats(config: Config) -> Path:
    """Writes the features of the config's training images to a file and returns its path. UserError for points."""
    dataset = datasets.load(config.data)
    if not dataset.is_image:
        raise UserError(f"--mode stats needs images; data.dataset={config.data.dataset!r} has none")
    evaluation.check_levels(dataset)
    path = evaluation.statistics_path(config.data, config.eval.stats_path)
    features = load_features(config.eval.inception_path)
    return evaluation.compute_statistics(dataset, config.data, features, path, config.eval.inception_batch_size)
