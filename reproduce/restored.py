# SPDX-License-Identifier: Apache-2.0
"""Restores the newest model of a run."""

import json
from pathlib import Path
from typing import Any

import ml_collections

import checkpoints
import task
from configs.default_configs import get_default_configs
from errors import UserError


def restored(folder: Path) -> tuple[task.Task, Any, Any]:
    """The task of the run in `folder`, and EMA parameters and model state of its newest checkpoint, or UserError."""
    path = checkpoints.find(folder / "checkpoints", 0)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} has no config.json: it is not the workdir of a run of ours")
    config = get_default_configs()  # for keys that came after the run
    config.update(ml_collections.ConfigDict(json.loads((folder / "config.json").read_text())))
    state = checkpoints.restore(path).state
    return task.build(config), state["ema_params"], state.get("model_state", {})
