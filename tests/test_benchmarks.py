# SPDX-License-Identifier: Apache-2.0
"""The scripts of `make bench` exist and start; the one whose program no other script builds runs on a tiny network."""

import importlib
import re
from pathlib import Path

import pytest

from benchmarks import common, step

ROOT = Path(__file__).parent.parent
SCRIPTS = {path.stem for path in ROOT.glob("benchmarks/*.py")} - {"common"}


def test_make_bench_runs_every_script():
    assert {*re.findall(r"-m benchmarks\.(\w+)", (ROOT / "Makefile").read_text())} == SCRIPTS


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_a_script_imports_and_says_how_it_is_called(name):
    module = importlib.import_module(f"benchmarks.{name}")
    assert callable(module.main) and f"python -m benchmarks.{name} " in module.__doc__


@pytest.mark.slow
def test_several_steps_a_call(monkeypatch):
    """On the CPU a step inside a scan takes about as long as outside; a factor of 10 once was between them."""
    whole = common.ddpmpp_config

    def tiny(order):
        return whole(order, size=8, nf=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())

    monkeypatch.setattr(common, "ddpmpp_config", tiny)
    rows = step.jitted(batch=2, count=3)
    assert set(rows) == {f"order {n}, {k} a call" for n in (1, 2) for k in (1, 3)} | {
        "ratio, order 1",
        "ratio, order 2",
    }
    assert all(value > 0 for value in rows.values())
