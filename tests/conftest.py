# SPDX-License-Identifier: Apache-2.0
"""Shapes are checked in the tests: jaxtyping's annotations, by beartype, on every module of the project."""

import json
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Most programs of the tests take longer to compile than to run, those of the processes that tests start as well.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false"]
)

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

CHECKED = [
    "sde_lib",
    "losses",
    "ode",
    "likelihood",
    "sampling",
    "datasets",
    "checkpoints",
    "report",
    "evaluation",
    "models",
    "diagnostics",
    "dequantization",
    "evaluators",
    "task",
    "runtime",
    "sources",
    "reproduce",
]
install_import_hook(CHECKED, "beartype.beartype")

# Compile time rules the tests' time: a second run finds most programs here.
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)


@pytest.fixture(scope="session")
def untrained_pair(tmp_path_factory):
    """Workdirs of two untrained networks on the mixture."""
    import checkpoints
    import task
    from configs.toy import mog_ve

    folders = []
    for seed in (0, 1):
        config = mog_ve.get_config()
        config.seed = seed
        config.model.nf = 8
        config.eval.update(rtol=1e-4, atol=1e-4, batch_size=4, hutchinson_type="rademacher")
        folder = tmp_path_factory.mktemp("runs") / f"seed{seed}"
        state = jax.device_get(task.build(config).init_state())
        leaves, tree = jax.tree.flatten(state.ema_params)
        rng = np.random.default_rng(seed)
        noisy = state.replace(ema_params=tree.unflatten([p + 0.3 * rng.normal(size=p.shape) for p in leaves]))
        checkpoints.save(folder / "checkpoints", noisy, 1, {"config": config.to_dict()})
        (folder / "config.json").write_text(json.dumps(config.to_dict()))
        folders.append(folder)
    return folders
