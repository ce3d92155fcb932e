# SPDX-License-Identifier: Apache-2.0
"""How `make` finds Python and makes .venv, with stand-ins for the interpreters, uv and df."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# An interpreter of some version: it passes the check of it or not, has a venv module or not, and makes a .venv.
PYTHON = """#!/bin/sh
echo "$0 $*" >> calls
case "$*" in
  *version_info*) exit {bad_version} ;;
  *ensurepip*) exit {no_venv} ;;
  "-m venv .venv") mkdir -p .venv/bin && cp pip .venv/bin/ ;;
esac
"""
CALLED = '#!/bin/sh\necho "$0 $*" >> calls\n'
DF = "#!/bin/sh\necho 'Filesystem 1M-blocks Used Available'\necho '/dev/a 9000 1 {free}'\n"


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)


def make(tmp_path, pythons, free=5000, uv=False):
    """Runs `make .venv/run.stamp` with `pythons`, name -> (version is wrong, venv is missing). Returns it and calls."""
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_a.py").write_text("mark.slow")  # the Makefile lists the files of slow tests
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir(exist_ok=True)
    for tool in ("sh", "make", "awk", "mkdir", "cp", "touch", "test", "true", "grep"):
        (bin_folder / tool).symlink_to(shutil.which(tool))
    for name, (bad_version, no_venv) in pythons.items():
        script(bin_folder / name, PYTHON.format(bad_version=int(bad_version), no_venv=int(no_venv)))
    script(bin_folder / "df", DF.format(free=free))
    script(tmp_path / "pip", CALLED)
    if uv:
        script(bin_folder / "uv", CALLED + 'case "$1" in venv) mkdir .venv ;; esac\n')
    done = subprocess.run(
        ["make", ".venv/run.stamp"], cwd=tmp_path, env={"PATH": str(bin_folder)}, capture_output=True, text=True
    )
    calls = (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""
    return done, calls.replace(f"{bin_folder}/", "")


def test_the_newest_python_makes_the_environment(tmp_path):
    fine = (False, False)
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin/python3.13", "#!/bin/sh\nexit 127\n")  # as a shim of pyenv for a version that is not there
    done, calls = make(tmp_path, {"python3": (True, False), "python3.11": fine, "python3.12": fine})
    assert done.returncode == 0 and (tmp_path / ".venv/run.stamp").exists()
    assert "python3.12 -m venv .venv" in calls and "python3.11 -m" not in calls
    assert "pip install --quiet --disable-pip-version-check -r requirements.txt" in calls


def test_uv_makes_it_where_it_is_installed(tmp_path):
    done, calls = make(tmp_path, {"python3.11": (False, True)}, uv=True)
    assert done.returncode == 0 and "ensurepip" not in calls
    assert calls.splitlines()[-2:] == [
        "uv venv --quiet --allow-existing --python python3.11 .venv",
        "uv pip install --quiet --python .venv -r requirements.txt",
    ]


@pytest.mark.parametrize(
    ("pythons", "free", "complaint"),
    [
        ({"python3": (True, False)}, 5000, "error: python3 is not Python 3.11 to 3.13; install python3.12, or give"),
        ({}, 5000, "error: python3 is not Python 3.11 to 3.13"),
        ({"python3.11": (False, True)}, 5000, "python3.11 cannot make a virtual environment; install its venv module"),
        ({"python3.11": (False, False)}, 3000, "error: .venv needs 3200 MB of disk"),
    ],
)
def test_what_is_missing_is_one_line(tmp_path, pythons, free, complaint):
    done, _ = make(tmp_path, pythons, free)
    first, *others = done.stderr.splitlines()
    assert complaint in first and all(line.startswith("make: ***") for line in others)
    assert done.returncode and not (tmp_path / ".venv").exists()
