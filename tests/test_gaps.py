# SPDX-License-Identifier: Apache-2.0
"""The distance of model and ODE score by noise, of two models."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

import datasets
import diagnostics
from errors import UserError
from reproduce.studies import gaps, pairs
from sde_lib import VESDE, VPSDE
from task import restored

NOISE = (0.02, 0.2, 1.5)


@pytest.mark.parametrize("sde", [VPSDE(beta_min=0.1, beta_max=20.0), VESDE(sigma_min=0.005, sigma_max=4.0)])
@pytest.mark.parametrize("pixel_range", [1.0, 2.0])
def test_times_of_a_noise(sde, pixel_range):
    times, slope = gaps.times_of(sde, NOISE, pixel_range)
    np.testing.assert_allclose(sde.sigma(times) / sde.alpha(times) / pixel_range, NOISE, rtol=1e-4)
    above, below = (gaps.times_of(sde, tuple(n * f for n in NOISE), pixel_range)[0] for f in (1.05, 1 / 1.05))
    np.testing.assert_allclose(slope, (above - below) / (2 * np.log(1.05)), rtol=0.01)


def test_gaps_are_those_of_an_exact_trace(untrained_pair):
    """In one dimension a probe is exact, so pairs of probes change nothing."""
    found = gaps.gaps(untrained_pair[0], NOISE, 3, 2)
    built, params, state = restored(untrained_pair[0])
    x = datasets.eval_batch(built.dataset, built.config.data, "test", np.arange(3), seed=built.config.seed, repeat=0)
    times, slope = gaps.times_of(built.sde, NOISE, 2.0 if built.config.data.centered else 1.0)

    def exact(x, times):
        return diagnostics.fisher_curves(built.sde, built.score_fn(params, state), x, None, times, rtol=1e-5, atol=1e-5)

    truth = 0.5 * slope[:, None] * jit(exact)(jnp.asarray(x), times).score_ode
    assert found.shape == (3, 3) and np.all(found > 1e-4)
    np.testing.assert_allclose(found, truth.T, rtol=0.02)


def test_a_solver_that_gives_up_is_told(untrained_pair, tmp_path):
    (tmp_path / "checkpoints").symlink_to(untrained_pair[0] / "checkpoints")
    config = json.loads((untrained_pair[0] / "config.json").read_text())
    config["eval"]["max_steps"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"gave up on images \[0, 1\]: raise eval.max_steps"):
        gaps.gaps(tmp_path, NOISE, 2, 2)


def test_models_are_compared_image_by_image(untrained_pair, tmp_path, monkeypatch, capsys):
    study = tmp_path / "work" / pairs.STUDY
    study.mkdir(parents=True)
    first, second, title = pairs.PAIRS["vp"]
    for name, run in zip((first, second), untrained_pair, strict=True):
        (study / f"{name}_seed0").symlink_to(run)
    monkeypatch.setattr(gaps, "NOISE", NOISE)
    out = tmp_path / "out"
    out.mkdir()
    curve = {"mean": [2.0, -1.0], "stderr": [0.1, 0.1]}
    kept = {"noise": [0.1, 1.0], "first": curve, "second": curve}
    (out / "digits_gaps.json").write_text(json.dumps({"pairs": {"ve": kept}}))
    arguments = ["gaps", "--only=vp", "--num=3", "--probes=2", f"--workdir={tmp_path / 'work'}", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", arguments)
    gaps.main()
    result = json.loads((out / "digits_gaps.json").read_text())["pairs"]
    assert list(result) == ["ve", "vp"] and result["ve"] == kept
    assert (out / "digits_gaps.png").read_bytes().startswith(b"\x89PNG")
    assert f"{title}, order 1 minus 2: " in capsys.readouterr().out

    one, two = (gaps.gaps(run, NOISE, 3, 2) for run in untrained_pair)
    np.testing.assert_allclose(result["vp"]["second"]["mean"], two.mean(axis=0), rtol=1e-5)
    width = np.log(NOISE[1] / NOISE[0]), np.log(NOISE[2] / NOISE[1])
    d = one - two
    areas = width[0] * (d[:, 0] + d[:, 1]) / 2 + width[1] * (d[:, 1] + d[:, 2]) / 2
    np.testing.assert_allclose(result["vp"]["first minus second"]["mean"], d.mean(axis=0), rtol=1e-4)
    difference = result["vp"]["first minus second"]["integral"]
    np.testing.assert_allclose(difference["mean"], areas.mean(), rtol=1e-4)
    np.testing.assert_allclose(difference["stderr"], areas.std(ddof=1) / np.sqrt(3), rtol=1e-4)
