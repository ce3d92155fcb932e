"""The training loop: bad steps, checkpoints by the clock, damaged ones, resumes under another config, a full disk."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import checkpoints
import datasets
import run_lib
from configs.default_toy_configs import get_toy_configs
from errors import UserError

ROOT = Path(__file__).parent.parent


def tiny_mixture(**training):
    config = get_toy_configs("vesde", "mog")
    config.model.update(nf=8, num_layers=1)
    config.training.update(batch_size=16, n_iters=8, n_jitted_steps=1, log_freq=4, eval_freq=4, snapshot_freq=4)
    config.training.update(snapshot_freq_for_preemption=2)
    config.training.update(**training)
    return config


def spoil(monkeypatch, *numbers):
    """Batches number `numbers` have one value that is not a number."""
    real = datasets.train_loader

    def loader(*args, **kwargs):
        def damage(batch):
            if damage.count in numbers:
                batch["x"][3] = np.nan
            damage.count += 1
            return batch

        damage.count = 0
        inner = real(*args, **kwargs)

        class Wrapper:
            get_state, set_state = inner.get_state, inner.set_state

            def __next__(self):
                return damage({key: np.array(value) for key, value in next(inner).items()})

        return Wrapper()

    monkeypatch.setattr(datasets, "train_loader", loader)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("jitted", [1, 2])
def test_bad_steps_are_skipped(tmp_path, monkeypatch, jitted):
    loader = datasets.train_loader(datasets.load(tiny_mixture().data), tiny_mixture().data, batch_size=16, seed=42)
    batches = [next(loader) for _ in range(8)]
    spoil(monkeypatch, 2, 3, 6)
    state = run_lib.train(tiny_mixture(n_jitted_steps=jitted), tmp_path)
    assert int(state.step) == 8
    count = jax.tree.leaves([leaf for leaf in jax.tree.leaves(state.opt_state) if np.ndim(leaf) == 0])[0]
    assert int(count) == 5  # Adam counts the steps that were taken
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))
    skipped = [line for line in lines(tmp_path) if line["split"] == "skipped"]
    assert [line["step"] for line in skipped] == [3, 4, 7]
    for line in skipped:
        np.testing.assert_array_equal(line["index"], batches[line["step"] - 1]["index"])
        assert line["loss"] is None
    train = [line for line in lines(tmp_path) if line["split"] == "train"]
    assert [line["skipped"] for line in train] == [2, 1]
    assert all(np.isfinite(line["loss"]) for line in train)  # the mean of the steps that were taken


def test_a_bad_step_leaves_parameters_moments_and_ema(tmp_path, monkeypatch):
    """Stopped before the bad batch and after it: nothing but the step differs."""
    before = run_lib.train(tiny_mixture(n_iters=2), tmp_path / "before")
    spoil(monkeypatch, 2, 3)
    after = run_lib.train(tiny_mixture(n_iters=4), tmp_path / "after")
    assert (int(before.step), int(after.step)) == (2, 4)
    jax.tree.map(np.testing.assert_array_equal, before.replace(step=0), after.replace(step=0))


def test_too_many_bad_steps_end_the_run(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        spoil(patch, 0, 2, 3, 4, 5, 6, 7)
        with pytest.raises(UserError, match=r"training\.max_bad_steps=3 steps in a row.*the last good state is in"):
            run_lib.train(tiny_mixture(n_iters=20, max_bad_steps=3), tmp_path)
    restored = checkpoints.restore(checkpoints.latest(tmp_path / "checkpoints-meta"))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(restored.state))
    resumed = run_lib.train(tiny_mixture(n_iters=20, max_bad_steps=3), tmp_path)  # and goes on from there
    assert int(resumed.step) == 20


def test_resume_checkpoints_by_the_clock(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        checkpoints, "save", lambda directory, state, number, *rest: saved.append((Path(directory).name, number))
    )
    seldom = {"snapshot_freq": 1000, "snapshot_freq_for_preemption": 1000}
    run_lib.train(tiny_mixture(snapshot_minutes_for_preemption=0.0, **seldom), tmp_path / "a")
    assert saved == [("checkpoints", 1), ("checkpoints-meta", 8)]
    saved.clear()
    run_lib.train(tiny_mixture(snapshot_minutes_for_preemption=1e-9, **seldom), tmp_path / "b")
    assert [number for folder, number in saved if folder == "checkpoints-meta"] == list(range(1, 9))


def damage(path):
    for file in path.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:5])


def test_a_damaged_newest_checkpoint_is_set_aside(tmp_path, caplog):
    config = tiny_mixture()
    whole = run_lib.train(config, tmp_path / "whole")
    run_lib.train(tiny_mixture(n_iters=6), tmp_path / "run")
    meta = tmp_path / "run/checkpoints-meta"
    assert checkpoints.all_numbers(meta) == [4, 6]
    damage(meta / "checkpoint_6")
    resumed = run_lib.train(config, tmp_path / "run")
    assert (meta / "damaged_checkpoint_6").is_dir()
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    assert (tmp_path / "run/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()
    # all resume checkpoints: the newest kept one
    for number in checkpoints.all_numbers(meta):
        damage(meta / f"checkpoint_{number}")
    with pytest.raises(UserError, match=r"no checkpoint in .*checkpoints-meta can be read; they are set aside"):
        run_lib.train(config, tmp_path / "run")
    resumed = run_lib.train(config, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("model.nf", 12, r"model\.nf was 8 and is 12"),
        ("training.sde", "linearvesde", r"training\.sde was 'vesde' and is 'linearvesde'"),
        ("model.sigma_max", 30.0, r"model\.sigma_max was 50\.0 and is 30\.0"),
        ("training.batch_size", 32, r"training\.batch_size was 16 and is 32"),
        ("seed", 7, r"seed was 42 and is 7"),
    ],
)
def test_a_resume_with_another_config_names_the_keys(tmp_path_factory, key, value, complaint):
    workdir = tmp_path_factory.getbasetemp() / "resumed"
    if not workdir.exists():
        run_lib.train(tiny_mixture(n_iters=2), workdir)
    config = tiny_mixture()
    section, _, name = key.rpartition(".")
    (config[section] if section else config)[name] = value
    with pytest.raises(UserError, match=complaint):
        run_lib.train(config, workdir)
    assert checkpoints.all_numbers(workdir / "checkpoints-meta") == [2]


def test_a_resume_may_change_what_is_free(tmp_path):
    run_lib.train(tiny_mixture(n_iters=2), tmp_path)
    config = tiny_mixture(n_iters=4, score_matching_order=2)
    config.optim.lr = 1e-4
    assert int(run_lib.train(config, tmp_path).step) == 4


FULL = """
import resource, sys
import numpy as np
import checkpoints, errors
checkpoints.save(sys.argv[1], {"a": np.arange(10.0)}, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # as a full disk: a write fails half-way
try:
    checkpoints.save(sys.argv[1], {"a": np.random.rand(300, 300)}, 2)
except errors.UserError as error:
    print(error)
"""


def test_a_full_disk_is_one_line(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert "checkpoint_2 cannot be written" in done.stdout and done.stdout.count("\n") == 1
    assert "the ones before it are whole" in done.stdout
    assert checkpoints.all_numbers(tmp_path) == [1]
    np.testing.assert_array_equal(checkpoints.restore(checkpoints.latest(tmp_path)).state["a"], np.arange(10.0))
    checkpoints.save(tmp_path, {"a": np.arange(3.0)}, 2)  # there is room again
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_1", "checkpoint_2"]
