# SPDX-License-Identifier: Apache-2.0
"""A fully connected network for data of few dimensions."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.layers import ACTIVATIONS, dense

# The frequencies of sin and cos in log-SNR / 8, which runs over some [-1.3, 1.8] for every SDE of the project.
FREQUENCIES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


class MLP(nn.Module):
    """Maps x [B, D] and log-SNR [B] to [B, D]. `models.score.get_score_fn` makes a score of the output."""

    width: int
    num_layers: int
    activation: str
    sigma_data: float  # standard deviation of the data
    dropout: float = 0.0
    parameterization: str = "velocity"

    conditioning = "log_snr"
    takes_images = False

    @nn.compact
    def __call__(self, x: Float[Array, "B D"], log_snr: Float[Array, "B"], train: bool = False) -> Float[Array, "B D"]:
        act = ACTIVATIONS[self.activation]
        level = log_snr[:, None] / 8
        angles = level * jnp.array(FREQUENCIES)
        temb = jnp.concatenate([level, jnp.sin(angles), jnp.cos(angles)], axis=-1)
        temb = act(dense(self.width)(temb))

        h = x
        for _ in range(self.num_layers):
            h = act(dense(self.width)(h) + dense(self.width)(temb))
            h = nn.Dropout(self.dropout)(h, deterministic=not train)
        return dense(x.shape[-1], init_scale=0.0)(h)
