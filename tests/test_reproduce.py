# SPDX-License-Identifier: Apache-2.0
"""What `python -m reproduce` runs and what its numbers are made of."""

import json
import threading

import numpy as np
import pytest
from ml_collections import ConfigDict

from benchmarks.common import config_of
from configs.check import check_config
from configs.digits import ve_ncsnpp
from errors import UserError
from reproduce import results, runner
from reproduce.runner import Run, do, with_predecessors
from reproduce.studies import experiments


@pytest.mark.parametrize("fast", [True, False])
def test_every_run_has_a_valid_config_and_a_folder_of_its_own(fast):
    runs = [run for group in experiments(fast).values() for run in group]
    assert len({run.folder for run in runs}) == len(runs)
    for run in {run.config: run for run in runs}.values():
        check_config(config_of(run.config))
    for run in runs:
        config = config_of(run.config)
        for override in run.overrides + sum((overrides for _, overrides in run.evaluations), ()):
            section, key = override.partition("=")[0].split(".")
            assert key in config[section], override
        if run.after is not None:
            assert run.after.folder in {other.folder for other in runs}, "what a run starts from is run too"


def write(folder, variant, seed, bpd, samples=None, config=None):
    place = folder / f"{variant}_seed{seed}" / "eval"
    place.mkdir(parents=True)
    report = {"step": 5, "bpd": {"mean": float(np.mean(bpd))}}
    (place / "report_1.json").write_text(json.dumps(report))
    np.savez(place / "bpd_1.npz", bpd=np.asarray(bpd)[None])
    if samples is not None:
        np.savez(place / "samples_1.npz", samples=samples)
        (place.parent / "config.json").write_text(json.dumps(config.to_dict()))


def test_differences_are_paired(tmp_path):
    """Order 2 is better than order 1 by exactly 0.5 on every example, though examples differ by far more."""
    rng = np.random.default_rng(0)
    runs = []
    for seed in (0, 1):
        bpd = 10 * rng.normal(size=40)
        for variant, gain in (("order1", 0.0), ("order2", 0.5)):
            write(tmp_path / "x", variant, seed, bpd - gain)
            runs.append(Run("x", variant, seed, "", ()))
    (path, *_) = results.collect(tmp_path, "x", runs, tmp_path / "out")
    result = json.loads(path.read_text())
    (difference,) = result["order 1 minus"]
    assert difference["bpd"]["mean"] == pytest.approx(0.5)
    assert difference["bpd"]["stderr"] == pytest.approx(0, abs=1e-9)
    for paired in result["bpd of order 1 minus, paired over test examples"]:
        assert (paired["mean"], paired["stderr"]) == (pytest.approx(0.5), pytest.approx(0, abs=1e-9))
    first = next(entry for entry in result["summary"] if entry["variant"] == "order1")
    means = [row["bpd"] for row in result["runs"] if row["variant"] == "order1"]
    assert first["bpd"]["stderr"] == pytest.approx(abs(means[0] - means[1]) / 2)  # of two: half their distance


def test_a_variant_is_compared_with_its_own_first_order(tmp_path):
    """order2_long with order1_long; order2_w10, which has none, with order1; order2_vp_w10 with order1_vp."""
    gains = {"order1": 0.0, "order1_long": 1.0, "order1_vp": 2.0}
    gains |= {"order2_long": 1.25, "order2_w10": 0.75, "order2_vp_w10": 2.5}
    for variant, gain in gains.items():
        write(tmp_path / "x", variant, 0, np.arange(5.0) - gain)
    runs = [Run("x", variant, 0, "", ()) for variant in gains]
    (path, *_) = results.collect(tmp_path, "x", runs, tmp_path / "out")
    result = json.loads(path.read_text())
    expected = {"order2_long": 0.25, "order2_w10": 0.75, "order2_vp_w10": 0.5}
    for rows in (result["order 1 minus"], result["bpd of order 1 minus, paired over test examples"]):
        assert {row["variant"]: row.get("bpd", row)["mean"] for row in rows} == pytest.approx(expected)


@pytest.mark.slow
def test_pixel_frechet_of_shifted_test_images(tmp_path):
    """The test images, each brighter by one constant per pixel: the squared length of the shift."""
    import datasets

    config = ve_ncsnpp.get_config()
    dataset = datasets.load(config.data)
    images = dataset.test[np.arange(len(dataset.test))] / 16.0
    shift = np.linspace(0, 0.1, 64).reshape(8, 8, 1)
    write(tmp_path, "order1", 0, np.zeros(3), images + shift, ConfigDict(config))
    folder = tmp_path / "order1_seed0"
    distance = results.pixel_frechet(folder / "eval" / "samples_1.npz", folder)
    assert distance == pytest.approx(np.sum(shift**2), rel=1e-3)


def test_a_missing_start_is_told(tmp_path):
    base = Run("x", "base", 0, "c.py", ())
    with pytest.raises(UserError, match="run x first"):
        do(tmp_path, Run("x", "order1", 0, "c.py", (), after=base), None)


def test_numbers_of_other_machines_stay(tmp_path):
    """Seed 0 here and seed 1 there, into one file: as both at once. What is run anew replaces what was."""
    runs = [Run("x", variant, seed, "", ()) for seed in (0, 1) for variant in ("order1", "order2")]
    for run in runs:
        bpd = np.arange(5.0) - (run.variant == "order2") - run.seed
        write(tmp_path / "both" / "x", run.variant, run.seed, bpd)
        write(tmp_path / f"machine{run.seed}" / "x", run.variant, run.seed, bpd)
    write(tmp_path / "anew" / "x", "order1", 0, np.arange(5.0) + 1)
    (together, *_) = results.collect(tmp_path / "both", "x", runs, tmp_path / "out_both")
    for machine in ("machine1", "machine0"):
        (merged, *_) = results.collect(tmp_path / machine, "x", runs, tmp_path / "out")
    assert json.loads(merged.read_text()) == json.loads(together.read_text())
    assert results.missing("x", runs, merged.parent) == []
    assert results.missing("x", runs, tmp_path) == runs
    list(results.collect(tmp_path / "anew", "x", runs, merged.parent))
    rows = json.loads(merged.read_text())["runs"]
    assert [row["bpd"] for row in rows] == [3.0, 1.0, 1.0, 0.0]
    list(results.collect(tmp_path / "machine0", "x", runs[:1], merged.parent))
    assert {row["variant"] for row in json.loads(merged.read_text())["runs"]} == {"order1"}, "order2 is no variant now"


def test_what_a_run_starts_from_is_trained_too():
    """Once, before it, and not evaluated unless asked for."""
    base = Run("x", "base", 0, "c.py", ())
    runs = [Run("y", f"order{n}", 0, "c.py", (), after=base) for n in (1, 2)]
    assert with_predecessors(runs) == [base._replace(evaluations=()), *runs]
    assert with_predecessors([*runs, base]) == [base, *runs]


def test_a_run_that_waits_for_another_holds_up_nobody(tmp_path, monkeypatch):
    """Two at a time: while the base of x is trained, y's is too, though runs of x come before it; a failure is told."""
    started = {name: threading.Event() for name in ("x", "y")}

    def fake(workdir, run, predecessor):
        if predecessor is not None:
            predecessor.result()
        done.append(run.folder.name)
        if run.variant == "base":
            started[run.experiment].set()
            assert all(event.wait(20) for event in started.values()), "both bases at once"
        if run.variant == "order3":
            raise UserError("no room")

    done = []
    monkeypatch.setattr(runner, "do", fake)
    bases = {name: Run(name, "base", 0, "c.py", ()) for name in started}
    runs = [Run(name, f"order{n}", 0, "c.py", (), after=bases[name]) for name in bases for n in (1, 2, 3)]
    failures = runner.run_all(tmp_path, [*runs, Run("z", "order1", 0, "c.py", ())], 2)
    assert sorted(done[:2]) == ["base_seed0"] * 2 and len(done) == 9
    assert failures == ["x/order3_seed0: no room", "y/order3_seed0: no room"]


TALKS = """
print("12:00:00 config a.py with training.n_iters=20")
print("12:00:01 step 10/20  loss 0.5  grad_norm 1  2 steps/s  ETA 0:00:05")
print("12:00:02 likelihood, test split: 1 of 4  ETA 0:00:03", flush=True)
raise SystemExit({code})
"""


def test_the_progress_of_a_run_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "TELL_S", 0.0)
    log = tmp_path / "logs" / "digits.train.log"
    runner.run_python(log, "-c", TALKS.format(code=0))
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert told == [
        "  digits.train: step 10/20  loss 0.5  grad_norm 1  2 steps/s  ETA 0:00:05",
        "  digits.train: likelihood, test split: 1 of 4  ETA 0:00:03",
    ]
    assert len(log.read_text().splitlines()) == 3
    with pytest.raises(UserError, match=r"exit code 3 .*1 of 4"):
        runner.run_python(log, "-c", TALKS.format(code=3))
