# SPDX-License-Identifier: Apache-2.0
"""Config checks: every key has a rule, every config passes, and each complaint is one line that names the keys."""

import importlib
import itertools
import math
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import golden_config, load_golden

import models
import sampling
import sde_lib
from configs import check
from configs.check import INERT, RULES, check_config, flatten
from configs.default_configs import get_default_configs
from errors import UserError
from models import layers

ROOT = Path(__file__).parent.parent
DEFAULTS = flatten(get_default_configs())
CONFIGS = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
    for path in ROOT.glob("configs/*/*.py")
    if path.name != "__init__.py"
)


HEAD = "from configs.toy import mog_ve\n\n\ndef get_config():\n    config = mog_ve.get_config()\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("def get_config(:\n    pass\n", r"FILE, line 1: SyntaxError: .*; correct it there"),
        ("import math\nimport absent\n", r"FILE, line 2: ModuleNotFoundError: No module named 'absent'; .*"),
        (HEAD + "    config.seed = sead\n", r"FILE, line 6: NameError: name 'sead' is not defined; .*"),
        (HEAD + "    config.seed = 'many'\n", r"FILE, line 6: TypeError: .*seed.*; .*"),
        (HEAD + "    config.optin.lr = 1.0\n", r"FILE, line 6: AttributeError: .*optin.*; .*"),
        (HEAD + "    open('/no/file')\n", r"FILE, line 6: FileNotFoundError: .*/no/file.*; .*"),
        (HEAD + "    raise ValueError('a\\nb')\n", r"FILE, line 6: ValueError: a b; .*"),
        (HEAD + "    mog_ve.get_toy_configs('vesde')\n", r"FILE, line 6: TypeError: .*'dataset'; .*"),
        ("\ndef get_config(name):\n    pass\n", r"FILE, line 2: TypeError: .*'name'; .*"),
        ("seed = 1\n", r"FILE: NameError: it has no function get_config; .*"),
        ("get_config = {}\n", r"FILE: NameError: it has no function get_config; .*"),
        (
            "\ndef get_config():\n    return {'seed': 1}\n",
            r"FILE, line 2: TypeError: get_config returns dict, not a ConfigDict; .*",
        ),
        (HEAD, r"FILE, line 4: TypeError: get_config returns NoneType, not a ConfigDict; .*"),
    ],
)
def test_a_config_file_that_fails_is_one_line(tmp_path, text, complaint):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        check.load_config(str(path))
    assert re.fullmatch(complaint.replace("FILE", re.escape(f"config file {path}")), str(error.value))


VP = {"training.sde": "vpsde", "model.scale_by_sigma": False}
PC = {"sampling.method": "pc"}


def changed(**keys):
    """The defaults (CIFAR-10, VE, NCSN++) with some keys changed, **{'section.key': value}, of any type."""
    config = get_default_configs()
    for key, value in keys.items():
        section, _, name = key.rpartition(".")
        owner = config[section] if section else config
        del owner[name]  # with its type, to which the new value would be converted
        owner[name] = value
    return config


def complaint(**keys):
    with pytest.raises(UserError) as error:
        check_config(changed(**keys))
    message = str(error.value)
    assert "\n" not in message
    return message


def test_every_key_has_a_rule():
    assert set(RULES) <= set(DEFAULTS)
    without = set(DEFAULTS) - set(RULES)
    assert all(isinstance(DEFAULTS[key], bool) for key in without), without


def test_differences_are_those_of_the_keys_of_both():
    config = changed(**{"training.batch_size": 17, "model.ch_mult": (1, 2)})
    saved = {**get_default_configs().to_dict(), "gone": 1}
    saved["model"]["fir_kernel"] = [1, 3, 3, 1]  # as JSON has it
    del saved["eval"]["rtol"]
    config.eval.rtol = 0.5
    truth = {"training.batch_size": (128, 17), "model.ch_mult": ((1, 2, 2, 2), (1, 2))}
    assert check.differences(config, saved) == truth


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_passes(name):
    check_config(importlib.import_module(name).get_config())


@pytest.mark.parametrize("name", ["ckpt_ve_steps", "ckpt_vp_steps", "sampling_ve", "sampling_vp"])
def test_recorded_configs_pass(name):
    check_config(golden_config(load_golden(f"{name}.npz")))


def names_of(key):
    """The names that `key` accepts, out of its wording."""
    return set(RULES[key].otherwise.partition("use one of ")[2].split(", "))


def test_choices_are_those_of_the_code():
    assert names_of("sampling.predictor") == set(sampling.PREDICTORS)
    assert names_of("sampling.corrector") == set(sampling.CORRECTORS)
    assert names_of("model.nonlinearity") == set(layers.ACTIVATIONS)
    assert {"mlp", "ncsnpp"} <= set(models.MODELS)


@pytest.mark.parametrize("key", DEFAULTS)
def test_wrong_types_are_named(key):
    kind = type(DEFAULTS[key])
    for value in (3, "3", 3.5, True, None, (1,)):
        if type(value) is not kind and not (kind is float and type(value) is int):
            found = f"{key}={value!r} has type {type(value).__name__}"
            assert complaint(**{key: value}) == f"{found}; it must be {kind.__name__}"
    if kind is float:
        for value in (math.nan, math.inf, -math.inf):
            assert complaint(**{key: value}) == f"{key}={value!r} must be a finite number"


# values of the right type that a rule refuses, by its wording
BAD = {
    check.at_least(0).otherwise: (-1,),
    check.at_least(1).otherwise: (0, -3),
    check.at_least(2).otherwise: (1, 0),
    check.POSITIVE.otherwise: (0.0, -1.0),
    check.FRACTION.otherwise: (1.0, -0.1),
    check.TIME.otherwise: (1.0, 1.5, 0.0, -1e-5),
    RULES["seed"].otherwise: (-1, 2**32),
    RULES["training.continuous"].otherwise: (False,),
    RULES["optim.grad_clip"].otherwise: (0.0,),
    RULES["eval.ode_steps"].otherwise: (2, 0, -4, 191),
    RULES["eval.dataset"].otherwise: ("validation", "Test"),
    RULES["model.conv_size"].otherwise: (0, 2, -1),
    RULES["model.parameterization"].otherwise: ("v", "Noise"),
    RULES["training.time_sampling"].otherwise: ("importance", "Uniform"),
    RULES["model.ch_mult"].otherwise: ((), (1, 0), (1, -2), (1.0, 2), (1, "2"), (True, 2), ((1,), 2)),
    RULES["model.input_frequencies"].otherwise: ((-1,), (13,), (6.0,), (True,)),
    RULES["model.attn_resolutions"].otherwise: ((0,), (-8,), (8.0,), ("8",), (True,)),
    RULES["model.fir_kernel"].otherwise: ((), (0, 0), (1, math.nan), (math.inf,), ("1",), (1, -1)),
}
BAD_CHOICES = {bool: (True,), int: (0, 4), str: ("", "foo", "fourier sum")}


@pytest.mark.parametrize("key", [key for key, rule in RULES.items() if rule is not check.ANY])
def test_values_out_of_range_are_named(key):
    values = BAD_CHOICES[type(DEFAULTS[key])] if names_of(key) != {""} else BAD[RULES[key].otherwise]
    for value in values:
        assert complaint(**{key: value}) == f"{key}={value!r} {RULES[key].otherwise}"


@pytest.mark.parametrize(
    "keys",
    [
        {"model.nonlinearity": "ELU", "model.progressive": "Residual", "training.sde": "VESDE", "model.name": "NCSNpp"},
        {"model.ch_mult": [1, 2], "model.attn_resolutions": [], "model.fir_kernel": [1, 2.5]},
        {"optim.lr": 1, "optim.grad_clip": -1, "model.sigma_max": 2**20, "seed": 2**32 - 1},
        {"training.smallest_time": 0.5, "optim.beta1": 0, "optim.warmup": 0, "eval.num_examples": 0},
        {"data.dataset": "my own data", "model.name": "my own network", "data.image_size": 7},
        {"data.dataset": "my own data", "model.name": "mlp"},
        {"training.sde": "my own process"},
        {"model.attn_resolutions": (32, 4)},
        {"data.image_size": 24, "model.attn_resolutions": (3,)},
        {"model.beta_min": 5.0, "model.beta_max": 5.0},
        {"eval.dataset": "train", "eval.bpd_dataset": "test"},
        {"eval.enable_sampling": False, "eval.num_samples": 0},
        # these samplers take no step of DDPM and no corrector's step
        {**VP, "model.num_scales": 20},
        {**VP, **PC, "model.num_scales": 10, "sampling.predictor": "euler_maruyama", "sampling.corrector": "none"},
        {**VP, **PC, "training.sde": "subvpsde", "model.num_scales": 10, "sampling.corrector": "none"},
        {**PC, "model.num_scales": 10},
        {**PC, "sampling.predictor": "ancestral_sampling"},
        {"sampling.predictor": "none", "sampling.corrector": "none"},
    ],
    ids=str,
)
def test_good_values_pass(keys):
    check_config(changed(**keys))


ANCESTRAL = {**PC, "sampling.predictor": "ancestral_sampling"}
NO_CORRECTOR = {**PC, "sampling.corrector": "none"}
JITTED = {"training.n_jitted_steps": 100}
CONFLICTS = [  # what sets the scene and passes, what is then in conflict and is to be named, what is said to do
    ({}, {"training.reduce_mean": False, "training.score_matching_order": 3}, "set training.reduce_mean=True"),
    ({}, {"training.importance_weighting": True}, "needs training.likelihood_weighting=True"),
    ({}, {"training.weighting": "uniform", "training.likelihood_weighting": True}, "takes its place"),
    ({}, {"training.time_sampling": "uniform", "training.weighting": "likelihood"}, "it has the likelihood's weight"),
    ({}, {"training.time_sampling": "velocity", "training.likelihood_weighting": True}, "leave training.likelihood"),
    ({}, {"training.n_jitted_steps": 7, "training.log_freq": 100}, "must divide"),
    (JITTED, {"training.eval_freq": 150}, "training.n_jitted_steps=100 must divide"),
    (JITTED, {"training.snapshot_freq": 150}, "training.n_jitted_steps=100 must divide"),
    (JITTED, {"training.snapshot_freq_for_preemption": 150}, "training.n_jitted_steps=100 must divide"),
    ({}, {"training.init_optimizer": True}, "needs training.init_from"),
    ({}, {"model.sigma_min": 50.0, "model.sigma_max": 50.0}, "set sigma_min below sigma_max"),
    ({}, {"model.beta_min": 6.0, "model.beta_max": 5.0}, "set beta_min at or below beta_max"),
    ({}, {"model.log_snr_min": 2.0, "model.log_snr_max": 2.0}, "set log_snr_min below log_snr_max"),
    ({}, {"data.image_size": 28, "model.ch_mult": (1, 2, 2, 2)}, "cannot be halved 3 times"),
    ({}, {"data.image_size": 64, "model.attn_resolutions": (64, 4)}, "4 never occurs"),
    ({}, {"model.ch_mult": (1, 2), "model.attn_resolutions": (8,)}, "use some of 32, 16, or ()"),
    (PC, {"sampling.predictor": "none", "sampling.corrector": "none"}, "set one of them"),
    (ANCESTRAL, {"sampling.probability_flow": True}, "set sampling.probability_flow=False"),
    ({**VP, **ANCESTRAL}, {"training.sde": "subvpsde"}, "set sampling.predictor=reverse_diffusion"),
    ({**VP, **ANCESTRAL}, {"training.sde": "straight"}, "set sampling.predictor=reverse_diffusion"),
    ({**VP, **ANCESTRAL}, {"training.sde": "vp_log_snr"}, "set sampling.predictor=reverse_diffusion"),
    ({**VP, **PC}, {"model.num_scales": 20, "model.beta_max": 20.0}, "raise model.num_scales"),
    ({**VP, **NO_CORRECTOR}, {"model.num_scales": 15, "model.beta_max": 15.5}, "raise model.num_scales"),
    (
        {**VP, **PC, "training.sde": "subvpsde"},
        {"model.num_scales": 9, "model.beta_max": 10.0},
        "raise model.num_scales",
    ),
    ({}, {"eval.dequantizer": True, "eval.dequantization": "truncated_normal"}, "set one of them"),
    ({}, {"eval.begin_ckpt": 0, "eval.end_ckpt": 3}, "give 1 <= begin <= end"),
    ({}, {"eval.begin_ckpt": 4, "eval.end_ckpt": 3}, "give 1 <= begin <= end"),
    ({}, {"eval.enable_sampling": True, "eval.num_samples": 0}, "raise eval.num_samples"),
    ({}, {"eval.num_probes": 2, "eval.hutchinson_type": "exact"}, "set eval.num_probes=1"),
    ({}, {"eval.fisher_num_probes": 2, "eval.hutchinson_type": "exact"}, "set eval.fisher_num_probes=1"),
]


@pytest.mark.parametrize(("scene", "keys", "words"), CONFLICTS, ids=str)
def test_conflicts_are_named(scene, keys, words):
    check_config(changed(**scene))
    message = complaint(**{**scene, **keys})
    assert words in message
    for key, value in keys.items():
        assert f"{key}={value!r}" in message


def passes(config):
    try:
        check_config(config)
    except UserError:
        return False
    return True


def sampler_keys(sde, predictor, corrector):
    return {**VP, **PC, "training.sde": sde, "sampling.predictor": predictor, "sampling.corrector": corrector}


SAMPLERS = itertools.product(("vpsde", "subvpsde"), sampling.PREDICTORS, sampling.CORRECTORS)


@pytest.mark.parametrize(
    ("sde", "predictor", "corrector"), [names for names in SAMPLERS if passes(changed(**sampler_keys(*names)))]
)
def test_too_few_steps_are_nan_where_the_check_says_so(sde, predictor, corrector):
    """N(0, I) data, whose score is -x, sampled in 10 steps with beta_max = 20."""
    config = changed(**sampler_keys(sde, predictor, corrector), **{"model.num_scales": 10})
    x, _ = sampling.pc_sampler(
        sde_lib.from_config(config),
        lambda x, t: -x,
        jnp.ones((4, 3)),
        lambda step: (jnp.ones((1, 4, 3)), jnp.ones((4, 3))),
        predictor=sampling.PREDICTORS[predictor],
        corrector=sampling.CORRECTORS[corrector],
        snr=0.1,
    )
    assert np.isfinite(x).all() == passes(config)


# another value of a key that holds text or a list
OTHER = {
    "model.time_condition": "log_snr",
    "eval.dequantization": "truncated_normal",
    "model.dtype": "bfloat16",
    "data.category": "church",
    "data.dir": "/data",
    "model.input_frequencies": (6, 7),
}


def another(key):
    default = flatten(get_default_configs())[key]
    if key in OTHER:
        return OTHER[key]
    return not default if isinstance(default, bool) else default + 2 if isinstance(default, int) else default * 1.5


@pytest.mark.parametrize(("scene", "keys"), INERT, ids=str)
def test_options_that_do_nothing_where_they_stand_are_refused(scene, keys):
    check_config(changed(**scene))
    for key in keys:
        message = complaint(**scene, **{key: another(key)})
        assert message.startswith(f"{key}={another(key)!r} does nothing with ") and "leave it at" in message
        assert all(f"{name}={value!r}" in message for name, value in scene.items())
