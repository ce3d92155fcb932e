# SPDX-License-Identifier: Apache-2.0
"""Shapes are checked in the tests: jaxtyping's annotations, by beartype, on every module of the project."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
from jaxtyping import install_import_hook

CHECKED = [
    "sde_lib",
    "losses",
    "ode",
    "likelihood",
    "sampling",
    "datasets",
    "checkpoints",
    "legacy",
    "report",
    "evaluation",
    "models",
    "diagnostics",
    "fokker_planck",
    "dequantization",
    "inception",
    "evaluators",
    "parts",
    "snapshots",
    "plots",
    "runtime",
    "sources",
    "reproduce",
]
install_import_hook(CHECKED, "beartype.beartype")

# Compile time rules the tests' time: a second run finds most programs here.
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
