# SPDX-License-Identifier: Apache-2.0
"""The import order of the design, read from the sources; and the sizes that keep a file readable."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("models", "configs", "evaluators")  # one place in the order each
SPLIT = ("plots", "runtime", "sources", "reproduce")  # each of their modules has its own
LOWEST = {"errors"}
LOW = LOWEST | {"sde_lib", "ode", "configs"}
MIDDLE = {"checkpoints", "report", "evaluation", "datasets", "likelihood", "sampling", "losses", "models"}
MIDDLE |= {"dequantization", "diagnostics", "runtime.records"}

PLOTS = {"plots.canvas", "plots.fisher_curves", "plots.run_files"}

RUNTIME_OF_RUNS = {"runtime.locks", "runtime.launch", "runtime.hosts"}

# module -> the project's modules that it may import
ALLOWED = {
    "errors": set(),
    "sde_lib": LOWEST,
    "ode": LOWEST,
    "configs": LOWEST | {"configs"},
    "legacy": LOWEST,
    "checkpoints": LOWEST | {"legacy"},
    "runtime.trackers": LOWEST,
    "runtime.records": LOWEST | {"runtime.trackers"},
    "plots.fisher_curves": LOWEST,
    "plots.canvas": LOWEST,
    "plots.run_files": LOWEST,
    "plots.sample_grids": LOWEST | {"plots.canvas", "plots.run_files"},
    "plots.run_curves": LOWEST | {"plots.fisher_curves", "plots.canvas", "plots.run_files", "plots.sample_grids"},
    "report": LOWEST | {"configs", "plots.run_curves", "plots.canvas", "plots.run_files", "plots.sample_grids"},
    "sources.reach": set(),
    "sources.tfds": LOWEST | {"sources.reach"},
    "sources.idx": LOWEST,
    "sources.synthetic": LOWEST,
    "datasets": LOWEST | {"sources.idx", "sources.tfds", "sources.synthetic"},
    "losses": LOWEST | {"sde_lib"},
    "likelihood": LOWEST | {"sde_lib", "ode"},
    "sampling": LOWEST | {"sde_lib", "ode"},
    "models": LOWEST | {"sde_lib", "models"},
    "evaluation": LOWEST | {"datasets", "inception"},
    "inception": LOWEST | {"datasets", "runtime.records", "sources.reach"},
    "dequantization": LOWEST | {"sde_lib", "likelihood"},
    "diagnostics": LOWEST | {"sde_lib", "ode", "likelihood"},
    "fokker_planck": LOWEST | {"sde_lib"},
    "parts": LOW | MIDDLE,
    "runtime.interrupts": LOWEST,
    "runtime.locks": LOWEST,
    "runtime.programs": set(),
    "runtime.launch": LOW | MIDDLE | {"parts"},
    "loop": LOW | MIDDLE | {"parts"} | {f"runtime.{name}" for name in ("interrupts", "launch", "programs", "trackers")},
    "evaluators": LOW | MIDDLE | {"parts", "evaluators", "fokker_planck"},
    "snapshots": LOW | MIDDLE | {"parts", "evaluators"},
    "run_lib": LOW | MIDDLE | {"parts", "evaluators", "loop", "snapshots"} | RUNTIME_OF_RUNS,
    "runtime.hosts": LOWEST,
    "runtime.usage": set(),
    "runtime.console": LOWEST,
    "main": LOW | {"run_lib", "evaluation"} | {f"runtime.{name}" for name in ("hosts", "usage", "console", "programs")},
    "runtime.commands": LOWEST,
    "quickstart": LOWEST | {"report", "runtime.commands"},
    "reproduce.experiments": set(),
    "reproduce.runner": LOWEST | {"reproduce.experiments", "runtime.commands"},
    "reproduce.__main__": LOWEST | {"reproduce.experiments", "reproduce.runner", "reproduce.results"},
    "reproduce.results": LOW | MIDDLE | {"plots.run_files", "reproduce.experiments", "reproduce.pictures"},
    "reproduce.restored": LOW | MIDDLE | {"parts"},
    "reproduce.pictures": LOW | MIDDLE | {"parts", "reproduce.restored"} | PLOTS,
    "reproduce.pairs": set(),
    "reproduce.splices": LOW | MIDDLE | {"parts", "evaluators", "reproduce.pairs", "reproduce.restored"} | PLOTS,
    "reproduce.gaps": LOW | MIDDLE | {"reproduce.pairs", "reproduce.restored"} | PLOTS,
}
PURE = {"losses", "likelihood", "sampling", "sde_lib", "ode", "diagnostics", "dequantization", "fokker_planck"}


def sources():
    for path in sorted(ROOT.glob("*.py")) + [p for d in (*PACKAGES, *SPLIT) for p in sorted(ROOT.glob(f"{d}/**/*.py"))]:
        yield path.relative_to(ROOT), ast.parse(path.read_text())


def place(name):
    """Where a dotted name of a module stands in ALLOWED: its package, or itself in a package that is split."""
    package, *rest = name.split(".")
    return ".".join((package, *rest[:1])) if package in SPLIT else package


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (place(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module in SPLIT:
                yield from (place(f"{node.module}.{alias.name}") for alias in node.names)
            else:
                yield place(node.module)


@pytest.mark.parametrize(("path", "tree"), [pytest.param(*source, id=str(source[0])) for source in sources()])
def test_imports_run_one_way(path, tree):
    module = place(".".join(path.with_suffix("").parts))
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
        *(p for d in (*PACKAGES, *SPLIT, "tests", "benchmarks") for p in ROOT.glob(f"{d}/**/*.py")),
    ]:
        text = path.read_text()
        assert not text or text.startswith("# SPDX-License-Identifier: Apache-2.0\n"), path
