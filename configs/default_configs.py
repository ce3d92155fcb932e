# SPDX-License-Identifier: Apache-2.0
"""Every config key with its default. A default stands here once; the other files here hold only what they change.

A key that is not here does not exist: `configs.check.check_config` refuses it by name.
"""

from ml_collections import ConfigDict


def get_default_configs() -> ConfigDict:
    """Returns a fresh config with every key of the project, VE SDE on 32x32 images."""
    config = ConfigDict()
    config.seed = 42

    config.training = training = ConfigDict()
    training.sde = "vesde"  # vpsde | subvpsde | vesde | linearvesde
    training.score_matching_order = 1  # 1 | 2 | 3
    training.second_order_weight = 1.0
    training.third_order_weight = 1.0
    training.exact_jacobian = False  # exact traces by jacfwd instead of a random probe, for small dimensions
    training.continuous = True
    training.reduce_mean = True  # False: half the sum over dimensions, order 1 only
    training.weighting = ""  # of order 1: a name in losses.WEIGHTINGS; empty: as the next two say
    training.likelihood_weighting = False
    training.importance_weighting = False  # draws t uniform in log-SNR; with likelihood_weighting only
    training.smallest_time = 1e-5
    training.batch_size = 128
    training.num_microbatches = 1  # parts of a device's batch, one after another, for less memory; same gradients
    training.n_iters = 1_000_001
    training.n_jitted_steps = 1
    training.log_freq = 100
    training.eval_freq = 100
    training.snapshot_freq = 50_000
    training.snapshot_freq_for_preemption = 10_000
    training.snapshot_minutes_for_preemption = 30.0  # a resume checkpoint also after so many minutes; 0: by steps only
    training.matmul_precision = "default"  # of matrix products: default (TF32 on a GPU, bfloat16 on a TPU) | float32
    training.max_bad_steps = 10  # in a row with a loss or gradient that is not finite, then the run stops
    training.snapshot_sampling = True
    training.init_from = ""  # a checkpoint, ours or of the public code, whose parameters and EMA a new run starts with
    training.init_optimizer = False  # also its Adam moments, count and step
    training.wandb_project = ""  # a project of Weights & Biases to log to as well (pip install wandb); empty: none

    config.optim = optim = ConfigDict()
    optim.optimizer = "Adam"
    optim.lr = 2e-4
    optim.beta1 = 0.9
    optim.beta2 = 0.999
    optim.eps = 1e-8
    optim.weight_decay = 0.0
    optim.warmup = 5000  # steps of linear warm-up; 0: none
    optim.grad_clip = 1.0  # on the global norm; negative: none

    config.data = data = ConfigDict()
    data.dataset = "CIFAR10"
    data.dir = ""  # folder of the data set; empty: the library's own place
    data.category = ""  # LSUN: e.g. church_outdoor; ImageNet: empty for the old copy, imagenet_resized for the new
    data.image_size = 32
    data.num_channels = 3
    data.centered = False  # True: images in [-1, 1]; False: [0, 1]
    data.random_flip = True
    data.uniform_dequantization = False  # in training; likelihoods are always dequantised
    data.dim = 1  # of the synthetic mixture

    config.model = model = ConfigDict()
    model.name = "ncsnpp"  # ncsnpp | mlp
    model.ema_rate = 0.999
    model.sigma_min = 0.01
    model.sigma_max = 50.0
    model.beta_min = 0.1
    model.beta_max = 20.0
    model.num_scales = 1000
    model.normalization = "GroupNorm"
    model.nonlinearity = "swish"  # elu | relu | lrelu | swish
    model.nf = 128
    model.ch_mult = (1, 2, 2, 2)
    model.num_res_blocks = 4
    model.attn_resolutions = (16,)
    model.attention_type = "ddpm"
    model.resamp_with_conv = True
    model.conditional = True
    model.fir = True
    model.fir_kernel = (1, 3, 3, 1)
    model.skip_rescale = True
    model.resblock_type = "biggan"  # biggan | ddpm
    model.progressive = "none"  # none | output_skip | residual
    model.progressive_input = "residual"  # none | input_skip | residual
    model.progressive_combine = "sum"  # sum | cat
    model.embedding_type = "fourier"  # fourier | positional
    model.fourier_scale = 16.0
    model.trainable_embedding = False
    model.init_scale = 0.0
    model.conv_size = 3
    model.dropout = 0.1
    model.scale_by_sigma = True
    model.data_init = False
    model.remat = False  # residual blocks computed again in reverse mode: less memory, more time
    model.dtype = "float32"  # float32 | bfloat16: the feature maps; parameters and losses stay float32
    model.num_layers = 3  # hidden layers of the MLP, each model.nf wide
    model.parameterization = ""  # noise | score | velocity; empty: velocity of the MLP, the public code's of ncsnpp
    model.sigma_data = 0.5  # of velocity: standard deviation of the data

    config.sampling = sampling = ConfigDict()
    sampling.method = "ode"  # ode | pc
    sampling.smallest_time = 1e-5
    sampling.predictor = "reverse_diffusion"
    sampling.corrector = "langevin"
    sampling.n_steps_each = 1
    sampling.noise_removal = True
    sampling.probability_flow = False
    sampling.snr = 0.16
    sampling.matmul_precision = "float32"  # as training's; what is measured, likelihoods first, is always in float32
    sampling.rtol = 1e-5
    sampling.atol = 1e-5

    config.eval = evaluate = ConfigDict()
    evaluate.batch_size = 1024
    evaluate.begin_ckpt = 0  # 0: the newest checkpoint
    evaluate.end_ckpt = 0
    evaluate.ckpt_id = 0
    evaluate.enable_loss = False
    evaluate.enable_bpd = True
    evaluate.enable_sampling = True
    evaluate.enable_metrics = True  # IS, FID and KID of the samples, of images
    evaluate.enable_fisher = False  # score diagnostics along the ODE
    evaluate.num_samples = 50_000
    evaluate.num_repeats = 5
    evaluate.bpd_dataset = "test"  # train | test
    evaluate.dataset = ""  # the same under the name of the public README; empty: bpd_dataset
    evaluate.wait_for_checkpoints_s = 0.0  # how long a checkpoint that is not there yet is waited for
    evaluate.gaussian_baseline = False  # also the bits/dim of a Gaussian fitted to the training images
    evaluate.num_examples = 0  # of the split, for a quick look; 0: all
    evaluate.hutchinson_type = "rademacher"  # rademacher | gaussian | exact
    evaluate.num_probes = 1  # of Hutchinson's estimate in one solve, averaged
    evaluate.rtol = 1e-5
    evaluate.atol = 1e-5
    evaluate.max_steps = 20_000  # of the ODE solver, for one example
    evaluate.ode_solver = "rk45"  # of the likelihood's ODE: rk45 | adams, an even grid in log-SNR: fewer evaluations
    evaluate.ode_steps = 192  # of adams, which has no tolerance; the report has an estimate of its error
    evaluate.ode_data_std = 0.25  # of adams: about the standard deviation of the scaled data
    evaluate.bound = False  # the variational bound, beside the ODE's likelihood
    evaluate.dsm = True  # the bound in its denoising form; False: sliced, with a probe
    evaluate.offset = True  # the bound accounts for the start at smallest_time
    evaluate.bound_importance_weighting = True  # its times uniform in log-SNR
    evaluate.bound_num_times = 1000
    evaluate.dequantizer = False  # variational dequantisation, by what --mode train_deq made
    evaluate.fisher_num_times = 100
    evaluate.fisher_num_examples = 256  # of the test split; 0: all
    evaluate.fisher_num_probes = 1  # 2 or more: distances without a probe's variance
    evaluate.inception_path = ""  # SavedModel folder of the features; empty: TF-Hub's tfgan/eval/inception/1
    evaluate.inception_batch_size = 100
    evaluate.stats_path = ""  # file of the data's statistics; empty: assets/stats/<dataset>_stats.npz
    evaluate.kid_subsets = 100  # random subsets whose KIDs give its standard error, seeds 0, 1, ...
    evaluate.kid_subset_size = 1000

    config.deq = deq = ConfigDict()
    deq.n_iters = 300_001
    deq.ema_rate = 0.99
    deq.dropout = 0.0
    deq.offset = True
    deq.network = "cifar10"  # cifar10 | imagenet32 | imagenet64 | small: the Flow++ dequantiser's variant
    deq.init_batch_size = 128  # images of the data-dependent initialisation
    deq.ckpt_id = 0  # checkpoint of the dequantiser that eval.dequantizer uses; 0: the newest
    return config


def use_ddpmpp(config: ConfigDict) -> None:
    """Turns the NCSN++ of the defaults into a DDPM++, for VP and sub-VP, on images in [-1, 1]."""
    config.data.centered = True
    config.model.update(embedding_type="positional", fir=False, progressive_input="none", scale_by_sigma=False)
