# SPDX-License-Identifier: Apache-2.0
"""A fully connected score network for data of few dimensions."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.layers import dense, get_activation
from sde_lib import SDE

# of sin and cos in log-SNR / 8, which runs over some [-1.3, 1.8] for every SDE of the project
FREQUENCIES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


class MLP(nn.Module):
    """Noise prediction: x [B, D] and t [B] -> [B, D]; the score is -output / sigma(t).

    With s(t)^2 = sigma_data^2 alpha^2 + sigma^2, the output is sigma x / s^2 + (sigma_data alpha / s) F(x / s, t): the
    exact prediction for N(0, sigma_data^2) data, corrected by the network F, whose input and target have unit variance
    at every t (Karras et al. 2022, arXiv 2206.00364, section 5, carried over to alpha != 1). So sigma^3 times the
    second derivative of the score stays of order one, also for VE at sigma = 50, where x itself is of order 50.
    """

    sde: SDE
    sigma_data: float
    width: int
    num_layers: int
    activation: str
    dropout: float = 0.0

    conditioning = "time"
    predicts_score = False
    takes_images = False

    @nn.compact
    def __call__(self, x: Float[Array, "B D"], t: Float[Array, "B"], train: bool = False) -> Float[Array, "B D"]:
        act = get_activation(self.activation)
        sigma, signal = self.sde.sigma(t)[:, None], self.sigma_data * jnp.exp(self.sde.log_alpha(t))[:, None]
        std = jnp.sqrt(signal**2 + sigma**2)

        level = self.sde.log_snr(t)[:, None] / 8
        angles = level * jnp.array(FREQUENCIES)
        temb = jnp.concatenate([level, jnp.sin(angles), jnp.cos(angles)], axis=-1)
        temb = act(dense(self.width)(temb))

        h = x / std
        for _ in range(self.num_layers):
            h = act(dense(self.width)(h) + dense(self.width)(temb))
            h = nn.Dropout(self.dropout)(h, deterministic=not train)
        correction = dense(x.shape[-1], init_scale=0.0)(h)
        return sigma / std**2 * x + signal / std * correction
