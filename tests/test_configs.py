# SPDX-License-Identifier: Apache-2.0
"""The configs: of the public code, values, parameter trees, and that nothing else slips in; those for bits/dim."""

import importlib
import json
import math

import jax
import jax.numpy as jnp
import pytest
from golden_utils import GOLDEN

from configs.check import check_config, flatten
from models import create_model

REFERENCE = json.loads((GOLDEN / "reference_configs.json").read_text())
TREES = json.loads((GOLDEN / "param_trees.json").read_text())


def get_config(name):
    return importlib.import_module("configs." + name.replace("/", ".")).get_config()


@pytest.mark.parametrize("name", REFERENCE)
def test_config_is_the_public_one(name):
    config = get_config(name)
    check_config(config)
    flat = flatten(config)
    expected = flatten(REFERENCE[name])
    if "church" not in name:
        assert expected["training.batch_size"] == 48  # what order 3 took there; 128 is the paper's for orders 1 and 2
        expected["training.batch_size"] = 128
    actual = {key: list(value) if isinstance(value, tuple) else value for key, value in flat.items() if key in expected}
    assert actual == expected


def test_each_config_is_fresh():
    name = "vp/cifar10_ddpmpp_deep_continuous"
    get_config(name).model.nf = 7
    assert get_config(name).model.nf == 128


# configs with the same tree are traced once
DISTINCT = {entry["tree"]: name for name, entry in TREES["configs"].items()}


@pytest.mark.parametrize("name", DISTINCT.values())
def test_parameter_tree_is_the_public_one(name):
    config = get_config(name)
    size = config.data.image_size
    x, time_cond = jnp.zeros((1, size, size, config.data.num_channels)), jnp.ones(1)
    params = jax.eval_shape(create_model(config).init, jax.random.key(0), x, time_cond)["params"]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    shapes = {"/".join(key.key for key in path): "x".join(map(str, leaf.shape)) for path, leaf in leaves}
    entry = TREES["configs"][name]
    assert shapes == TREES["trees"][entry["tree"]]
    assert sum(math.prod(leaf.shape) for _, leaf in leaves) == entry["num_params"]


def test_configs_that_are_not_traced_have_the_model_of_one_that_is():
    for name, entry in TREES["configs"].items():
        traced = get_config(DISTINCT[entry["tree"]])
        config = get_config(name)
        model = create_model(config).clone(dropout=create_model(traced).dropout)
        assert model == create_model(traced)
        assert config.data.image_size == traced.data.image_size


@pytest.mark.parametrize(("name", "millions"), [("cifar10", 61.8), ("imagenet32", 61.8), ("cifar10_vdm", 30.6)])
def test_recipes_for_full_size_data_are_valid(name, millions):
    """Their networks are those of the public configs, or VDM's, by the number of parameters."""
    config = get_config(f"ml/{name}")
    check_config(config)
    x = jnp.zeros((1, 32, 32, 3))
    params = jax.eval_shape(create_model(config).init, jax.random.key(0), x, jnp.ones(1))["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) / 1e6 == pytest.approx(millions, abs=0.05)
