# SPDX-License-Identifier: Apache-2.0
"""Which config keys each mode reads, by running it: a key that nothing reads is an option that does nothing."""

import sys

import pytest
from ml_collections import ConfigDict
from test_loop import tiny_mixture
from tiny import tiny_digits

import run_lib
from configs.check import INERT, flatten
from configs.default_configs import get_default_configs


def of(section, names):
    return {f"{section}.{name}" for name in names.split()}


KEYS = set(flatten(get_default_configs()))
OPTIM = {key for key in KEYS if key.startswith("optim.")} - {"optim.optimizer"}
UNET = of("model", "attn_resolutions ch_mult conditional conv_size dtype embedding_type fir")
UNET |= of("model", "fir_kernel fourier_scale init_scale num_res_blocks progressive progressive_combine")
UNET |= of("model", "progressive_input remat resamp_with_conv resblock_type scale_by_sigma skip_rescale")
UNET |= of("model", "trainable_embedding time_condition log_snr_scale input_frequencies")
MLP = of("model", "num_layers")
BOTH = of("model", "dropout name nf nonlinearity num_scales parameterization sigma_data")
# Every mode builds the network, the process, the data and the optimiser.
BUILT = {"seed"} | OPTIM | BOTH | of("data", "centered dataset") | of("training", "sde smallest_time batch_size")
BUILT |= of("training", "num_microbatches matmul_precision exact_jacobian score_matching_order")
BUILT |= of("sampling", "matmul_precision") | of("eval", "dequantizer hutchinson_type")
VE, VP = of("model", "sigma_min sigma_max"), of("model", "beta_min beta_max")
POINTS, IMAGES = MLP | of("data", "dim"), UNET | of("data", "image_size num_channels")
LOSS = of("training", "exact_jacobian likelihood_weighting reduce_mean weighting time_sampling")
LOSS |= of("data", "uniform_dequantization")
LOOP = of("training", "eval_freq log_freq max_bad_steps n_jitted_steps snapshot_freq snapshot_freq_for_preemption")
LOOP |= of("training", "snapshot_minutes_for_preemption wandb_project")
TRAIN = (
    LOSS
    | LOOP
    | of("training", "antithetic_times device_memory_gib grad_shares n_iters init_from snapshot_sampling")
    | of("model", "ema_rate")
)
SAMPLER = of("sampling", "method smallest_time noise_removal")
ODE, PC = of("sampling", "rtol atol"), of("sampling", "probability_flow n_steps_each snr")
SECOND, THIRD = of("training", "second_order_weight"), of("training", "third_order_scaling third_order_weight")
EVAL = of("eval", "batch_size begin_ckpt end_ckpt wait_for_checkpoints_s num_examples num_repeats bpd_dataset dataset")
EVAL |= of("eval", "bound enable_bpd enable_fisher enable_loss enable_sampling num_probes ode_solver")
EVAL |= of("eval", "discrete_bound ledger importance_samples")
RK45 = of("eval", "rtol atol max_steps")
BOUND = of("eval", "dsm offset bound_importance_weighting bound_num_times")
DEQ = of("deq", "dropout ema_rate init_batch_size n_iters network offset")
# Read by data sets, features and combinations that are not here; each has a test of its own.
ELSEWHERE = of("data", "category dir") | of("eval", "inception_batch_size inception_path kid_subset_size kid_subsets")
ELSEWHERE |= of("eval", "stats_path") | of("training", "importance_weighting init_optimizer")
ELSEWHERE |= of("model", "log_snr_min log_snr_max")
# Keys of one value, which the check alone reads.
FIXED = {"training.continuous", "optim.optimizer"} | of("model", "attention_type data_init normalization")


def smallest(config, **evaluation):
    config.training.update(n_iters=4, snapshot_sampling=config.model.name == "mlp")
    config.eval.update(batch_size=8, num_examples=8, num_samples=8, bound_num_times=3, rtol=1e-2, atol=1e-2)
    config.eval.update(fisher_num_times=3, fisher_num_examples=4, **evaluation)
    config.sampling.update(rtol=1e-1, atol=1e-1)
    config.deq.update(network="small", n_iters=2, init_batch_size=8)
    return config


def points(**evaluation):
    return smallest(tiny_mixture(score_matching_order=3), **evaluation)


def images(**evaluation):
    config = smallest(tiny_digits(sde="vpsde", score_matching_order=2), **evaluation)
    config.model.update(sigma_max=50.0, scale_by_sigma=False)
    return config


def watched(monkeypatch, config):
    """The names of the keys that are read from now on, but by the check and by copies of a whole section."""
    names, read, original = {id(config): ""}, set(), ConfigDict.__getitem__
    names |= {id(section): f"{name}." for name, section in config.items() if isinstance(section, ConfigDict)}

    def getitem(self, key):
        frame = sys._getframe(1)
        if frame.f_code.co_name == "__getattr__":
            frame = frame.f_back
        if id(self) in names and not frame.f_code.co_filename.endswith(("config_dict.py", "configs/check.py")):
            read.add(names[id(self)] + key)
        return original(self, key)

    monkeypatch.setattr(ConfigDict, "__getitem__", getitem)
    return read


def runs():
    """Each: its job, its config, what it is to read beside BUILT."""
    of_points = points(bound=True, dsm=False, enable_fisher=True, enable_loss=True)
    fisher = of("eval", "dequantization fisher_num_examples fisher_num_probes fisher_num_times num_samples")
    pc = images(ode_solver="adams", ode_steps=60)
    pc.sampling.method, pc.model.num_scales = "pc", 30
    of_pc = of("sampling", "corrector predictor") | of(
        "eval", "num_samples enable_metrics ode_steps ode_data_std gaussian_baseline dequantization"
    )
    of_pc |= of("data", "uniform_dequantization")
    variational = of("eval", "gaussian_baseline") | of("deq", "ckpt_id network")
    both = SAMPLER | ODE | of("sampling", "corrector predictor")
    return [
        (run_lib.train, points(), VE | POINTS | TRAIN | SAMPLER | ODE | SECOND | THIRD | of("eval", "dequantization")),
        (run_lib.train, images(), VP | IMAGES | TRAIN | SECOND | of("data", "random_flip")),
        (run_lib.evaluate, of_points, VE | POINTS | LOSS | SECOND | THIRD | EVAL | RK45 | BOUND | both | fisher),
        (run_lib.evaluate, pc, VP | IMAGES | EVAL | SAMPLER | PC | of_pc),
        (run_lib.train_deq, images(), VP | IMAGES | LOOP | DEQ | of("eval", "ckpt_id")),
        (run_lib.evaluate, images(dequantizer=True, enable_sampling=False), VP | IMAGES | EVAL | RK45 | variational),
    ]


@pytest.mark.slow
def test_each_mode_reads_what_it_is_said_to(tmp_path_factory, monkeypatch):
    folder = {"mlp": tmp_path_factory.mktemp("points"), "ncsnpp": tmp_path_factory.mktemp("images")}
    seen, problems = set(), []
    for number, (job, config, expected) in enumerate(runs()):
        with monkeypatch.context() as patch:
            read = watched(patch, config)
            job(config, folder[config.model.name])
        read &= KEYS
        problems.append((number, job.__name__, sorted(read - BUILT - expected), sorted((BUILT | expected) - read)))
        seen |= read
        for scene, keys in INERT:  # a key that idles by another key of the network may be handed to it
            if scene == {"model.name": config.model.name}:
                assert not set(keys) & read, "what is refused as idle is read"
    assert not [p for p in problems if p[2] or p[3]]
    assert seen | ELSEWHERE | FIXED == KEYS and not seen & (ELSEWHERE | FIXED)
