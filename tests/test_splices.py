# SPDX-License-Identifier: Apache-2.0
"""ODEs whose score is of one model before a time and of another after it."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints
import parts
from configs.toy import mog_ve
from errors import UserError
from evaluators.context import split
from evaluators.likelihood import log_likelihood
from reproduce import splices


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs of two untrained networks on the mixture."""
    folders = []
    for seed in (0, 1):
        config = mog_ve.get_config()
        config.seed = seed
        config.model.nf = 8
        config.eval.update(rtol=1e-4, atol=1e-4, batch_size=4)
        folder = tmp_path_factory.mktemp("runs") / f"seed{seed}"
        state = jax.device_get(parts.build(config).init_state())
        leaves, tree = jax.tree.flatten(state.ema_params)
        rng = np.random.default_rng(seed)
        noisy = state.replace(ema_params=tree.unflatten([p + 0.3 * rng.normal(size=p.shape) for p in leaves]))
        checkpoints.save(folder / "checkpoints", noisy, 1, {"config": config.to_dict()})
        (folder / "config.json").write_text(json.dumps(config.to_dict()))
        folders.append(folder)
    return folders


def log_likelihoods(folder, seed):
    """Of the run's model alone, with the probes and data of a seed."""
    config, params, model_state = (built := splices.restored(folder))[0].config, *built[1:]
    config.seed = seed
    examples = split(built[0], "test", limit=4)
    repeat, x, index = examples.batch(0)
    arrays = parts.replicate(params), parts.replicate(model_state)
    return log_likelihood(built[0], examples.size)(*arrays, x, index, repeat)["logp"]


def test_at_the_ends_it_is_one_model_or_the_other(runs):
    rows = splices.splices(*runs, (0.0, 0.3), 4)
    assert [row["time"] for row in rows] == [0.0, 0.3, None]
    bits = [splices.bits_per_dim(splices.restored(runs[0])[0], log_likelihoods(run, 0)) for run in runs]
    np.testing.assert_allclose([rows[-1]["bpd"], rows[0]["bpd"]], [b.mean() for b in bits], rtol=1e-5)
    difference = bits[1] - bits[0]
    assert abs(difference.mean()) > 0.1, "else the test tells nothing"
    found = rows[0]["minus the first"]
    np.testing.assert_allclose(found["mean"], difference.mean(), rtol=1e-3)
    np.testing.assert_allclose(found["stderr"], difference.std(ddof=1) / 2, rtol=1e-3)
    assert rows[-1]["minus the first"]["mean"] == 0
    assert 1e-3 < abs(rows[1]["bpd"] - rows[0]["bpd"]) and 1e-3 < abs(rows[1]["bpd"] - rows[-1]["bpd"])


def test_the_time_decides_for_each_example(runs):
    (built, *model), (_, *other) = (splices.restored(run) for run in runs)
    x, t = jnp.linspace(-1, 1, 3).reshape(3, 1), jnp.array([0.1, 0.3, 0.5])
    params, states = zip(model, other, strict=True)
    score = splices.Spliced(*built).score_fn((*params, jnp.float32(0.3)), states)(x, t)
    of = [built.score_fn(*m)(x, t) for m in (model, other)]
    np.testing.assert_array_equal(score, [of[0][0], of[1][1], of[1][2]])


def test_picture_and_numbers_of_other_pairs_stay(runs, tmp_path, monkeypatch, capsys):
    study = tmp_path / "work" / splices.STUDY
    study.mkdir(parents=True)
    first, second, _ = splices.PAIRS["vp"]
    for name, run in zip((first, second), runs, strict=True):
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
    assert splices.PAIRS["vp"][2] in capsys.readouterr().out


def test_runs_that_are_not_there_are_told(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="order1_vp_long_seed0"):
        splices.splices(tmp_path / "order1_vp_long_seed0", tmp_path, (0.0,), 4)
