# SPDX-License-Identifier: Apache-2.0
"""The sizes of the terms' gradients, of made-up gradients and of a run."""

import json
import sys

import numpy as np
import pytest

import run_lib
from reproduce.studies import shares
from tests.tiny import tiny_digits


def test_mean_and_spread_of_made_up_gradients():
    """Means of norm 3, 4 and 0, and noise of a batch whose squared norm is 1, 1 and 0.01; batches of 25."""
    rng = np.random.default_rng(0)
    mean = np.zeros((3, 100))
    mean[0, 5], mean[1, 7] = 3.0, 4.0
    noise = rng.normal(size=(400, 3, 100)) * np.array([0.1, 0.1, 0.01])[:, None]
    result = shares.summary(mean + noise, 25)
    first, second, third = result["terms"].values()
    assert (first["mean"], second["mean"]) == pytest.approx((3.0, 4.0), rel=0.01) and third["mean"] < 0.01
    assert [row["spread"] for row in (first, second, third)] == pytest.approx([5.0, 5.0, 0.5], rel=0.02)
    norms = np.sqrt([10.0, 17.0, 0.01])
    assert [row["share"] for row in (first, second, third)] == pytest.approx(norms / norms.sum(), rel=0.02)
    weight = result["third_order_weight_of_share"]["0.3"]
    assert weight * norms[2] / (norms[0] + norms[1] + weight * norms[2]) == pytest.approx(0.3, rel=0.01)


@pytest.mark.slow
def test_of_a_run(tmp_path, monkeypatch, capsys):
    config = tiny_digits()
    config.training.update(n_iters=2, snapshot_freq=2, snapshot_sampling=False)
    run_lib.train(config, tmp_path / "study" / "run")
    monkeypatch.setattr(sys, "argv", ["shares", str(tmp_path / "study" / "run"), "--batches=2", f"--out={tmp_path}/a"])
    shares.main()
    table = json.loads((tmp_path / "a").read_text())["study/run"]
    assert sum(row["share"] for row in table["terms"].values()) == pytest.approx(1)
    assert "third_order_weight for a share of 0.1" in capsys.readouterr().out
