# SPDX-License-Identifier: Apache-2.0
"""The studies of recipes and orders: their runs have valid configs, and the table is that of made-up likelihoods."""

import ast
import json
import sys

import numpy as np
import pytest

from benchmarks.common import config_of
from configs.check import check_config
from reproduce.studies import orders, recipes


def value_of(text, default):
    return text if isinstance(default, str) else type(default)(ast.literal_eval(text))


@pytest.mark.parametrize("data", recipes.DATA)
def test_runs_have_valid_configs(data):
    of_recipes, of_orders = recipes.runs_of("recipes", data, 2), list(orders.runs_of(data, 2))
    assert len({run.folder for run in of_recipes}) == len(of_recipes) == 16
    assert {run.after and run.after.folder for run in of_orders} <= {run.folder for run in of_recipes}
    for run in (*of_recipes[:7], *of_orders[: len(of_orders) // 2]):
        check_configs(run)


def check_configs(run):
    for _, overrides in run.evaluations:
        config = config_of(run.config)
        for key, _, text in (override.partition("=") for override in run.overrides + overrides):
            section, name = key.split(".")
            config[section][name] = value_of(text, config[section][name])
        check_config(config)


def test_runs_on_mixtures_have_valid_configs():
    for dim in orders.MIXTURES:
        runs = list(orders.runs_of(f"mixture_{dim}", 2))
        assert len({run.folder for run in runs}) == len(runs) == 16
        assert {run.after.folder for run in runs if run.after} == {run.folder for run in runs if run.variant == "base"}
        for run in runs[:8]:
            check_configs(run)


def test_table_of_made_up_likelihoods(tmp_path, monkeypatch):
    """ve is the best public recipe; ml_vp is better by 0.1 in seed 0 and 0.3 in seed 1, and its grids err by 0.01."""
    level = {"vp": 3.0, "vp_weighted": 2.5, "ve": 2.0, "ve_velocity": 1.9, "ml_vp": 1.8, "ml_vp_levels": 1.7}
    level |= {"ml_vp_levels_fourier": 1.75, "ml_straight": 1.85}
    image = np.linspace(-1, 1, 7)
    for run in recipes.runs_of("recipes", "digits", 2):
        for name, _ in run.evaluations:
            bpd = level[run.variant] + image + (run.variant == "ml_vp") * 0.1 * (1 - 2 * run.seed)
            folder = tmp_path / run.folder / name
            folder.mkdir(parents=True)
            shift = 0.0 if name == "eval" else 0.01 * (-1) ** np.arange(7)
            np.savez(folder / "bpd_1.npz", bpd=(bpd + shift)[None], nfe=np.full((1, 7), 90 + run.seed))
            if name == "eval" and run.variant in recipes.SAMPLED:
                np.savez(folder / "samples_1.npz", samples=np.full((3, 4, 4, 1), 0.5))
    arguments = ["--only=digits", "--seeds=2", "--collect", f"--workdir={tmp_path}", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["recipes", *arguments])
    recipes.main()
    table = json.loads((tmp_path / "recipes_digits.json").read_text())
    row = table["ml_vp"]
    assert list(table) == list(level) and row["nfe"] == 90.5
    assert row["bpd"]["mean"] == pytest.approx(1.8) and row["minus ve"]["mean"] == pytest.approx(-0.2)
    assert row["minus ve"]["stderr"] == pytest.approx(0.1)  # over two seeds, 0.2 apart
    assert row["paired stderr over images"] == pytest.approx(0, abs=1e-12)  # the gain is the same for all images
    assert row["error_65"] == pytest.approx(0.01) and row["error_129"] == pytest.approx(0.01)
    assert (tmp_path / "samples_digits.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(sys, "argv", ["recipes", *arguments, "--recipes=vp,ml_vp"])
    recipes.main()
    table = json.loads((tmp_path / "recipes_digits.json").read_text())
    assert list(table) == ["vp", "ml_vp"] and table["ml_vp"]["minus vp"]["mean"] == pytest.approx(-1.2)
    monkeypatch.setattr(sys, "argv", ["recipes", *arguments, "--recipes=pv"])
    with pytest.raises(SystemExit):
        recipes.main()
