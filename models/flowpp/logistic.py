# SPDX-License-Identifier: Apache-2.0
"""Mixtures of logistic distributions as an invertible map of the real line onto itself."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Values = Float[Array, "*shape"]

# A bracket in float32 that is as wide as its ends are large has about 24 bits left to halve.
HALVINGS = 40


class Mixture(NamedTuple):
    """Unnormalised log weights, means and log scales of K logistic distributions for each element."""

    logits: Float[Array, "*shape K"]
    means: Float[Array, "*shape K"]
    logscales: Float[Array, "*shape K"]


def mixture_logit(x: Values, mixture: Mixture) -> tuple[Values, Values]:
    """y = logit F(x) and log dy/dx, elementwise, for F = sum_k w_k sigmoid((x - mean_k) / scale_k).

    dy/dx = F'(x) / (F(x) (1 - F(x))). F and 1 - F are each a sum of positive terms, computed in logarithms, so neither
    end is cut off (Flow++, arXiv 1902.00275, section 3.2). The public code computes 1 - F from F and stops at 1e-7,
    where map and density no longer agree.
    """
    z = (x[..., None] - mixture.means) * jnp.exp(-mixture.logscales)
    log_weights = jax.nn.log_softmax(mixture.logits)
    below, above = jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)
    log_cdf = jax.nn.logsumexp(log_weights + below, axis=-1)
    log_survival = jax.nn.logsumexp(log_weights + above, axis=-1)
    log_pdf = jax.nn.logsumexp(log_weights + below + above - mixture.logscales, axis=-1)
    return log_cdf - log_survival, log_pdf - log_cdf - log_survival


def inverse_mixture_logit(y: Values, mixture: Mixture) -> Values:
    """The x with logit F(x) = y, elementwise (see `mixture_logit`), by bisection and a Newton step.

    Component k alone reaches y at mean_k + scale_k y. The mixture reaches y between the least and greatest of these.
    """
    own = mixture.means + jnp.exp(mixture.logscales) * y[..., None]

    def halve(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        too_low = mixture_logit(middle, mixture)[0] < y
        return jnp.where(too_low, middle, low), jnp.where(too_low, high, middle)

    low, high = jax.lax.fori_loop(0, HALVINGS, halve, (own.min(axis=-1), own.max(axis=-1)))
    x = 0.5 * (low + high)
    reached, log_slope = mixture_logit(x, mixture)
    return x + (y - reached) * jnp.exp(-log_slope)
