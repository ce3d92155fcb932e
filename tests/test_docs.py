# SPDX-License-Identifier: Apache-2.0
"""The documents name what exists: functions, files, config keys and flags, read from the sources by `ast`."""

import ast
import functools
import re
from pathlib import Path

import numpy as np
import pytest

from configs.check import flatten
from configs.default_configs import get_default_configs

ROOT = Path(__file__).parent.parent
DOCS = sorted(ROOT.glob("docs/*.md"))
KEYS = flatten(get_default_configs())
SECTIONS = "|".join(sorted({key.partition(".")[0] for key in KEYS if "." in key}))
# the keys that a document names although they are not in the defaults: the public code's, and those it shows how to add
ELSEWHERE = {
    "migrate.md": {"data.tfrecords_path"},
    "extend.md": {"eval.enable_denoising", "training.asymmetry_weight"},
}
FLAGS_OF_ABSL = {"config", "help", "helpfull"}


def named(paths):
    return [pytest.param(path, id=path.name) for path in paths]


@functools.cache
def definitions(path):
    """Qualified names of the functions, classes, methods and constants of a file."""
    names = set()

    def visit(body, prefix):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names.update(prefix + t.id for target in targets for t in ast.walk(target) if isinstance(t, ast.Name))

    visit(ast.parse((ROOT / path).read_text()).body, "")
    return names


def spans(text):
    """What stands in single backticks, outside of code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


def commands(text):
    """The commands with main.py, continued lines joined."""
    return [line for line in text.replace("\\\n", " ").splitlines() if "main.py" in line]


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 180 and len(text.split()) <= 1700


def test_the_example_of_the_readme_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    exec(example, names := {})
    assert {term.shape for term in names["losses_of_x"]} == {(8,)} and names["bits_per_dim"].shape == (8,)
    # of Gaussian pixels of deviation 0.5, of which one of 256 levels takes 2 / 256
    expected = np.mean(np.log2(0.5 * np.sqrt(2 * np.pi)) + np.square(names["x"]) / 0.5 / np.log(2)) + 7
    np.testing.assert_allclose(np.mean(names["bits_per_dim"]), expected, atol=0.02)


@pytest.mark.parametrize("path", named(DOCS))
def test_functions_exist(path):
    references = [m for span in spans(path.read_text()) if (m := re.fullmatch(r"([\w/]+\.py): ([\w.]+)", span))]
    missing = [m[0] for m in references if not (ROOT / m[1]).is_file() or m[2] not in definitions(m[1])]
    assert missing == []
    assert len(references) > 50 or path.name != "math.md"


@pytest.mark.parametrize("path", named([ROOT / "README.md", *DOCS]))
def test_links_exist(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.S | re.M)
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)
    }
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        if "://" not in link:
            assert (path.parent / file).exists() if file else anchor in anchors, link


@pytest.mark.parametrize("path", named([ROOT / "README.md", *DOCS]))
def test_config_keys_exist(path):
    text = path.read_text()
    pattern = rf"(?:(?:{SECTIONS})\.\w+|seed)"
    found = {m[1] for span in spans(text) if (m := re.fullmatch(rf"({pattern})(?:=\S*)?", span))}
    for command in [*commands(text), *spans(text)]:
        found.update(re.findall(r"--config\.([\w.]+)", command))
    files = {f"{section}.py" for section in SECTIONS.split("|")}
    assert found - set(KEYS) - ELSEWHERE.get(path.name, set()) - files == set()


def test_diffs_of_extend_apply():
    """Every hunk of docs/extend.md finds its context once in the sources, one after the other, and leaves Python."""
    files = {}
    for block in re.findall(r"```diff\n(.*?)```", (ROOT / "docs/extend.md").read_text(), flags=re.S):
        for part in re.split(r"^\+\+\+ ", block, flags=re.M)[1:]:
            name, _, body = part.partition("\n")
            for hunk in filter(str.strip, re.split(r"^@@.*\n", body, flags=re.M)):
                lines = hunk.splitlines()
                before = "".join(line[1:] + "\n" for line in lines if not line.startswith("+"))
                after = "".join(line[1:] + "\n" for line in lines if not line.startswith("-"))
                text = files.get(name) or ((ROOT / name).read_text() if (ROOT / name).exists() else "")
                assert text.count(before) == 1 if before else not text, f"{name}:\n{before}"
                files[name] = text.replace(before, after) if before else after
    assert len(files) > 8
    for name, text in files.items():
        ast.parse(text, name)


@pytest.mark.parametrize("path", named([ROOT / "README.md", *DOCS]))
def test_flags_exist(path):
    defined = set(re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', (ROOT / "main.py").read_text())) | FLAGS_OF_ABSL
    text = path.read_text()
    flags = [re.match(r"--(\w+)", span) for span in spans(text)]
    used = {flag[1] for flag in flags if flag} | {f for line in commands(text) for f in re.findall(r" --(\w+)", line)}
    assert used <= defined


@pytest.mark.parametrize("path", named(DOCS))
def test_config_files_exist(path):
    files = set(re.findall(r"--config[ =](configs/\S+\.py)", path.read_text()))
    shown = set(re.findall(r"^\+\+\+ (\S+)$", path.read_text(), re.M))  # the files that a document shows how to add
    assert [file for file in files - shown if not (ROOT / file).is_file()] == []
