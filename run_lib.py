"""The two jobs, `train` and `evaluate`: builds each part once, owns the loops and the pmap."""

import datetime
import functools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

import checkpoints
import datasets
import evaluation
import likelihood
import losses
import report
import sampling
from configs.check import check_config
from errors import UserError
from parts import Config, Parts, build, first, replicate, shard
from records import MetricsLog, Pending, write_json, write_npz

TERMS = ("loss", "first", "second", "third")


def unrolled(step_fn, state, xs):
    """`jax.lax.scan` without the loop: even one of length 1, or one that scan itself unrolls, is slow on the CPU."""
    outputs = []
    for x in xs:
        state, output = step_fn(state, x)
        outputs.append(output)
    return state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def _grouped(loader: Iterator[dict], n: int) -> Iterator[np.ndarray]:
    """Stacks n batches [B, ...] for one call of the scanned step: [local devices, n, B / devices, ...]."""
    while True:
        batches = [shard(next(loader)["x"]) for _ in range(n)]
        yield np.stack(batches, axis=1)


def _snapshot_number(config, step: int) -> int:
    """Snapshot k is the one after k * snapshot_freq steps; the last one may be one step later (n_iters = k f + 1)."""
    return max(1, math.ceil((step - 1) / config.training.snapshot_freq))


def _restore_or_init(parts: Parts, directory: Path) -> tuple[losses.TrainState, dict[str, Any]]:
    """The newest resume checkpoint and its record, or the state to start from."""
    state = parts.init_state()
    path = checkpoints.latest(directory)
    if path is None:
        return _init_from(parts.config.training, state), {}
    restored = checkpoints.restore(path)
    logging.info("resuming from %s", path)
    return checkpoints.into(state, restored.state, path), restored.record


def _init_from(training: Config, state: losses.TrainState) -> losses.TrainState:
    """A fresh state with the parameters and EMA of the checkpoint `training.init_from`, if one is given.

    With `training.init_optimizer` Adam's moments, its count (and the warm-up's) and the step go on from there as well.
    """
    path = training.init_from
    if not path:
        if training.init_optimizer:
            raise UserError("training.init_optimizer=True needs training.init_from, the checkpoint to take it from")
        return state
    source = checkpoints.into(state, checkpoints.restore(path).state, path)
    logging.info("starting from the parameters of %s, step %d", path, int(source.step))
    if not training.init_optimizer:
        return state.replace(params=source.params, ema_params=source.ema_params, model_state=source.model_state)
    step, jitted = int(source.step), training.n_jitted_steps
    if step % jitted or step >= training.n_iters:
        raise UserError(
            f"training.init_optimizer=True goes on from step {step} of {path}: training.n_iters={training.n_iters} "
            f"must be above it and training.n_jitted_steps={jitted} must divide it"
        )
    return source.replace(key=state.key)


def _eval_loss_fn(parts: Parts):
    """(ema_params, model_state) -> terms, on the first test examples: a training batch of images, eight of points.

    The same examples, times, noise and probes every time, so that the curve shows the network and not the draw.
    """
    config = parts.config
    devices = jax.local_device_count()
    size = config.training.batch_size * (1 if parts.dataset.is_image else 8) // jax.process_count()
    size = min(size, len(parts.dataset.test)) // devices * devices
    if size == 0:
        raise UserError(f"the test split of {parts.dataset.name} has fewer examples than there are devices, {devices}")
    dequantize = config.data.uniform_dequantization
    batches = datasets.eval_batches(
        parts.dataset, config.data, "test", size, seed=config.seed, dequantize=dequantize, limit=size
    )
    batch = next(batches)
    loss_fn = losses.get_loss_fn(config.training, parts.sde, lambda p, s, _: parts.score_fn(p, s))

    @functools.partial(jax.pmap, axis_name="batch")
    def terms(params, model_state, x, index):
        _, values = loss_fn(params, model_state, x, index, jax.random.PRNGKey(config.seed))
        return jax.lax.pmean(jax.tree.map(jnp.mean, values), "batch")

    x, index = shard(batch["x"]), shard(batch["index"].astype(np.int32))
    return lambda params, model_state: {
        name: float(value[0]) for name, value in terms(params, model_state, x, index).items()
    }


def _sampler(parts: Parts, batch: int):
    """(params, model_state, keys), each with a leading axis of devices -> samples [batch, ...], nfe [batch]."""
    inverse_scaler = parts.inverse_scaler
    sample = sampling.get_sampling_fn(parts.config.sampling, parts.sde, parts.dataset.shape, inverse_scaler)
    devices = jax.local_device_count()
    per_device = math.ceil(batch / devices)

    @jax.pmap
    def draw(params, model_state, key):
        return sample(parts.score_fn(params, model_state), key, per_device)

    def draw_batch(params, model_state, key):
        x, nfe = draw(params, model_state, jax.random.split(key, devices))
        x, nfe = np.asarray(x), np.asarray(nfe)
        return x.reshape(-1, *x.shape[2:])[:batch], nfe.reshape(-1)[:batch]

    return draw_batch


def train(config: Config, workdir: str | Path) -> losses.TrainState:
    """Trains to `training.n_iters` steps, or on from the newest checkpoint in `workdir/checkpoints-meta`.

    Writes `checkpoints/` (kept), `checkpoints-meta/` (the newest, for resuming), `metrics.jsonl`, `tensorboard/`,
    `samples/` and `report/` under `workdir`. Returns the final state, on the host.
    """
    workdir = Path(workdir)
    parts = build(config)
    training = config.training
    workdir.mkdir(parents=True, exist_ok=True)
    state, record = _restore_or_init(parts, workdir / "checkpoints-meta")
    step = int(state.step)
    write_json(workdir / "config.json", config.to_dict())

    loader = datasets.train_loader(
        parts.dataset,
        config.data,
        batch_size=training.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    if record:
        loader.set_state(record["loader"])
    pending = Pending(record.get("pending"))
    log = MetricsLog(workdir, step)
    loss_fn = losses.get_loss_fn(training, parts.sde, parts.score_fn)
    step_fn = losses.get_step_fn(loss_fn, parts.optimizer, config.model.ema_rate)
    # XLA on the CPU is slow at differentiating convolution kernels inside a loop: none for images there
    # (benchmarks/unrolled_steps.py).
    scan = unrolled if jax.default_backend() == "cpu" and parts.dataset.is_image else jax.lax.scan
    p_step = jax.pmap(functools.partial(scan, step_fn), axis_name="batch", donate_argnums=0)
    eval_loss = _eval_loss_fn(parts)
    n_params = sum(x.size for x in jax.tree.leaves(state.params))
    logging.info(
        "training %s on %s: %s parameters, order %d, batch %d on %d %s device(s), steps %d to %d",
        config.model.name,
        parts.dataset.name,
        f"{n_params:,}",
        training.score_matching_order,
        training.batch_size,
        jax.device_count(),
        jax.default_backend(),
        step,
        training.n_iters,
    )

    def save(folder: str, number: int, keep: int) -> None:
        saved = {"loader": loader.get_state(), "pending": pending.flush(), "config": config.to_dict()}
        checkpoints.save(workdir / folder, first(p_state), number, saved, keep)

    p_state = replicate(state)
    last_time, last_step = time.monotonic(), step
    draw_samples = _sampler(parts, 64) if training.snapshot_sampling else None
    for batch in _grouped(loader, training.n_jitted_steps):
        if step >= training.n_iters:
            break
        p_state, metrics = p_step(p_state, batch)
        pending.add(metrics)
        step += training.n_jitted_steps
        final = step >= training.n_iters
        if step % training.log_freq == 0:
            means = pending.means()
            log.write(step, "train", means)
            speed = (step - last_step) / (time.monotonic() - last_time)
            last_time, last_step = time.monotonic(), step
            _log_progress(step, training.n_iters, means, speed)
        if step % training.eval_freq == 0:
            log.write(step, "eval", eval_loss(p_state.ema_params, p_state.model_state))
        if step % training.snapshot_freq == 0 or final:
            save("checkpoints", _snapshot_number(config, step), keep=0)
            if draw_samples is not None:
                _save_samples(parts, p_state, draw_samples, workdir / "samples" / f"step_{step:08d}", step)
        if step % training.snapshot_freq_for_preemption == 0 or final:
            save("checkpoints-meta", step, keep=1)
    log.close()
    logging.info("trained to step %d; checkpoints in %s", step, workdir / "checkpoints")
    logging.info("report: %s", report.write_report(workdir))
    return first(p_state)


def _log_progress(step: int, n_iters: int, means: dict[str, float], speed: float) -> None:
    shown = "  ".join(f"{name} {means[name]:.4g}" for name in (*TERMS, "grad_norm"))
    eta = datetime.timedelta(seconds=round((n_iters - step) / speed))
    logging.info("step %d/%d  %s  %.1f steps/s  ETA %s", step, n_iters, shown, speed, eta)


def _save_samples(parts: Parts, p_state, draw_samples, path: Path, step: int) -> None:
    key = jax.random.fold_in(jax.random.PRNGKey(parts.config.seed), step)
    samples, _ = draw_samples(p_state.ema_params, p_state.model_state, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    if failed := _count_failed(samples):
        logging.warning("the sampler failed on %d of %d samples of step %d", failed, len(samples), step)
    if parts.dataset.is_image:
        report.save_image_grid(path.with_suffix(".png"), samples)
    else:
        write_npz(path.with_suffix(".npz"), samples=samples)


def _count_failed(samples: np.ndarray) -> int:
    return int(np.sum(~np.isfinite(samples).reshape(len(samples), -1).all(axis=1)))


def evaluate(config: Config, workdir: str | Path, eval_folder: str = "eval") -> list[dict]:
    """Evaluates the checkpoints `eval.begin_ckpt` to `eval.end_ckpt` (0 and 0: the newest) with the EMA parameters.

    Writes `report_<n>.json`, `bpd_<n>.npz`, `samples_<n>.npz` and, for synthetic data, `density_<n>.npz` into
    `workdir/eval_folder`. Returns what the JSON files hold. UserError if there is no such checkpoint.
    """
    workdir = Path(workdir)
    check_config(config)
    begin, end = config.eval.begin_ckpt, config.eval.end_ckpt
    paths = [checkpoints.find(workdir / "checkpoints", number) for number in range(begin, end + 1)]
    parts = build(config)
    out = workdir / eval_folder
    out.mkdir(parents=True, exist_ok=True)
    target = parts.init_state()
    results = []
    for path in paths:
        number = int(path.name.rpartition("_")[2])
        state = checkpoints.into(target, checkpoints.restore(path).state, path)
        params, model_state = replicate(state.ema_params), replicate(state.model_state)
        result: dict[str, Any] = {"checkpoint": number, "step": int(state.step), "dataset": parts.dataset.name}
        if config.eval.enable_bpd:
            result |= _evaluate_likelihood(parts, params, model_state, out, number)
        if config.eval.enable_sampling:
            result |= _evaluate_samples(parts, params, model_state, out, number)
        write_json(out / f"report_{number}.json", result)
        logging.info("checkpoint %d: %s", number, json.dumps(result))
        results.append(result)
    logging.info("results in %s; report: %s", out, report.write_report(workdir, eval_folder=eval_folder))
    return results


def _likelihood_fn(parts: Parts):
    """(params, model_state, x, index, key) -> logp [B] in nats, nfe [B]; arguments with a leading axis of devices.

    The probe of an example is a function of key and index alone, so checkpoints and orders are compared on the same.
    """
    config = parts.config.eval

    @jax.pmap
    def fn(params, model_state, x, index, key):
        probe = None
        if config.hutchinson_type != "exact":
            keys = jax.vmap(functools.partial(jax.random.fold_in, key))(index)
            probe = jax.vmap(lambda k: likelihood.probe(k, x.shape[1:], config.hutchinson_type))(keys)
        score_fn = parts.score_fn(params, model_state)
        solver = {"rtol": config.rtol, "atol": config.atol, "max_steps": config.max_steps}
        eps = parts.config.training.smallest_time
        logp, _, nfe = likelihood.ode_log_likelihood(parts.sde, score_fn, x, probe, eps=eps, **solver)
        return logp, nfe

    return fn


def _padded_likelihood(fn, params, model_state, x: np.ndarray, index: np.ndarray, key, size: int):
    """logp and nfe of n <= size examples, the batch filled up with copies of the last so that one program serves."""
    rows = np.minimum(np.arange(size), len(x) - 1)
    keys = jnp.stack([key] * jax.local_device_count())
    logp, nfe = fn(params, model_state, shard(x[rows]), shard(index[rows].astype(np.int32)), keys)
    logp, nfe = np.asarray(logp).reshape(-1)[: len(x)], np.asarray(nfe).reshape(-1)[: len(x)]
    if not np.all(np.isfinite(logp)):
        bad = index[~np.isfinite(logp)]
        raise UserError(
            f"the likelihood ODE failed on {len(bad)} of {len(x)} examples, first on number {bad[0]}: it reached "
            "eval.max_steps or a non-finite state; raise eval.max_steps, loosen eval.rtol/atol, or train further"
        )
    return logp, nfe


def _evaluate_likelihood(parts: Parts, params, model_state, out: Path, number: int) -> dict[str, Any]:
    """Every example of the split once in each repeat: bits/dim of images, nats of synthetic data."""
    config = parts.config.eval
    size = min(config.batch_size, _round_up(_split_size(parts)))
    fn = _likelihood_fn(parts)
    logps, nfes = [], []
    repeats = config.num_repeats if parts.dataset.is_image or config.hutchinson_type != "exact" else 1
    for repeat in range(repeats):
        key = jax.random.fold_in(jax.random.PRNGKey(parts.config.seed), repeat)
        batches = datasets.eval_batches(
            parts.dataset,
            parts.config.data,
            config.bpd_dataset,
            size,
            seed=parts.config.seed,
            repeat=repeat,
            limit=config.num_examples,
        )
        rows = [_padded_likelihood(fn, params, model_state, b["x"], b["index"], key, size) for b in batches]
        logps.append(np.concatenate([logp for logp, _ in rows]))
        nfes.append(np.concatenate([nfe for _, nfe in rows]))
        logging.info("likelihood: repeat %d of %d done", repeat + 1, repeats)
    logp, nfe = np.stack(logps), np.stack(nfes)  # [R, N]
    result: dict[str, Any] = {"nfe": {"min": int(nfe.min()), "mean": float(nfe.mean()), "max": int(nfe.max())}}
    if parts.dataset.is_image:
        dim = math.prod(parts.dataset.shape)
        bpd = np.stack([likelihood.bits_per_dim(jnp.asarray(row), dim, parts.inverse_scaler) for row in logp])
        result["bpd"] = evaluation.mean_and_stderr(bpd)
        if config.gaussian_baseline:
            result["gaussian_bpd"] = evaluation.gaussian_bits_per_dim(
                parts.dataset, parts.config.data, parts.config.seed
            )
        write_npz(out / f"bpd_{number}.npz", bpd=bpd, logp=logp, nfe=nfe)
    else:
        result["nll"] = {**evaluation.mean_and_stderr(-logp), "unit": "nats"}
        write_npz(out / f"bpd_{number}.npz", logp=logp, nfe=nfe)
        if parts.dataset.shape[0] <= 2:
            result |= _evaluate_density(parts, fn, params, model_state, out, number)
    return result


def _evaluate_density(parts: Parts, fn, params, model_state, out: Path, number: int) -> dict[str, Any]:
    """The model's density on a grid and, where the data's is known, its exact NLL by quadrature."""
    points, cell, data = evaluation.density_grid(parts.dataset)
    size = min(parts.config.eval.batch_size, _round_up(len(points)))
    key = jax.random.PRNGKey(parts.config.seed)
    logps = []
    for start in range(0, len(points), size):
        x = points[start : start + size]
        logps.append(_padded_likelihood(fn, params, model_state, x, np.arange(start, start + len(x)), key, size)[0])
    arrays = {"x": points, "model_logp": np.concatenate(logps), "data": data}
    result: dict[str, Any] = {}
    if parts.dataset.log_prob is not None:
        arrays["true_logp"] = parts.dataset.log_prob(points)
        result = evaluation.quadrature_nll(arrays["model_logp"], arrays["true_logp"], cell)
    write_npz(out / f"density_{number}.npz", **arrays)
    return result


def _evaluate_samples(parts: Parts, params, model_state, out: Path, number: int) -> dict[str, Any]:
    config = parts.config.eval
    size = min(config.batch_size, _round_up(config.num_samples))
    draw, samples, nfes = _sampler(parts, size), [], []
    for round_ in range(math.ceil(config.num_samples / size)):
        key = jax.random.fold_in(jax.random.PRNGKey(parts.config.seed + 1), round_)
        x, nfe = draw(params, model_state, key)
        if failed := _count_failed(x):
            raise UserError(
                f"the sampling ODE failed on {failed} of {len(x)} samples: it reached its step limit or a non-finite "
                "state; loosen sampling.rtol/atol, or train further"
            )
        samples.append(np.round(np.clip(x, 0, 1) * 255).astype(np.uint8) if parts.dataset.is_image else x)
        nfes.append(nfe)
    drawn, nfe = np.concatenate(samples)[: config.num_samples], np.concatenate(nfes)[: config.num_samples]
    write_npz(out / f"samples_{number}.npz", samples=drawn)
    if parts.dataset.is_image:
        report.save_image_grid(out / f"samples_{number}.png", drawn[:64])
    return {"sampling": {"method": parts.config.sampling.method, "num_samples": len(drawn), "nfe": float(nfe.mean())}}


def _round_up(n: int) -> int:
    return math.ceil(n / jax.local_device_count()) * jax.local_device_count()


def _split_size(parts: Parts) -> int:
    size = len(getattr(parts.dataset, parts.config.eval.bpd_dataset))
    return min(size, parts.config.eval.num_examples) if parts.config.eval.num_examples else size
