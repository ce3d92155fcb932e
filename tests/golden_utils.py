# SPDX-License-Identifier: Apache-2.0
"""Reading of `tests/golden/`: numbers recorded from the public code of the paper (flax 0.3, float32, CPU)."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

GOLDEN = pathlib.Path(__file__).parent / "golden"


def load_golden(name: str) -> dict[str, np.ndarray]:
    """Every array of `tests/golden/<name>`, by key."""
    with np.load(GOLDEN / name) as file:
        return {key: file[key] for key in file.files}


def load_params(arrays: Mapping[str, np.ndarray], prefix: str = "params:") -> dict[str, Any]:
    """Nested parameter dict from the keys '<prefix>a/b/c'; GroupNorm leaves go from [1, 1, 1, C] to today's [C]."""
    params: dict[str, Any] = {}
    for key in arrays:
        if not key.startswith(prefix):
            continue
        *parents, leaf = key[len(prefix) :].split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jnp.asarray(modern_shape(leaf, arrays[key]))
    return params


def modern_shape(leaf: str, value: np.ndarray) -> np.ndarray:
    """A GroupNorm scale or bias [1, 1, 1, C] of flax 0.3 as [C]; any other array unchanged."""
    is_group_norm = leaf in ("scale", "bias") and value.ndim == 4
    return value.reshape(-1) if is_group_norm else value


def golden_config(arrays: Mapping[str, np.ndarray]) -> ConfigDict:
    """The whole config that a golden file was recorded with: our defaults, overwritten by its `config_json`."""
    from configs.default_configs import get_default_configs

    config = get_default_configs()
    for section, values in json.loads(str(arrays["config_json"])).items():
        if not isinstance(values, dict):
            config[section] = values
            continue
        getattr(config, section).update({key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
    return config


def relative_error(actual: Any, expected: Any) -> float:
    """max |actual - expected| / max |expected|."""
    expected = np.asarray(expected)
    assert np.shape(actual) == expected.shape
    return float(np.max(np.abs(np.asarray(actual) - expected)) / np.max(np.abs(expected)))
