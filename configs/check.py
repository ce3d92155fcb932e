"""Checks a config before anything is compiled; every complaint is one line that names the key."""

import difflib
from typing import Any

from ml_collections import ConfigDict

from configs.default_configs import get_default_configs
from errors import UserError

_CHOICES = {
    "training.score_matching_order": (1, 2, 3),
    "training.sde": ("vpsde", "subvpsde", "vesde", "linearvesde"),
    "optim.optimizer": ("Adam",),
    "sampling.method": ("ode", "pc"),
    "eval.hutchinson_type": ("rademacher", "gaussian", "exact"),
    "eval.bpd_dataset": ("train", "test"),
}

_AT_LEAST_ONE = (
    "training.batch_size",
    "training.n_iters",
    "training.n_jitted_steps",
    "training.log_freq",
    "training.eval_freq",
    "training.snapshot_freq",
    "training.snapshot_freq_for_preemption",
    "eval.batch_size",
    "eval.num_repeats",
    "eval.max_steps",
    "data.image_size",
    "data.num_channels",
    "data.dim",
    "model.num_scales",
    "sampling.n_steps_each",
)

_POSITIVE = (
    "training.smallest_time",
    "sampling.smallest_time",
    "optim.lr",
    "optim.eps",
    "eval.rtol",
    "eval.atol",
    "sampling.rtol",
    "sampling.atol",
    "model.sigma_min",
    "model.sigma_max",
    "model.sigma_data",
)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{'training.batch_size': 128, ...} of a nested config."""
    flat = {}
    for key, value in config.items():
        flat.update(flatten(value, f"{prefix}{key}.") if hasattr(value, "items") else {prefix + key: value})
    return flat


def check_key(key: str) -> None:
    """UserError, with the nearest key that exists, if a config has no such key as 'training.batch_size'."""
    known = flatten(get_default_configs())
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        raise UserError(f"config key {key!r} does not exist" + (f"; did you mean {close[0]!r}?" if close else ""))


def _check_keys(flat: dict[str, Any], default: dict[str, Any]) -> None:
    for key, value in flat.items():
        check_key(key)
        expected = type(default[key])
        accepted = (int, float) if expected is float else (tuple, list) if expected is tuple else (expected,)
        if not isinstance(value, accepted) or (isinstance(value, bool) and expected is not bool):
            raise UserError(f"{key}={value!r} has type {type(value).__name__}; it must be {expected.__name__}")
    for key in default:
        if key not in flat:
            raise UserError(f"config key {key!r} is missing; start from configs/default_configs.py")


def check_config(config: ConfigDict) -> None:
    """Raises UserError at the first key that is unknown, of the wrong type, out of range or at odds with another."""
    flat = flatten(config)
    _check_keys(flat, flatten(get_default_configs()))
    for key, choices in _CHOICES.items():
        value = flat[key].lower() if key == "training.sde" else flat[key]
        if value not in choices:
            raise UserError(f"{key}={flat[key]!r} is not supported; use one of {', '.join(map(str, choices))}")
    for key in _AT_LEAST_ONE:
        if flat[key] < 1:
            raise UserError(f"{key}={flat[key]} must be at least 1")
    for key in _POSITIVE:
        if not flat[key] > 0:
            raise UserError(f"{key}={flat[key]} must be positive")
    for key in ("training.smallest_time", "sampling.smallest_time"):
        if flat[key] >= 1:
            raise UserError(f"{key}={flat[key]} must be below the end of time, 1")
    if not 0 <= flat["model.ema_rate"] < 1:
        raise UserError(f"model.ema_rate={flat['model.ema_rate']} must be in [0, 1)")
    if not flat["training.continuous"]:
        raise UserError("training.continuous=False is not supported: the losses are defined for continuous time")
    order = flat["training.score_matching_order"]
    if order >= 2 and not flat["training.reduce_mean"]:
        raise UserError(
            f"training.reduce_mean=False with training.score_matching_order={order}: "
            "the orders above 1 are defined with the mean; set training.reduce_mean=True"
        )
    if flat["training.importance_weighting"] and not flat["training.likelihood_weighting"]:
        raise UserError(
            "training.importance_weighting=True needs training.likelihood_weighting=True: "
            "it is the sampling of t that goes with that weighting"
        )
    for key in ("log_freq", "eval_freq", "snapshot_freq", "snapshot_freq_for_preemption"):
        frequency, jitted = flat[f"training.{key}"], flat["training.n_jitted_steps"]
        if frequency % jitted:
            raise UserError(f"training.n_jitted_steps={jitted} must divide training.{key}={frequency}")
    begin, end = flat["eval.begin_ckpt"], flat["eval.end_ckpt"]
    if not (1 <= begin <= end or begin == end == 0):
        raise UserError(
            f"eval.begin_ckpt={begin} and eval.end_ckpt={end}: give 1 <= begin <= end, or 0 and 0 for the newest"
        )
