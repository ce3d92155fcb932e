# SPDX-License-Identifier: Apache-2.0
"""Which config keys a resumed run may change, and which belong to the checkpoint it resumes from."""

from typing import Any

from absl import logging

from configs.check import differences
from errors import UserError

# Another value of these would change what the saved state means or in which order the data come.
_FIXED = (
    "seed",
    "training.sde",
    "training.batch_size",
    "data.dataset",
    "data.category",
    "data.image_size",
    "data.num_channels",
    "data.centered",
    "data.dim",
)
_FREE_OF_MODEL = ("model.ema_rate", "model.dropout", "model.remat", "model.dtype")
BY_MACHINE = ("data.dir", "training.device_memory_gib", "training.wandb_project")


def check_resumed(config: Any, saved: dict[str, Any], where: Any, fixed_too: tuple[str, ...] = ()) -> None:
    """Raises UserError if a key that must stay differs from the checkpoint's config; logs the other differences."""
    differing = differences(config, saved)
    fixed = [key for key in differing if key in (*_FIXED, *fixed_too) or _shapes_the_network(key)]
    if fixed:
        listed = "; ".join(f"{key} was {old!r} and is {new!r}" for key, (old, new) in differing.items() if key in fixed)
        raise UserError(
            f"checkpoint {where} was made with another config: {listed}. Use that one, or another --workdir"
        )
    for key, (old, new) in differing.items():
        if not key.startswith("eval.") and key not in BY_MACHINE:
            logging.info("resuming with %s=%r, which was %r", key, new, old)


def _shapes_the_network(key: str) -> bool:
    return key.startswith("model.") and key not in _FREE_OF_MODEL
