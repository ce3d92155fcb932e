# SPDX-License-Identifier: Apache-2.0
"""Checks a config before anything is compiled. Each complaint is one line that names the keys and says what to do.

A value must have the type of the key's default. `RULES` says what else it must fulfil, `INERT` where an option does
nothing, and the functions `_*_conflicts` which values exclude each other.
"""

import difflib
import math
import runpy
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs.default_configs import get_default_configs
from errors import UserError


class Rule(NamedTuple):
    """A condition on a key's value. `otherwise` ends the complaint that starts with 'key=value'."""

    accepts: Callable[[Any], bool]
    otherwise: str


def at_least(minimum: float) -> Rule:
    return Rule(lambda value: value >= minimum, f"must be at least {minimum}")


def choice(*values: Any) -> Rule:
    return Rule(lambda value: value in values, f"is not supported; use one of {', '.join(map(str, values))}")


def choice_or_nothing(*names: str) -> Rule:
    return Rule(lambda value: value in ("", *names), f"is not supported; use {', '.join(names)} or nothing")


def any_case(*names: str) -> Rule:
    return choice(*names)._replace(accepts=lambda value: value.lower() in names)


def list_of(kind: type | tuple[type, ...], wording: str, accepts: Callable[[Any], bool]) -> Rule:
    """Accepts a sequence of finite numbers of type `kind` for which `accepts` holds."""

    def accepted(values: Any) -> bool:
        numbers = all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
        return numbers and all(map(math.isfinite, values)) and accepts(values)

    return Rule(accepted, f"must be {wording}")


ANY = Rule(lambda value: True, "")
POSITIVE = Rule(lambda value: value > 0, "must be positive")
FRACTION = Rule(lambda value: 0 <= value < 1, "must be in [0, 1)")
TIME = Rule(lambda value: 0 < value < 1, "must be below the end of time, 1, and positive")
# Users add to these registries: sde_lib.SDES, losses.WEIGHTINGS, datasets, models.MODELS. Each refuses an unknown name
# itself when the parts are built.
REGISTERED = ANY

# One line for each key. A boolean key needs none: its type is all there is to check.
RULES: dict[str, Rule] = {
    "seed": Rule(lambda value: 0 <= value < 2**32, "must be in [0, 2^32)"),
    "training.sde": REGISTERED,
    "training.score_matching_order": choice(1, 2, 3),
    "training.second_order_weight": at_least(0),
    "training.third_order_weight": at_least(0),
    "training.weighting": REGISTERED,
    "training.time_sampling": choice_or_nothing("uniform", "log_snr", "velocity"),
    "training.continuous": Rule(bool, "is not supported: the losses are defined for continuous time; set it to True"),
    "training.smallest_time": TIME,
    "training.batch_size": at_least(1),
    "training.num_microbatches": at_least(1),
    "training.device_memory_gib": at_least(0),
    "training.n_iters": at_least(1),
    "training.n_jitted_steps": at_least(1),
    "training.third_order_scaling": choice("none", "dimension"),
    "training.log_freq": at_least(1),
    "training.eval_freq": at_least(1),
    "training.snapshot_freq": at_least(1),
    "training.snapshot_freq_for_preemption": at_least(1),
    "training.snapshot_minutes_for_preemption": at_least(0),
    "training.matmul_precision": choice("default", "float32"),
    "training.max_bad_steps": at_least(1),
    "training.init_from": ANY,
    "training.wandb_project": ANY,
    "optim.optimizer": choice("Adam"),
    "optim.lr": POSITIVE,
    "optim.beta1": FRACTION,
    "optim.beta2": FRACTION,
    "optim.eps": POSITIVE,
    "optim.weight_decay": at_least(0),
    "optim.warmup": at_least(0),
    "optim.grad_clip": Rule(lambda value: value != 0, "would clip every gradient to nothing; negative: no clipping"),
    "data.dataset": REGISTERED,
    "data.dir": ANY,
    "data.category": ANY,
    "data.image_size": at_least(1),
    "data.num_channels": at_least(1),
    "data.dim": at_least(1),
    "model.name": REGISTERED,
    "model.ema_rate": FRACTION,
    "model.sigma_min": POSITIVE,
    "model.sigma_max": POSITIVE,
    "model.beta_min": POSITIVE,
    "model.beta_max": POSITIVE,
    "model.log_snr_min": ANY,
    "model.log_snr_max": ANY,
    "model.num_scales": at_least(2),  # NCSN's noise levels need a lowest and a highest
    "model.normalization": choice("GroupNorm"),
    "model.nonlinearity": any_case("elu", "relu", "lrelu", "swish"),
    "model.nf": at_least(1),
    "model.ch_mult": list_of(int, "one or more positive integers", lambda v: len(v) > 0 and min(v) > 0),
    "model.num_res_blocks": at_least(1),
    "model.attn_resolutions": list_of(int, "positive integers, or ()", lambda v: min(v, default=1) > 0),
    "model.attention_type": choice("ddpm"),
    "model.fir_kernel": list_of((int, float), "numbers whose sum is positive", lambda v: sum(v) > 0),
    "model.resblock_type": any_case("biggan", "ddpm"),
    "model.progressive": any_case("none", "output_skip", "residual"),
    "model.progressive_input": any_case("none", "input_skip", "residual"),
    "model.progressive_combine": any_case("sum", "cat"),
    "model.embedding_type": any_case("fourier", "positional"),
    "model.fourier_scale": POSITIVE,
    "model.time_condition": choice("public", "log_snr"),
    "model.log_snr_scale": POSITIVE,
    "model.input_frequencies": list_of(int, "integers from 0 to 12, or ()", lambda v: set(v) <= {*range(13)}),
    "model.init_scale": at_least(0),
    "model.conv_size": Rule(lambda value: value > 0 and value % 2 == 1, "must be odd and positive"),
    "model.dropout": FRACTION,
    "model.data_init": choice(False),
    "model.dtype": any_case("float32", "bfloat16"),
    "model.num_layers": at_least(1),
    "model.parameterization": choice_or_nothing("noise", "score", "velocity"),
    "model.sigma_data": POSITIVE,
    "sampling.method": choice("ode", "pc"),
    "sampling.smallest_time": TIME,
    "sampling.predictor": any_case("euler_maruyama", "reverse_diffusion", "ancestral_sampling", "none"),
    "sampling.corrector": any_case("langevin", "ald", "none"),
    "sampling.n_steps_each": at_least(1),
    "sampling.snr": POSITIVE,
    "sampling.matmul_precision": choice("default", "float32"),
    "sampling.rtol": POSITIVE,
    "sampling.atol": POSITIVE,
    "eval.batch_size": at_least(1),
    "eval.begin_ckpt": at_least(0),
    "eval.end_ckpt": at_least(0),
    "eval.ckpt_id": at_least(0),
    "eval.num_samples": at_least(0),
    "eval.num_repeats": at_least(1),
    "eval.bpd_dataset": choice("train", "test"),
    "eval.dataset": choice_or_nothing("train", "test"),
    "eval.wait_for_checkpoints_s": at_least(0),
    "eval.num_examples": at_least(0),
    "eval.hutchinson_type": choice("rademacher", "gaussian", "exact"),
    "eval.num_probes": at_least(1),
    "eval.rtol": POSITIVE,
    "eval.atol": POSITIVE,
    "eval.max_steps": at_least(1),
    "eval.ode_solver": choice("rk45", "adams"),
    "eval.ode_steps": Rule(lambda value: value >= 4 and value % 2 == 0, "must be an even number, 4 or more"),
    "eval.ode_data_std": POSITIVE,
    "eval.bound_num_times": at_least(1),
    "eval.dequantization": choice("uniform", "truncated_normal", "variational"),
    "eval.importance_samples": at_least(1),
    "eval.fisher_num_times": at_least(2),
    "eval.fisher_num_examples": at_least(0),
    "eval.fisher_num_probes": at_least(1),
    "eval.inception_path": ANY,
    "eval.inception_batch_size": at_least(1),
    "eval.stats_path": ANY,
    "eval.kid_subsets": at_least(1),
    "eval.kid_subset_size": at_least(2),  # the unbiased estimate needs pairs of different images
    "deq.n_iters": at_least(1),
    "deq.ema_rate": FRACTION,
    "deq.dropout": FRACTION,
    "deq.network": choice("cifar10", "imagenet32", "imagenet64", "small"),
    "deq.init_batch_size": at_least(2),  # the initialisation takes a variance over the images
    "deq.ckpt_id": at_least(0),
}


_POINTS = ("mog", "checkerboard", "swissroll")
_OF_IMAGES = (
    *("data.centered", "eval.gaussian_baseline", "eval.dequantization", "eval.importance_samples"),
    *("eval.discrete_bound", "eval.ledger"),
)
_OWN = ("DIGITS", "IMAGE_FOLDER", "PATCHES")
_WITHOUT_VELOCITY = (
    {"model.name": "ncsnpp", "model.parameterization": ""},
    {"model.parameterization": "noise"},
    {"model.parameterization": "score"},
)
# Each entry is a setting and the keys that do nothing under it. There a key must keep its default.
# Shapes of another network and constants of another process are not listed, because config files set them for all.
INERT: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"model.name": "mlp"}, ("model.remat", "model.dtype", "model.input_frequencies")),
    ({"model.name": "mlp"}, ("model.time_condition", "model.log_snr_scale")),
    ({"model.name": "ncsnpp"}, ("model.num_layers",)),
    ({"model.time_condition": "public"}, ("model.log_snr_scale",)),
    *(
        ({**network, "training.time_sampling": times}, ("model.sigma_data",))
        for network in _WITHOUT_VELOCITY
        for times in ("", "uniform", "log_snr")
    ),
    *(({"data.dataset": name}, (*_OF_IMAGES, "data.dir")) for name in _POINTS),
    *(({"data.dataset": name}, ("data.dim",)) for name in (*_POINTS[1:], *_OWN, "CIFAR10")),
    *(({"data.dataset": name}, ("data.category",)) for name in (*_POINTS, *_OWN, "FASHION_MNIST", "CIFAR10")),
    ({"data.dataset": "DIGITS"}, ("data.dir",)),
    ({"sampling.method": "ode"}, ("sampling.probability_flow",)),
    ({"sampling.method": "pc", "sampling.predictor": "none"}, ("sampling.probability_flow",)),
    ({"sampling.method": "pc", "sampling.corrector": "none"}, ("sampling.n_steps_each",)),
    ({"eval.ode_solver": "rk45"}, ("eval.ode_steps", "eval.ode_data_std")),
    ({"eval.bound": True, "eval.dsm": False}, ("eval.num_probes",)),
]


def load_config(path: str) -> ConfigDict:
    """Returns what the file's `get_config()` returns. UserError with the file, the line and the cause if that fails."""
    if not Path(path).is_file():
        raise UserError(f"config file {path!r} does not exist; see configs/ for those that do")
    lines: list[int | None] = []
    try:
        get_config = runpy.run_path(path).get("get_config")
        if not callable(get_config):
            raise NameError("it has no function get_config")
        code = getattr(get_config, "__code__", None)
        lines += [code.co_firstlineno] if code is not None and code.co_filename == path else []
        config = get_config()
        if not isinstance(config, ConfigDict):
            raise TypeError(f"get_config returns {type(config).__name__}, not a ConfigDict")
        return config
    except Exception as error:  # the file is the user's code and may raise anything
        lines += [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        if isinstance(error, SyntaxError) and error.filename == path:
            lines.append(error.lineno)
        where = f"config file {path}" + (f", line {lines[-1]}" if lines else "")
        raise UserError(f"{where}: {type(error).__name__}: {' '.join(str(error).split())}; correct it there") from error


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns a nested config as {'training.batch_size': 128, ...}."""
    flat = {}
    for key, value in config.items():
        flat.update(flatten(value, f"{prefix}{key}.") if hasattr(value, "items") else {prefix + key: value})
    return flat


def differences(config: Any, base: Any) -> dict[str, tuple[Any, Any]]:
    """Returns {'training.batch_size': (value in base, value in config), ...} for the keys of both that differ.

    Either config may come from a JSON file, which stores a tuple as a list.
    """
    flat, other = flatten(config), flatten(base)
    return {key: (other[key], flat[key]) for key in flat if key in other and not _same(other[key], flat[key])}


def _same(a: Any, b: Any) -> bool:
    return list(a) == list(b) if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) else a == b


def _same_name(a: Any, b: Any) -> bool:
    return a.lower() == b.lower() if isinstance(a, str) else a == b


def check_key(key: str) -> None:
    """Raises UserError, which names the closest existing key, if configs have no key such as 'training.batch_size'."""
    known = flatten(get_default_configs())
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        raise UserError(f"config key {key!r} does not exist" + (f"; did you mean {close[0]!r}?" if close else ""))


def check_config(config: ConfigDict) -> None:
    """Raises UserError at the first key that is unknown, of the wrong type, out of range or at odds with another."""
    flat, default = flatten(config), flatten(get_default_configs())
    for key in flat:
        if key not in default:
            check_key(key)
        _check_value(key, flat[key], type(default[key]))
    for key in default:
        if key not in flat:
            raise UserError(f"config key {key!r} is missing; start from configs/default_configs.py")
    for scene, keys in INERT:
        if all(_same_name(flat[key], value) for key, value in scene.items()):
            for key in keys:
                if not _same(flat[key], default[key]):
                    where = " and ".join(f"{name}={value!r}" for name, value in scene.items())
                    raise UserError(f"{key}={flat[key]!r} does nothing with {where}; leave it at {default[key]!r}")
    for conflicts in (_training_conflicts, _model_conflicts, _sampling_conflicts, _eval_conflicts):
        for complaint in conflicts(flat):
            raise UserError(complaint)


def _check_value(key: str, value: Any, expected: type) -> None:
    accepted = (int, float) if expected is float else (tuple, list) if expected is tuple else expected
    if not isinstance(value, accepted) or (isinstance(value, bool) and expected is not bool):
        raise UserError(f"{key}={value!r} has type {type(value).__name__}; it must be {expected.__name__}")
    if expected is float and not math.isfinite(value):
        raise UserError(f"{key}={value!r} must be a finite number")
    rule = RULES.get(key, ANY)
    if not rule.accepts(value):
        raise UserError(f"{key}={value!r} {rule.otherwise}")


def _pair(c: dict[str, Any], key: str, other: str) -> str:
    return f"{key}={c[key]!r} with {other}={c[other]!r}"


def _training_conflicts(c: dict[str, Any]) -> Iterator[str]:
    if c["training.score_matching_order"] >= 2 and not c["training.reduce_mean"]:
        pair = _pair(c, "training.reduce_mean", "training.score_matching_order")
        yield f"{pair}: the orders above 1 are defined with the mean; set training.reduce_mean=True"
    if c["training.importance_weighting"] and not c["training.likelihood_weighting"]:
        yield (
            "training.importance_weighting=True needs training.likelihood_weighting=True: "
            "it is the sampling of t that goes with that weighting"
        )
    if c["training.weighting"] and c["training.likelihood_weighting"]:
        pair = _pair(c, "training.weighting", "training.likelihood_weighting")
        yield f"{pair}: it takes its place; set training.likelihood_weighting=False"
    for key in ("training.likelihood_weighting", "training.weighting"):
        if c[key] and c["training.time_sampling"]:
            pair = _pair(c, key, "training.time_sampling")
            yield f"{pair}: it has the likelihood's weight; leave {key} at its default"
    for key in ("log_freq", "eval_freq", "snapshot_freq", "snapshot_freq_for_preemption"):
        frequency, jitted = c[f"training.{key}"], c["training.n_jitted_steps"]
        if frequency % jitted:
            yield f"training.n_jitted_steps={jitted} must divide training.{key}={frequency}"
    if c["training.init_optimizer"] and not c["training.init_from"]:
        yield "training.init_optimizer=True needs training.init_from, the checkpoint to take it from"


def _model_conflicts(c: dict[str, Any]) -> Iterator[str]:
    if c["model.sigma_min"] >= c["model.sigma_max"]:
        yield f"{_pair(c, 'model.sigma_min', 'model.sigma_max')}: noise must grow; set sigma_min below sigma_max"
    if c["model.beta_min"] > c["model.beta_max"]:
        yield f"{_pair(c, 'model.beta_min', 'model.beta_max')}: set beta_min at or below beta_max"
    if c["model.log_snr_min"] >= c["model.log_snr_max"]:
        pair = _pair(c, "model.log_snr_min", "model.log_snr_max")
        yield f"{pair}: the log-SNR must fall; set log_snr_min below log_snr_max"
    if c["model.name"].lower() == "ncsnpp":
        yield from _ncsnpp_conflicts(c)


def _ncsnpp_conflicts(c: dict[str, Any]) -> Iterator[str]:
    size, ch_mult = c["data.image_size"], tuple(c["model.ch_mult"])
    halvings = len(ch_mult) - 1
    if size % 2**halvings:
        yield (
            f"data.image_size={size} cannot be halved {halvings} times, as model.ch_mult={ch_mult} asks; "
            f"shorten that or make the size a multiple of {2**halvings}"
        )
    widths = [size // 2**level for level in range(len(ch_mult))]
    if absent := [width for width in c["model.attn_resolutions"] if width not in widths]:
        yield (
            f"model.attn_resolutions={tuple(c['model.attn_resolutions'])}: {absent[0]} never occurs with "
            f"data.image_size={size} and model.ch_mult={ch_mult}; use some of {', '.join(map(str, widths))}, or ()"
        )


def _sampling_conflicts(c: dict[str, Any]) -> Iterator[str]:
    if c["sampling.method"] != "pc":
        return
    sde, predictor, corrector = (c[key].lower() for key in ("training.sde", "sampling.predictor", "sampling.corrector"))
    if predictor == corrector == "none":
        yield f"{_pair(c, 'sampling.predictor', 'sampling.corrector')}: no step is left; set one of them"
    if predictor == "ancestral_sampling" and c["sampling.probability_flow"]:
        pair = _pair(c, "sampling.predictor", "sampling.probability_flow")
        yield f"{pair}: its noise is part of it; set sampling.probability_flow=False"
    if predictor == "ancestral_sampling" and sde in ("subvpsde", "vp_log_snr", "straight"):
        pair = _pair(c, "sampling.predictor", "training.sde")
        yield f"{pair}: it is defined for vpsde and vesde; set sampling.predictor=reverse_diffusion"
    # DDPM's step has the factor sqrt(1 - beta), beta up to beta_max / N. The correctors' step size has 1 - beta.
    steps_of_ddpm = sde == "vpsde" and predictor in ("reverse_diffusion", "ancestral_sampling")
    if steps_of_ddpm or (sde in ("vpsde", "subvpsde") and corrector != "none"):
        if c["model.num_scales"] <= c["model.beta_max"]:
            pair = _pair(c, "model.num_scales", "model.beta_max")
            yield f"{pair}: sampling.method='pc' needs beta_max / num_scales below 1; raise model.num_scales"


def _eval_conflicts(c: dict[str, Any]) -> Iterator[str]:
    begin, end = c["eval.begin_ckpt"], c["eval.end_ckpt"]
    if not (1 <= begin <= end or begin == end == 0):
        yield f"eval.begin_ckpt={begin} and eval.end_ckpt={end}: give 1 <= begin <= end, or 0 and 0 for the newest"
    if c["eval.enable_sampling"] and c["eval.num_samples"] < 1:
        pair = _pair(c, "eval.num_samples", "eval.enable_sampling")
        yield f"{pair}: raise eval.num_samples or set eval.enable_sampling=False"
    if c["eval.dequantizer"] and c["eval.dequantization"] == "truncated_normal":
        pair = _pair(c, "eval.dequantizer", "eval.dequantization")
        yield f"{pair}: it asks for the variational one; set one of them"
    for key in ("eval.num_probes", "eval.fisher_num_probes"):
        if c[key] > 1 and c["eval.hutchinson_type"] == "exact":
            pair = _pair(c, key, "eval.hutchinson_type")
            yield f"{pair}: an exact trace has no probe; set {key}=1 or eval.hutchinson_type=rademacher"
