# SPDX-License-Identifier: Apache-2.0
"""All config keys and their defaults. The other config files hold only what they change.

`configs.check.check_config` refuses a key that is not listed here.
"""

from ml_collections import ConfigDict


def get_default_configs() -> ConfigDict:
    """Returns a new config with all keys, set for the VE SDE on 32x32 images."""
    config = ConfigDict()
    config.seed = 42

    config.training = training = ConfigDict()
    training.sde = "vesde"  # vpsde | subvpsde | vesde | linearvesde | vp_log_snr | straight
    training.score_matching_order = 1  # 1 | 2 | 3
    training.second_order_weight = 1.0
    training.third_order_scaling = "none"  # none | dimension: times D, so that its gradient does not fade with D
    training.third_order_weight = 1.0
    training.exact_jacobian = False  # exact traces by jacfwd instead of a random probe, for small dimensions
    training.continuous = True
    training.reduce_mean = True  # False: half the sum over dimensions, order 1 only
    training.weighting = ""  # of order 1: a name in losses.WEIGHTINGS; empty: the next two keys decide
    training.likelihood_weighting = False
    training.importance_weighting = False  # draws t uniform in log-SNR; with likelihood_weighting only
    training.time_sampling = ""  # uniform | log_snr | velocity, all orders weighted for likelihood; empty: keys above
    training.antithetic_times = False  # the times of a batch are evenly spread
    training.smallest_time = 1e-5
    training.batch_size = 128
    training.num_microbatches = 1  # splits a device's batch to save memory; the gradients are the same
    training.device_memory_gib = 0.0  # a step that takes more is refused; 0: what the back end tells, if it does
    training.n_iters = 1_000_001
    training.n_jitted_steps = 1
    training.log_freq = 100
    training.grad_shares = False  # also logs the share of each term in the gradient; one more program to compile
    training.eval_freq = 100
    training.snapshot_freq = 50_000
    training.snapshot_freq_for_preemption = 10_000
    training.snapshot_minutes_for_preemption = 30.0  # also resume checkpoints this many minutes apart; 0: by steps only
    training.matmul_precision = "default"  # of matrix products: default (TF32 on a GPU, bfloat16 on a TPU) | float32
    training.max_bad_steps = 10  # the run stops after so many steps in a row whose loss or gradient is not finite
    training.snapshot_sampling = True
    training.init_from = ""  # a new run takes parameters and EMA from this checkpoint, ours or the public code's
    training.init_optimizer = False  # also takes the Adam moments, count and step
    training.wandb_project = ""  # also logs to this Weights & Biases project (pip install wandb); empty: none

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
    data.dir = ""  # folder of the data set, or of your own images (IMAGE_FOLDER); empty: the library's own place
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
    model.log_snr_min = -5.0  # of vp_log_snr and straight, at the end of time
    model.log_snr_max = 13.3  # and at its start; 13.3 suits 256 levels, 10 the digits' 17
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
    model.time_condition = "public"  # public: sigma of VE, else 999 t | log_snr, with a positional embedding
    model.log_snr_scale = 4.0  # radians of the fastest feature for a unit of log-SNR
    model.input_frequencies = ()  # each n gives the network sin and cos of 2^n 2 pi x beside x; VDM's are (6, 7)
    model.init_scale = 0.0
    model.conv_size = 3
    model.dropout = 0.1
    model.scale_by_sigma = True
    model.data_init = False
    model.remat = False  # recomputes residual blocks in the backward pass: less memory, more time
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
    sampling.matmul_precision = "float32"  # default | float32; likelihoods and test losses always use float32
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
    evaluate.dataset = ""  # the public README's name for bpd_dataset, which it overrides unless empty
    evaluate.wait_for_checkpoints_s = 0.0  # waits so many seconds for a checkpoint that is not there yet
    evaluate.gaussian_baseline = False  # also computes the bits/dim of a Gaussian fitted to the training images
    evaluate.num_examples = 0  # uses only so many examples of the split, for a quick look; 0: all
    evaluate.hutchinson_type = "rademacher"  # rademacher | gaussian | exact
    evaluate.num_probes = 1  # averaged in Hutchinson's trace estimate
    evaluate.rtol = 1e-5
    evaluate.atol = 1e-5
    evaluate.max_steps = 20_000  # of the ODE solver, per example
    evaluate.ode_solver = "rk45"  # of the likelihood: rk45 | adams, on an even grid in log-SNR with fewer evaluations
    evaluate.ode_steps = 192  # of adams, which has no tolerance; the report estimates its error
    evaluate.ode_data_std = 0.25  # of adams: the approximate standard deviation of the scaled data
    evaluate.bound = False  # also computes the variational bound
    evaluate.dsm = True  # True: denoising form of the bound; False: sliced form, with a probe
    evaluate.offset = True  # the bound accounts for the start at smallest_time
    evaluate.bound_importance_weighting = True  # draws the bound's times uniform in log-SNR
    evaluate.bound_num_times = 1000
    evaluate.discrete_bound = False  # also computes the SDE's bound for the levels themselves, without dequantisation
    evaluate.ledger = False  # also computes bits/dim by every dequantisation, 1, 5 and 20 samples, and that bound
    evaluate.dequantization = "uniform"  # uniform | truncated_normal | variational, by what --mode train_deq trained
    evaluate.dequantizer = False  # True: eval.dequantization=variational
    evaluate.importance_samples = 1  # noises of an image, whose likelihoods are averaged
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
    deq.ckpt_id = 0  # the dequantiser's checkpoint for eval.dequantizer; 0: the newest
    return config


def use_ddpmpp(config: ConfigDict) -> None:
    """Turns the NCSN++ of the defaults into a DDPM++, for VP and sub-VP, on images in [-1, 1]."""
    config.data.centered = True
    config.model.update(embedding_type="positional", fir=False, progressive_input="none", scale_by_sigma=False)
