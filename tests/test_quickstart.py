# SPDX-License-Identifier: Apache-2.0
"""Which commands `make quickstart` starts, with a stand-in for `main.py`."""

import json
import re
import sys
from pathlib import Path

from reproduce import quickstart, runner


def test_another_number_of_steps_trains_anew(tmp_path, monkeypatch, capsys):
    calls = []

    def run_python(log, *command):
        """A run whose result tells how long it was trained."""
        flags = command[1:]
        calls.append(flags)
        values = dict(re.fullmatch("--(.+?)=(.+)", flag).groups() for flag in flags)
        if values["mode"] == "eval":
            steps, folder = int(values["config.training.n_iters"]), Path(values["workdir"]) / "eval"
            result = {"checkpoint": 1, "step": steps, "exact_nll": 1.0 / steps, "true_entropy": 0.0, "kl": 1.0 / steps}
            result |= {
                "bpd": {"mean": 4.0 + steps, "stderr": 0.1},
                "gaussian_bpd": 6.5,
                "baselines": {"histogram": 4.0, "png": 5.0},
            }
            folder.mkdir(parents=True)
            (folder / "report_1.json").write_text(json.dumps(result))

    def summary(mog_steps, digits_steps):
        arguments = [f"--workdir={tmp_path}", f"--mog_steps={mog_steps}", f"--digits_steps={digits_steps}"]
        monkeypatch.setattr(sys, "argv", ["quickstart.py", *arguments])
        quickstart.main()
        return json.loads((tmp_path / "summary.json").read_text())

    monkeypatch.setattr(runner, "run_python", run_python)
    assert summary(20, 10)["mog_order3_nll"] == 1 / 20 and len(calls) == 8
    assert summary(40, 10)["mog_order3_nll"] == 1 / 40 and len(calls) == 14  # the digits are not repeated
    assert summary(40, 30)["digits_bpd"] == 34 and len(calls) == 16
    assert "order 3" in capsys.readouterr().out.splitlines()[-4]  # the table: three orders, the digits, two paths
    assert summary(20, 10)["mog_order3_nll"] == 1 / 20 and len(calls) == 16  # fewer: nothing was overwritten
