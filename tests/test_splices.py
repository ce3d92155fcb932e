# SPDX-License-Identifier: Apache-2.0
"""ODEs whose score is of one model before a time and of another after it."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from errors import UserError
from evaluators.context import split
from evaluators.likelihood import log_likelihood
from reproduce.studies import pairs, splices
from runtime.devices import replicate


def log_likelihoods(folder, seed):
    """Of the run's model alone, with the probes and data of a seed."""
    config, params, model_state = (built := splices.restored(folder))[0].config, *built[1:]
    config.seed = seed
    examples = split(built[0], "test", limit=4)
    repeat, x, index = examples.batch(0)
    arrays = replicate(params), replicate(model_state)
    return log_likelihood(built[0], examples.size)(*arrays, x, index, repeat)["logp"]


def test_at_the_ends_it_is_one_model_or_the_other(untrained_pair):
    rows = splices.splices(*untrained_pair, (0.0, 0.3), 4)
    assert [row["time"] for row in rows] == [0.0, 0.3, None]
    built = splices.restored(untrained_pair[0])[0]
    bits = [splices.bits_per_dim(built, log_likelihoods(run, 0)) for run in untrained_pair]
    np.testing.assert_allclose([rows[-1]["bpd"], rows[0]["bpd"]], [b.mean() for b in bits], rtol=1e-5)
    difference = bits[1] - bits[0]
    assert abs(difference.mean()) > 0.1, "else the test tells nothing"
    found = rows[0]["minus the first"]
    np.testing.assert_allclose(found["mean"], difference.mean(), rtol=1e-3)
    np.testing.assert_allclose(found["stderr"], difference.std(ddof=1) / 2, rtol=1e-3)
    assert rows[-1]["minus the first"]["mean"] == 0
    assert 1e-3 < abs(rows[1]["bpd"] - rows[0]["bpd"]) and 1e-3 < abs(rows[1]["bpd"] - rows[-1]["bpd"])


def test_the_time_decides_for_each_example(untrained_pair):
    (built, *model), (_, *other) = (splices.restored(run) for run in untrained_pair)
    x, t = jnp.linspace(-1, 1, 3).reshape(3, 1), jnp.array([0.1, 0.3, 0.5])
    params, states = zip(model, other, strict=True)
    score = splices.Spliced(*built).score_fn((*params, jnp.float32(0.3)), states)(x, t)
    of = [built.score_fn(*m)(x, t) for m in (model, other)]
    np.testing.assert_array_equal(score, [of[0][0], of[1][1], of[1][2]])


def test_picture_and_numbers_of_other_pairs_stay(untrained_pair, tmp_path, monkeypatch, capsys):
    study = tmp_path / "work" / pairs.STUDY
    study.mkdir(parents=True)
    first, second, _ = pairs.PAIRS["vp"]
    for name, run in zip((first, second), untrained_pair, strict=True):
        (study / f"{name}_seed0").symlink_to(run)
    monkeypatch.setattr(splices, "TIMES", (0.0, 0.3))
    out = tmp_path / "out"
    out.mkdir()
    kept = [{"time": 0.0, "sigma": 0.1, "bpd": 1.0, "minus the first": {"mean": 0.1, "stderr": 0.01}}]
    (out / "digits_splices.json").write_text(json.dumps({"pairs": {"ve": kept}}))
    arguments = ["splices", "--only=vp", "--num=4", f"--workdir={tmp_path / 'work'}", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", arguments)
    splices.main()
    result = json.loads((out / "digits_splices.json").read_text())
    assert list(result["pairs"]) == ["ve", "vp"] and result["pairs"]["ve"] == kept
    assert (out / "digits_splices.png").read_bytes().startswith(b"\x89PNG")
    assert pairs.PAIRS["vp"][2] in capsys.readouterr().out


def test_runs_that_are_not_there_are_told(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="order1_vp_long_seed0"):
        splices.splices(tmp_path / "order1_vp_long_seed0", tmp_path, (0.0,), 4)
