# SPDX-License-Identifier: Apache-2.0
"""Signals to real `main.py` processes, SIGKILL among them: what they leave behind, and that nothing is lost."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import checkpoints

ROOT = Path(__file__).parent.parent
CACHE = ROOT / os.environ.get("JAX_COMPILATION_CACHE_DIR", ".jax_cache") / "main"
FLAGS = os.environ["XLA_FLAGS"]
ENVIRONMENT = dict(os.environ)
TRAIN = {"training.n_iters": 60, "training.snapshot_freq": 20, "training.snapshot_freq_for_preemption": 4}
TRAIN |= {"training.log_freq": 2, "training.eval_freq": 10}


def command(mode, workdir, **overrides):
    settings = [f"--config.{key}={value}" for key, value in overrides.items()]
    flags = [f"--workdir={workdir}", f"--mode={mode}", f"--compilation_cache={CACHE}"]
    return [sys.executable, "main.py", "--config=tests/tiny.py", *flags, *settings]


def start(*args, **overrides):
    return subprocess.Popen(
        command(*args, **overrides),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*args, **overrides):
    done = subprocess.run(
        command(*args, **overrides), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def wait_until(condition, process, timeout=200.0):
    """False if the process ended first."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    raise AssertionError("the process did not get there")


def assert_same_run(a, b):
    for folder in ("checkpoints", "checkpoints-meta"):
        assert checkpoints.all_numbers(a / folder) == checkpoints.all_numbers(b / folder)
        for number in checkpoints.all_numbers(a / folder):
            one, other = (checkpoints.restore(run / folder / f"checkpoint_{number}") for run in (a, b))
            jax.tree.map(np.testing.assert_array_equal, one.state, other.state)
            assert one.record == other.record
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, and its evaluation."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    finish("train", workdir, **TRAIN)
    return workdir


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_exits_zero(tmp_path, whole, number):
    workdir = tmp_path / "run"
    process = start("train", workdir, **{**TRAIN, "training.snapshot_freq_for_preemption": 1000})
    log = workdir / "metrics.jsonl"
    assert wait_until(lambda: log.exists() and log.read_text().count("\n") >= 4, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output[-2000:]
    (step,) = checkpoints.all_numbers(workdir / "checkpoints-meta")
    assert 8 <= step < 60 and f"stopped by {number.name} after step {step}; run again to go on from" in output
    finish("train", workdir, **TRAIN)
    for split in ("train", "eval"):
        steps = [json.loads(line)["step"] for line in log.read_text().splitlines() if f'"{split}"' in line]
        assert steps == sorted(set(steps))
    assert log.read_text() == (whole / "metrics.jsonl").read_text()
    one, other = (checkpoints.restore(run / "checkpoints/checkpoint_3") for run in (workdir, whole))
    jax.tree.map(np.testing.assert_array_equal, one.state, other.state)


def test_a_second_run_on_the_same_workdir_is_refused(tmp_path):
    workdir = tmp_path / "run"
    first = start("train", workdir, **{**TRAIN, "training.n_iters": 100_000})
    try:
        assert wait_until(lambda: (workdir / "metrics.jsonl").exists(), first)
        second = subprocess.run(command("train", workdir, **TRAIN), cwd=ROOT, capture_output=True, text=True)
        last = second.stderr.strip().splitlines()[-1]
        assert second.returncode == 1 and last.startswith("error: another run is at work in --workdir")
        assert f'"pid": {first.pid}' in last and "Traceback" not in second.stderr
    finally:
        first.kill()
        first.communicate()


def kill_when(condition, *args, **overrides):
    """SIGKILL as soon as the condition holds. False if the process had ended by itself before."""
    process = start(*args, **overrides)
    try:
        reached = wait_until(condition, process)
        os.kill(process.pid, signal.SIGKILL)
        return reached
    finally:
        process.communicate()


EVAL = {"eval.enable_loss": True, "eval.num_repeats": 2, "eval.num_samples": 24, "eval.bound": True}
EVAL |= {"eval.bound_num_times": 4}


@pytest.mark.slow
def test_kill_9_during_evaluation(tmp_path, whole):
    """After the first unit of likelihood and of samples; then the figures are those of an uninterrupted run."""
    finish("eval", whole, **EVAL)
    workdir = tmp_path / "run"
    workdir.mkdir()
    os.symlink(whole / "checkpoints", workdir / "checkpoints")
    for kind, count in (("likelihood", 2), ("samples", 1)):
        units = workdir / "eval" / "units"
        assert kill_when(
            lambda k=kind, n=count, u=units: len(list(u.glob(f"{k}_*/*.npz"))) >= n, "eval", workdir, **EVAL
        )
        assert not (workdir / "eval" / "report_3.json").exists()
    finish("eval", workdir, **EVAL)
    assert (workdir / "eval/report_3.json").read_text() == (whole / "eval/report_3.json").read_text()
    for name in ("loss_3", "bpd_3", "bound_3", "samples_3"):
        one, other = (np.load(run / "eval" / f"{name}.npz") for run in (workdir, whole))
        assert set(one.files) == set(other.files)
        for key in one.files:
            np.testing.assert_array_equal(one[key], other[key])


@pytest.mark.slow
def test_kill_9_during_train_deq(tmp_path, whole):
    """And the evaluation with the dequantiser that comes of it."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    os.symlink(whole / "checkpoints", workdir / "checkpoints")
    deq = {**TRAIN, "deq.n_iters": 40}
    finish("train_deq", whole, **deq)
    meta = workdir / "flowpp_dequantizer" / "checkpoints-meta"
    for step in (8, 24):
        assert kill_when(lambda n=step: (checkpoints.all_numbers(meta) or [0])[-1] >= n, "train_deq", workdir, **deq)
    finish("train_deq", workdir, **deq)
    assert_same_run(workdir / "flowpp_dequantizer", whole / "flowpp_dequantizer")
    deq_eval = {"eval.dequantizer": True, "eval.enable_sampling": False, "eval.num_repeats": 1}
    for run in (workdir, whole):
        finish("eval", run, **deq_eval)
    reports = [json.loads((run / "eval/report_3.json").read_text()) for run in (workdir, whole)]
    assert reports[0]["bpd_variational"] == reports[1]["bpd_variational"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_training_killed_at_twenty_moments_ends_as_if_it_had_not_been(tmp_path):
    """Half of them inside the writing of a checkpoint (a temporary folder of orbax is there), half at random times."""
    train = {**TRAIN, "training.n_iters": 600, "training.snapshot_freq": 100}
    train |= {"training.snapshot_freq_for_preemption": 2, "training.eval_freq": 50, "training.log_freq": 10}
    finish("train", tmp_path / "whole", **train)
    workdir, rng, log = tmp_path / "killed", random.Random(0), []
    for i in range(20):
        before = (checkpoints.all_numbers(workdir / "checkpoints-meta") or [0])[-1]
        goal, started = before + rng.randrange(2, 40), None

        def inside_a_write(goal=goal):
            numbers = checkpoints.all_numbers(workdir / "checkpoints-meta")
            temporary = list((workdir / "checkpoints-meta").glob("*orbax-checkpoint-tmp*"))
            return bool(temporary) and (numbers or [0])[-1] >= goal

        delay = rng.uniform(0, 3)

        def at_random(goal=before + 2, delay=delay):
            nonlocal started
            if started is None and (checkpoints.all_numbers(workdir / "checkpoints-meta") or [0])[-1] >= goal:
                started = time.monotonic()
            return started is not None and time.monotonic() - started > delay

        reached = kill_when(inside_a_write if i % 2 == 0 else at_random, "train", workdir, **train)
        left = sorted(p.name for p in (workdir / "checkpoints-meta").iterdir())
        log.append(f"kill {i + 1}: {'inside a write' if i % 2 == 0 else f'{delay:.2f} s in'}; left {', '.join(left)}")
        assert reached, "the run ended before it could be killed: raise n_iters"
    finish("train", workdir, **train)
    print("\n".join(log))
    assert_same_run(workdir, tmp_path / "whole")
    assert not list((workdir / "checkpoints-meta").glob("*tmp*")), "what the kills left is cleaned away"
