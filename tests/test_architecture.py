# SPDX-License-Identifier: Apache-2.0
"""The order of the modules in the design, read from the sources; and the sizes that keep the house readable."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("checkpoints", "configs", "evaluators", "models", "report", "reproduce", "runtime", "sources")

# From the lowest to the highest; a module imports from lower levels and from its own package.
LEVELS = (
    ("errors",),
    ("configs", "sde_lib", "ode", "sources", "runtime"),
    ("models", "losses", "likelihood", "sampling", "datasets", "checkpoints", "report"),
    ("diagnostics", "dequantization", "evaluation"),
    ("task",),
    ("runtime.launch",),
    ("evaluators", "runtime.loop"),
    ("run_lib",),
    ("main", "reproduce"),
)
LEVEL = {module: level for level, modules in enumerate(LEVELS) for module in modules}
# No file, no flag, no global randomness; each may import only these of ours.
PURE = ("losses", "likelihood", "sampling", "sde_lib", "ode", "diagnostics", "dequantization")
OF_PURE = {"errors", "sde_lib", "ode", "likelihood", "losses"}
MOST_LINES = 60  # of a function


def sources():
    for path in sorted([*ROOT.glob("*.py"), *(p for package in PACKAGES for p in ROOT.glob(f"{package}/**/*.py"))]):
        yield path.relative_to(ROOT), ast.parse(path.read_text())


def place(name):
    """The entry of LEVEL for a module: itself, if it stands apart from its package there, or its first name."""
    two = ".".join(name.split(".")[:2])
    return two if two in LEVEL else name.partition(".")[0]


def imported(tree):
    """Dotted names of all that a module imports; of `from a import b` both `a` and, if that is a level, `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


every_source = pytest.mark.parametrize(
    ("path", "tree"), [pytest.param(*source, id=str(source[0])) for source in sources()]
)


@every_source
def test_imports_run_one_way(path, tree):
    module = place(".".join(path.with_suffix("").parts))
    assert module in LEVEL, f"{module} has no place in the design"
    names = {place(name) for name in imported(tree)}
    ours = {name for name in names if name in LEVEL and name.partition(".")[0] != module.partition(".")[0]}
    assert [name for name in ours if LEVEL[name] >= LEVEL[module]] == []
    if module in PURE:
        assert ours <= OF_PURE
        assert not names & {"absl", "ml_collections", "pathlib", "os"}, f"{module} is pure: no file, no flag"


@every_source
def test_nothing_is_unpickled_and_functions_fit_on_a_screen(path, tree):
    assert not {name.partition(".")[0] for name in imported(tree)} & {"pickle", "dill", "cloudpickle", "joblib"}
    functions = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and path.name != "default_configs.py"
    ]
    assert [f.name for f in functions if f.end_lineno - f.lineno + 1 > MOST_LINES] == []


def test_the_top_level_is_small():
    assert len(list(ROOT.glob("*.py"))) <= 13


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
