# SPDX-License-Identifier: Apache-2.0
"""The picture of the Fisher curves, from a file as the evaluation writes it."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from diagnostics import FisherCurves
from errors import UserError
from report import run_curves, run_files


def curves(times, names):
    """A mean and standard error for each name, of different height and slope, 0 at T as where prior and model agree."""
    arrays = {"times": times}
    for i, name in enumerate(names):
        arrays[name] = 10 ** (i + 1 - 4 * times) * (times < 1)
        arrays[f"{name}_stderr"] = 0.1 * arrays[name]
    return arrays


@pytest.fixture
def run(tmp_path):
    (tmp_path / "eval").mkdir()
    times = np.linspace(1e-3, 1, 30)
    np.savez(tmp_path / "eval/fisher_2.npz", **curves(times, FisherCurves._fields))
    return run_files.load(tmp_path)


def test_picture_of_the_newest_file(run):
    (picture,) = run_curves.pictures(run)
    assert picture.name == "fisher" and picture.png.startswith(b"\x89PNG")
    assert "eval/fisher_2.npz" in picture.caption


def test_every_curve_is_drawn_as_it_is():
    assert {*run_curves.SCORES, *run_curves.DIVERGENCES} == set(FisherCurves._fields)
    times = np.linspace(1e-3, 1, 30)
    arrays = curves(times, FisherCurves._fields)
    for names in (FisherCurves._fields, run_curves.FISHER_REQUIRED[1:]):
        axes = Figure().subplots(1, 2)
        run_curves.draw_fisher(
            axes, {k: v for k, v in arrays.items() if k.removesuffix("_stderr") in ("times", *names)}
        )
        for ax, labels in zip(axes, (run_curves.SCORES, run_curves.DIVERGENCES), strict=True):
            assert ax.get_yscale() == "log" and ax.get_xlabel() == "t" and "nats" in ax.get_ylabel()
            lines = {line.get_label(): line for line in ax.get_lines()}
            assert set(lines) == {label for name, label in labels.items() if name in names}
            assert len(ax.collections) == len(lines) and len({line.get_color() for line in lines.values()}) == len(
                lines
            )
            for name in set(labels) & set(names):
                np.testing.assert_allclose(lines[labels[name]].get_xydata()[:-1, 1], arrays[name][:-1])


def test_a_distance_that_vanishes_does_not_stretch_the_axis():
    times = np.linspace(1e-3, 1, 5)
    arrays = {name: np.array([1e5, 1e3, 10, 1, 1e-13]) for name in run_curves.FISHER_REQUIRED} | {"times": times}
    axes = Figure().subplots(1, 2)
    run_curves.draw_fisher(axes, arrays)
    bottom, top = axes[0].get_ylim()
    assert top > 1e5 and 1e9 < top / bottom < 1e10


def test_a_file_without_a_curve_is_named(run):
    np.savez(run.eval / "fisher_3.npz", times=np.ones(2))
    with pytest.raises(UserError, match=r"fisher_3\.npz"):
        list(run_curves.pictures(run))
