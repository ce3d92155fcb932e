# SPDX-License-Identifier: Apache-2.0
"""docs/tour.ipynb runs from top to bottom, and what it computes is true, after fewer training steps than it has itself.

A kernel executes the notebook, as Jupyter does; it shares this suite's compilation cache.
"""

import json
import math
import re
from pathlib import Path

import jax
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

DOCS = Path(__file__).parent.parent / "docs"
TOUR = DOCS / "tour.ipynb"
STEPS = 2000

SHOW = """
import json

print(json.dumps({
    "results": results,
    "ode_error": float(ode_error),
    "distance": float(distance),
    "samples": len(samples),
    "moments": [np.asarray(values).reshape(-1).tolist() for values in dataset.mixture],
    "entropy": dataset.entropy,
    "point": [float(term.max()) for term in point_terms],
    "zero": [float(term.mean()) for term in zero_terms],
    "slopes": {str(theta): {name: list(map(float, value)) for name, value in terms.items()}
               for theta, terms in slopes.items()},
}))
"""


def cells(kind):
    return [cell for cell in nbformat.read(TOUR, as_version=4).cells if cell.cell_type == kind]


def test_is_kept_without_outputs():
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells("code"))


def test_names_files_that_exist():
    text = "\n".join(cell.source for cell in cells("markdown"))
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    configs = re.findall(r"--config (\S+)", text)
    assert len(links) > 5 and len(configs) > 1
    assert [name for name in links if not (DOCS / name).exists()] == []
    assert [name for name in configs if not (DOCS.parent / name).exists()] == []


@pytest.fixture
def found(monkeypatch, tmp_path):
    """What the notebook has in its variables at the end."""
    for name, value in {
        "TOUR_STEPS": STEPS,
        "JAX_COMPILATION_CACHE_DIR": Path(jax.config.jax_compilation_cache_dir).resolve(),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": jax.config.jax_persistent_cache_min_compile_time_secs,
        "IPYTHONDIR": tmp_path / "ipython",
        "JUPYTER_RUNTIME_DIR": tmp_path / "runtime",
    }.items():
        monkeypatch.setenv(name, str(value))
    notebook = nbformat.read(TOUR, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(SHOW))
    client = NotebookClient(notebook, timeout=None, startup_timeout=300, resources={"metadata": {"path": str(DOCS)}})
    client.execute()
    return json.loads(notebook.cells[-1].outputs[0]["text"])


@pytest.mark.slow
def test_executes_and_is_true(found):
    results = found["results"]
    models = {f"{process}, {name}" for process in ("ODE", "SDE") for name in ("exact score", "order 1", "order 3")}
    assert set(results) == {"Gaussian", *models}
    for name, result in results.items():
        assert math.isfinite(result["kl"]) and result["kl"] > -1e-4, name
        assert result["model_mass"] == pytest.approx(1, abs=1e-2), name

    weights, means, variances = map(np.asarray, found["moments"])
    variance = weights @ (variances + means**2) - (weights @ means) ** 2
    of_gaussian = 0.5 * math.log(2 * math.pi * math.e * variance) - found["entropy"]
    assert results["Gaussian"]["kl"] == pytest.approx(of_gaussian, abs=2e-3)
    # The exact score's ODE and SDE end at the mixture with sigma(eps)^2 = 1e-4 added to its variances. The components
    # being apart, that costs the KL of each from its broadened self.
    ratio = variances / (variances + 1e-4)
    floor = float(np.sum(weights * (ratio - 1 - np.log(ratio))) / 2)
    assert found["ode_error"] < 1e-3
    for process in ("ODE", "SDE"):
        assert results[f"{process}, exact score"]["kl"] == pytest.approx(floor, abs=2e-4)
        assert results[f"{process}, order 3"]["kl"] < results["Gaussian"]["kl"]

    assert max(found["point"]) < 1e-6 < 0.5 < min(found["zero"])
    for name, (mean, error) in found["slopes"]["0.0"].items():
        assert abs(mean) < 5 * error, name
    for name, (mean, error) in found["slopes"]["0.3"].items():
        assert mean > 10 * error, name
    # The Kolmogorov-Smirnov distance exceeds 2 / sqrt(n) with probability 2 exp(-8) if the densities are the same.
    assert found["distance"] < 2 / math.sqrt(found["samples"])
