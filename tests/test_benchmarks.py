# SPDX-License-Identifier: Apache-2.0
"""The scripts of `make bench` exist and start."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from errors import UserError
from reproduce import runner

ROOT = Path(__file__).parent.parent
SCRIPTS = {path.stem for path in ROOT.glob("benchmarks/*.py")} - {"common", "__main__"}


def test_make_bench_runs_every_script():
    assert {script for script, _, _ in benchmarks.COMMANDS.values()} == SCRIPTS
    assert "$(BIN)/python -m benchmarks\n" in (ROOT / "Makefile").read_text()


def test_what_is_measured_is_kept_and_a_failure_told(tmp_path, monkeypatch, capsys):
    """Two stand-ins for scripts, of which one fails in the first call; the network is trained once, before."""
    calls = []

    def run(log, *command):
        calls.append(command)
        log.write_text("a row\n" + json.dumps({"ratio": 2.0}) + "\n")
        if "benchmarks.input" in command and len(calls) < 4:
            raise UserError("no data")

    monkeypatch.setattr(runner, "run_python", run)
    monkeypatch.setattr(sys, "argv", ["", "--only=precision,input", f"--workdir={tmp_path}"])
    with pytest.raises(SystemExit, match="error: 1 of 2 benchmarks failed"):
        benchmarks.main()
    assert "error: input: no data" in capsys.readouterr().err
    benchmarks.main()
    assert [command[:2] for command in calls] == [
        ("main.py", f"--workdir={tmp_path / 'digits_ve'}"),
        ("-m", "benchmarks.precision"),
        ("-m", "benchmarks.input"),
        ("-m", "benchmarks.input"),
    ]
    assert f"--workdir={tmp_path / 'digits_ve'}" in calls[1]
    assert 'precision: {\n  "ratio": 2.0\n}' in capsys.readouterr().out


def test_an_unknown_benchmark_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", "--only=speed"])
    with pytest.raises(SystemExit):
        benchmarks.main()
    assert "no benchmark speed; there are step, " in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_a_script_imports_and_says_how_it_is_called(name):
    module = importlib.import_module(f"benchmarks.{name}")
    assert callable(module.main) and f"python -m benchmarks.{name} " in module.__doc__
