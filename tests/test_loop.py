# SPDX-License-Identifier: Apache-2.0
"""The training loop: bad steps, checkpoints by the clock, damaged ones, resumes under another config, a full disk,
trackers."""

import io
import json
import math
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import checkpoints
import datasets
import losses
import run_lib
import sampling
from configs.default_toy_configs import get_toy_configs
from errors import UserError
from runtime import loop, trackers

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

    def save(directory, state, number, *rest):
        saved.append((directory.name, number))
        return directory

    monkeypatch.setattr(checkpoints, "save", save)
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


def test_a_resume_may_change_the_steps_of_a_call(tmp_path):
    """Stopped at step 7 of single steps, then 10 a call: nothing that is due every 10 steps is missed."""
    every = {"log_freq": 10, "eval_freq": 10, "snapshot_freq": 10, "snapshot_freq_for_preemption": 10}
    run_lib.train(tiny_mixture(n_iters=30, **every), tmp_path / "whole")
    run_lib.train(tiny_mixture(n_iters=7, **every), tmp_path / "parts")
    assert lines(tmp_path / "parts") == []
    run_lib.train(tiny_mixture(n_iters=30, n_jitted_steps=10, **every), tmp_path / "parts")
    whole, parts = (lines(tmp_path / run) for run in ("whole", "parts"))
    assert [(row["step"], row["split"]) for row in parts] == [(n, s) for n in (10, 20, 30) for s in ("train", "eval")]
    for a, b in zip(whole, parts, strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        np.testing.assert_allclose([b["loss"], b["first"]], [a["loss"], a["first"]], rtol=1e-4)
    for folder, numbers in (("checkpoints", [1, 2, 3]), ("checkpoints-meta", [20, 30])):
        assert checkpoints.all_numbers(tmp_path / "parts" / folder) == numbers
    states = [checkpoints.restore(tmp_path / run / "checkpoints/checkpoint_3").state for run in ("whole", "parts")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *states)


def test_fine_tuning_replays_no_randomness_of_its_base(tmp_path, monkeypatch):
    """Orders that start from one checkpoint see the same examples and draws, and other ones than the base did."""
    real, given = datasets.train_loader, []

    def loader(*args, **kwargs):
        inner = real(*args, **kwargs)

        class Wrapper:
            get_state, set_state = inner.get_state, inner.set_state

            def __next__(self):
                batch = next(inner)
                given[-1].append(batch["index"].tolist())
                return batch

        given.append([])
        return Wrapper()

    monkeypatch.setattr(datasets, "train_loader", loader)
    base = run_lib.train(tiny_mixture(n_iters=4), tmp_path / "base")
    path = str(tmp_path / "base/checkpoints/checkpoint_1")
    states = {}
    for name, options in (("one", {}), ("two", {"score_matching_order": 2}), ("on", {"init_optimizer": True})):
        n_iters = 8 if name == "on" else 4
        states[name] = run_lib.train(tiny_mixture(n_iters=n_iters, init_from=path, **options), tmp_path / name)
    base_rows, *children = given
    assert children[0][:4] == children[1][:4] == children[2][:4]
    assert not {tuple(sorted(row)) for row in base_rows} & {tuple(sorted(row)) for row in children[0]}
    keys = [states[name].key.tolist() for name in ("one", "two", "on")]
    assert keys[0] == keys[1] == keys[2] != base.key.tolist()
    grandchild = tiny_mixture(n_iters=4, init_from=str(tmp_path / "one/checkpoints/checkpoint_1"))
    run_lib.train(grandchild, tmp_path / "grandchild")
    assert len({str(rows[:4]) for rows in (base_rows, given[1], given[-1])}) == 3
    # a resumed one goes on in its own order, the file that it started from gone
    parts = tiny_mixture(n_iters=2, init_from=path)
    run_lib.train(parts, tmp_path / "parts")
    parts.training.update(n_iters=4, init_from="gone")
    resumed = run_lib.train(parts, tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, resumed, states["one"])


@pytest.mark.parametrize("precision", ["default", "float32"])
def test_matrix_products_are_as_precise_as_the_config_says(tmp_path, monkeypatch, precision):
    """What the trace of each program sees; test losses are always in float32."""
    seen = {}

    def watched(name, original):
        def call(*args, **kwargs):
            seen.setdefault(name, set()).add(jax.config.jax_default_matmul_precision)
            return original(*args, **kwargs)

        return call

    monkeypatch.setattr(jax, "grad", watched("training", jax.grad))
    monkeypatch.setattr(sampling, "ode_sampler", watched("samples", sampling.ode_sampler))
    monkeypatch.setattr(losses, "dsm_losses", watched("losses", losses.dsm_losses))
    config = tiny_mixture(n_iters=4, snapshot_sampling=True, matmul_precision=precision)
    config.sampling.matmul_precision = precision
    run_lib.train(config, tmp_path)
    assert seen == {"training": {precision}, "samples": {precision}, "losses": {precision, "float32"}}
    (launched,) = json.loads((tmp_path / "run.json").read_text())["launches"]
    told = f"training {precision}, samples {precision}, likelihoods and test losses float32"
    assert launched["precision"] == told and told in (tmp_path / "report/report.html").read_text()


def events(workdir):
    accumulator = EventAccumulator(str(workdir / "tensorboard"), {"scalars": 0, "images": 0, "histograms": 0})
    return accumulator.Reload()


def tracked(workdir, split):
    """{(step, name): value} of the finite numbers of metrics.jsonl."""
    rows = [row for row in lines(workdir) if row["split"] == split]
    facts = ("step", "split")
    return {(r["step"], f"{split}/{k}"): v for r in rows for k, v in r.items() if k not in facts and v is not None}


def test_tensorboard_has_the_metrics_samples_and_histograms(tmp_path):
    run_lib.train(tiny_mixture(snapshot_sampling=True, score_matching_order=2), tmp_path)
    board = events(tmp_path)
    for split, count in (("train", 2), ("eval", 2)):
        truth = tracked(tmp_path, split)
        tags = {tag for _, tag in truth}
        shown = {(e.step, tag): e.value for tag in tags for e in board.Scalars(tag)}
        assert shown.keys() == truth.keys() and len({step for step, _ in shown}) == count
        np.testing.assert_allclose([shown[key] for key in truth], list(truth.values()), rtol=1e-6)
    assert board.Tags()["images"] == ["samples/grid"]
    pictures = board.Images("samples/grid")
    assert [image.step for image in pictures] == [4, 8]
    assert Image.open(io.BytesIO(pictures[1].encoded_image_string)).size[0] > 500
    assert set(board.Tags()["histograms"]) == {f"eval_examples/{name}" for name in ("loss", "first", "second")}
    means = tracked(tmp_path, "eval")
    for name in ("loss", "first", "second"):
        for event in board.Histograms(f"eval_examples/{name}"):
            histogram = event.histogram_value
            assert histogram.num == 8 * 16  # examples of a batch of points
            np.testing.assert_allclose(histogram.sum / histogram.num, means[event.step, f"eval/{name}"], rtol=1e-5)


class FakeWandb(types.ModuleType):
    """Keeps what it is told; as wandb, it takes no step below the last one."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.logged, self.open = [], [], 0

    def init(self, **kwargs):
        self.inits.append(kwargs)
        self.open += 1
        return self

    def log(self, values, step):
        assert not self.logged or step >= self.logged[-1][0]
        self.logged += [(step, name, value) for name, value in values.items()]

    def finish(self):
        self.open -= 1

    def Image(self, image):  # noqa: N802
        return ("image", image.size)

    def Histogram(self, values):  # noqa: N802
        return ("histogram", len(values))


def test_weights_and_biases_has_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    config = tiny_mixture(snapshot_sampling=True, wandb_project="ours", n_iters=4)
    run_lib.train(config, tmp_path)
    run_lib.train(tiny_mixture(snapshot_sampling=True, wandb_project="ours"), tmp_path)
    first, second = wandb.inits
    assert first["id"] == second["id"] and len(first["id"]) > 8 and wandb.open == 0  # one run, gone on with
    assert (first["project"], first["name"], first["resume"]) == ("ours", tmp_path.name, "allow")
    assert first["config"]["training"]["n_iters"] == 4 and second["config"]["training"]["n_iters"] == 8
    numbers = {(step, name): value for step, name, value in wandb.logged if not isinstance(value, tuple)}
    assert numbers == {**tracked(tmp_path, "train"), **tracked(tmp_path, "eval")}
    others = [(step, name, value[0]) for step, name, value in wandb.logged if isinstance(value, tuple)]
    kinds = [("eval_examples/first", "histogram"), ("eval_examples/loss", "histogram"), ("samples/grid", "image")]
    assert others == [(step, *kind) for step in (4, 8) for kind in kinds]


def test_weights_and_biases_that_is_missing_or_refuses_is_one_line(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)  # as if it were not installed
        with pytest.raises(UserError, match=r"training\.wandb_project='ours' needs wandb.*pip install wandb") as error:
            trackers.open_trackers(tmp_path, 0, "ours", {})
        assert "\n" not in str(error.value)

    def refuse(**kwargs):
        raise wandb.Error("no key\nfound")

    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"wandb refuses \(no key found\).*WANDB_MODE=offline"):
        trackers.open_trackers(tmp_path, 0, "ours", {})


def test_the_step_is_compiled_once_and_tells_its_memory(caplog):
    traces = []

    def step(state, x, frozen):
        traces.append(0)
        return {"w": state["w"] + x.sum()}, {"loss": x.mean()[None]}

    state = jax.pmap(lambda x: x)({"w": np.zeros((1, 25_000), np.float32)})
    x = np.ones((1, 6_000), np.float32)
    with caplog.at_level("INFO", logger="absl"):
        program = loop.compiled(lambda _: jax.pmap(step, donate_argnums=0), 1, 1, math.inf, state, x, ())
    for _ in range(3):
        state, _ = program(state, x, ())
    assert len(traces) == 1
    np.testing.assert_allclose(state["w"], 18_000.0)
    # 100,000 bytes of the state, whose memory the result takes over, 24,000 of x and 4 of the loss
    assert f"({124_004 / 1024:.3g} KiB state and batch" in caplog.text and "compiled in" in caplog.text


def test_a_step_that_is_too_large_is_one_line_with_the_micro_batches_that_fit(tmp_path, caplog):
    def memory_of(parts):
        with caplog.at_level("INFO", logger="absl"):
            caplog.clear()
            run_lib.train(trained(parts), tmp_path / f"{parts}")
        number, unit = re.search(r"it needs ([\d.]+) (KiB|MiB) a device", caplog.text).groups()
        return float(number) / {"KiB": 2**20, "MiB": 2**10}[unit]

    def trained(parts, gib=0.0):
        few = {"snapshot_sampling": False, "num_microbatches": parts, "device_memory_gib": gib, "n_iters": 4}
        return tiny_mixture(score_matching_order=1, batch_size=4096, **few)

    whole, half = memory_of(1), memory_of(2)
    between = (whole + half) / 2
    assert half < 0.8 * whole
    with pytest.raises(UserError, match=r"takes .* a device.*--config\.training\.num_microbatches=2, and") as error:
        run_lib.train(trained(1, between), tmp_path / "refused")
    assert "\n" not in str(error.value) and not lines(tmp_path / "refused")
    run_lib.train(trained(2, between), tmp_path / "refused")
    assert lines(tmp_path / "refused")
    with pytest.raises(UserError, match=r"which has 1 KiB; no training\.num_microbatches makes it fit"):
        run_lib.train(trained(1, 2.0**-20), tmp_path / "hopeless")


def test_time_left_is_by_the_mean_pace(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    clock = loop._Clock(40)  # resumed there
    for step, seconds in ((50, 5.0), (60, 15.0)):
        now[0] += seconds
        speed = clock.speed(step)
    assert speed == 10 / 15 and clock.left(60, 100).total_seconds() == 40 * 20 / 20


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


@pytest.mark.parametrize(
    ("means", "shown"),
    [
        ({"first": 0.5, "loss": 0.5, "second": 0.0, "third": 0.0}, "loss 0.5  grad_norm 2"),
        ({"first": 0.5, "loss": 0.75, "second": 0.25, "third": 0.0}, "loss 0.75  first 0.5  second 0.25  grad_norm 2"),
        (
            {"asymmetry": 0.1, "first": 0.5, "loss": 0.6, "second": 0.0},
            "loss 0.6  asymmetry 0.1  first 0.5  grad_norm 2",
        ),
        ({"bound": 3.0, "log_q": -1.0, "loss": 2.0}, "loss 2  bound 3  log_q -1  grad_norm 2"),
    ],
)
def test_the_console_shows_every_term_that_is_on(means, shown):
    assert loop.shown({**means, "grad_norm": 2.0, "skipped": 1.0}) == shown


def test_shares_in_the_gradient_are_logged_and_change_nothing(tmp_path):
    """At every log_freq, of the terms of the order; the parameters are those of a run that does not log them."""
    states = {}
    for shares in (True, False):
        config = tiny_mixture(score_matching_order=3, grad_shares=shares, snapshot_sampling=False)
        states[shares] = run_lib.train(config, tmp_path / str(shares))
    jax.tree.map(np.testing.assert_array_equal, states[True].params, states[False].params)
    logged = [line for line in lines(tmp_path / "True") if line["split"] == "train"]
    names = [f"grad_share/{name}" for name in ("first", "second", "third")]
    assert len(logged) == 2 and all(sum(line[name] for name in names) == pytest.approx(1) for line in logged)
    assert not any("grad_share/first" in line for line in lines(tmp_path / "False"))
