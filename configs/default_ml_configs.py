# SPDX-License-Identifier: Apache-2.0
"""The recipe for bits/dim after Zheng et al. 2023 (arXiv 2305.03935) and Kingma et al. 2021 (arXiv 2107.00630)."""

from ml_collections import ConfigDict

from configs.default_configs import use_ddpmpp


def use_maximum_likelihood(config: ConfigDict) -> None:
    """VP linear in log-SNR, a velocity network that is told the log-SNR, times drawn for it, their optimiser."""
    use_ddpmpp(config)
    config.training.update(sde="vp_log_snr", time_sampling="velocity", antithetic_times=True)
    config.model.update(parameterization="velocity", sigma_data=1.0, time_condition="log_snr")
    config.optim.update(beta2=0.99, weight_decay=0.01, warmup=100, grad_clip=-1.0)


def use_levels(config: ConfigDict) -> None:
    """Trains on the 256 levels themselves, without uniform noise, and evaluates with truncated normal noise.

    Fourier features show them to the network: the last turns once from level to level (arXiv 2107.00630, appendix C).
    """
    config.model.input_frequencies = (6, 7)
    config.data.uniform_dequantization = False
    config.eval.dequantization = "truncated_normal"
