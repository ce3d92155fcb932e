# SPDX-License-Identifier: Apache-2.0
"""The import order of the design, read from the sources; and the sizes that keep a file readable."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("models", "configs", "evaluators")
LOWEST = {"errors"}
LOW = LOWEST | {"sde_lib", "ode", "configs"}
MIDDLE = {"checkpoints", "records", "report", "evaluation", "datasets", "likelihood", "sampling", "losses", "models"}
MIDDLE |= {"dequantization", "diagnostics"}

# module -> the project's modules that it may import
ALLOWED = {
    "errors": set(),
    "sde_lib": LOWEST,
    "ode": LOWEST,
    "configs": LOWEST | {"configs"},
    "legacy": LOWEST,
    "checkpoints": LOWEST | {"legacy"},
    "trackers": LOWEST,
    "records": LOWEST | {"trackers"},
    "fisher_plot": LOWEST,
    "canvas": LOWEST,
    "run_files": LOWEST,
    "sample_plots": LOWEST | {"canvas", "run_files"},
    "plots": LOWEST | {"fisher_plot", "canvas", "run_files", "sample_plots"},
    "report": LOWEST | {"configs", "plots", "canvas", "run_files", "sample_plots"},
    "tfds_source": LOWEST,
    "synthetic": LOWEST,
    "datasets": LOWEST | {"tfds_source", "synthetic"},
    "losses": LOWEST | {"sde_lib"},
    "likelihood": LOWEST | {"sde_lib", "ode"},
    "sampling": LOWEST | {"sde_lib", "ode"},
    "models": LOWEST | {"sde_lib", "models"},
    "evaluation": LOWEST | {"datasets", "inception"},
    "inception": LOWEST | {"datasets", "records"},
    "dequantization": LOWEST | {"sde_lib", "likelihood"},
    "diagnostics": LOWEST | {"sde_lib", "ode", "likelihood"},
    "fokker_planck": LOWEST | {"sde_lib"},
    "parts": LOW | MIDDLE,
    "interrupts": LOWEST,
    "locks": LOWEST,
    "launch": LOW | MIDDLE | {"parts"},
    "loop": LOW | MIDDLE | {"parts", "interrupts", "launch", "trackers"},
    "evaluators": LOW | MIDDLE | {"parts", "evaluators", "fokker_planck"},
    "snapshots": LOW | MIDDLE | {"parts", "evaluators"},
    "run_lib": LOW | MIDDLE | {"parts", "evaluators", "loop", "locks", "launch", "snapshots"},
    "hosts": LOWEST,
    "usage": set(),
    "console": LOWEST,
    "main": LOW | {"run_lib", "hosts", "evaluation", "usage", "console"},
    "commands": LOWEST,
    "quickstart": LOWEST | {"report", "commands"},
    "reproduce": LOWEST | {"reproduce_results", "commands"},
    "reproduce_results": LOW | MIDDLE | {"run_files", "reproduce_plots"},
    "reproduce_plots": LOW | MIDDLE | {"parts", "canvas", "fisher_plot", "run_files"},
}
PURE = {"losses", "likelihood", "sampling", "sde_lib", "ode", "diagnostics", "dequantization", "fokker_planck"}


def sources():
    for path in sorted(ROOT.glob("*.py")) + [p for d in PACKAGES for p in sorted(ROOT.glob(f"{d}/**/*.py"))]:
        yield path.relative_to(ROOT), ast.parse(path.read_text())


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module.partition(".")[0]


@pytest.mark.parametrize(("path", "tree"), [pytest.param(*source, id=str(source[0])) for source in sources()])
def test_imports_run_one_way(path, tree):
    module = path.parts[0].removesuffix(".py")
    assert module in ALLOWED, f"{module} has no place in the design"
    ours = {name for name in imported(tree) if name in ALLOWED}
    assert ours - ALLOWED[module] == set()
    if module in PURE:
        names = set(imported(tree))
        assert not names & {"absl", "ml_collections", "pathlib", "os"}, f"{module} is pure: no file, no flag"


def test_configs_hold_only_what_changes():
    for path in ROOT.glob("configs/*/*.py"):
        assert len(path.read_text().splitlines()) <= 30, path


def test_every_source_names_the_licence():
    for path in [
        *ROOT.glob("*.py"),
        *(p for d in (*PACKAGES, "tests", "benchmarks") for p in ROOT.glob(f"{d}/**/*.py")),
    ]:
        text = path.read_text()
        assert not text or text.startswith("# SPDX-License-Identifier: Apache-2.0\n"), path
