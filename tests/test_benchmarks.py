# SPDX-License-Identifier: Apache-2.0
"""The scripts of `make bench` exist and start."""

import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import accelerator, full_size
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


@pytest.mark.slow
def test_memory_of_microbatches_follows_the_law(tmp_path, monkeypatch):
    config, out = "configs/digits/vp_ddpmpp.py", tmp_path / "rows.json"
    flags = ["", f"--config={config}", "--orders=2", "--microbatches=2,4,8", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", flags)
    full_size.main()
    rows = json.loads(out.read_text())
    of_2, of_4, of_8 = (rows[f"{config} order 2 in {count}"]["intermediates_gb"] for count in (2, 4, 8))
    np.testing.assert_allclose(full_size.in_parts(of_2, of_8, 4), of_4, rtol=0.03)


def test_the_tables_of_full_size_tell_what_fits_and_what_was_not_measured(tmp_path, monkeypatch, capsys):
    def row(intermediates):
        return {"batch": 128, "parameters": 62_000_000, "trace_s": 5.0, "compile_s": 20.0, "tflop": 8.01} | {
            "intermediates_gb": intermediates,
            "arguments_gb": 1.0,
        }

    rows = {f"configs/a.py order 1 in {count}": row(gb) for count, gb in {1: 22.0, 2: 9.0, 8: 2.6}.items()}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    monkeypatch.setattr(sys, "argv", ["", "--config=configs/a.py", "--table", f"--out={tmp_path / 'rows.json'}"])
    full_size.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| `a` | 1 | 62.0 M | 5, 20 | 8.0 | 1.00 | 22.0 | 9.0 | 4.7 | 2.6 |"
    assert lines[3] == "| `a` | 2 |" + " not measured |" * 8
    assert "| `a`, 128 | 1 | 2 | 2 | 1 | 1 |" in lines  # 14.4 - 1, 21.6 - 1, 36 - 1 and 72 - 1 GB are free
    assert {line.count("|") for line in lines[:5]} == {11} and {line.count("|") for line in lines[6:]} == {7}


def test_the_accelerators_script_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    def run(minutes):
        flags = ["", "--only=machine", f"--minutes={minutes}", f"--out={tmp_path}", "--tiny", "--json"]
        monkeypatch.setattr(sys, "argv", flags)
        accelerator.main()
        return capsys.readouterr().out.splitlines()

    result = tmp_path / "machine.json"
    assert "0 minutes are over; run again for machine" in run(0)[0] and not result.exists()
    result.write_text('{"error": "no card"}')
    assert run(5)[0].startswith("machine: {") and json.loads(result.read_text())["jax"] == jax.__version__
    written = result.stat().st_mtime_ns
    assert len(run(5)) == 1 and result.stat().st_mtime_ns == written


def test_a_part_that_takes_too_long_is_an_error_in_its_file(tmp_path):
    accelerator._run("machine", 0.01, tmp_path / "machine.json", tiny=True)
    assert json.loads((tmp_path / "machine.json").read_text())["error"] == "not done in 0 s"


def test_the_tests_for_an_accelerator_exist():
    for node in accelerator.TESTS:
        path, _, name = node.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tests", "step_vp_order1_default", "likelihood_adams", "samples_ve_pc"])
def test_a_part_of_the_accelerators_script(name, tmp_path):
    accelerator._run(name, 300, tmp_path / "part.json", tiny=True)
    result = json.loads((tmp_path / "part.json").read_text())
    assert "error" not in result
    for rate in ("images_a_second", "seconds_a_step", "evaluations"):
        assert result.get(rate, 1) > 0


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_a_script_imports_and_says_how_it_is_called(name):
    module = importlib.import_module(f"benchmarks.{name}")
    assert callable(module.main) and f"python -m benchmarks.{name} " in module.__doc__
