"""Samplers: draws of a score model by solving its reverse process from the prior at T to eps."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from errors import UserError
from ode import rk45
from sde_lib import SDE, batch_mul

ScoreFn = Callable[[Array, Array], Array]  # (x [B, ...], t [B]) -> score [B, ...]
# (score_fn, key, batch size B) -> (images [B, ...] as the inverse scaler gives them, evaluations of the score [B])
SamplingFn = Callable[[ScoreFn, PRNGKeyArray, int], tuple[Array, Array]]


def ode_sampler(
    sde: SDE,
    score_fn: ScoreFn,
    z: Float[Array, "B *shape"],
    *,
    eps: float = 1e-5,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 20_000,
    denoise: bool = True,
) -> tuple[Float[Array, "B *shape"], Int[Array, "B"]]:
    """Solves the probability flow ODE dx/dt = f x - g^2 s / 2 from z at T to x at eps (Song et al., arXiv 2011.13456).

    Args:
        denoise: ends with one reverse-diffusion step without noise, x - f_N(x) + G_N^2 s at eps, where f_N and G_N are
            `sde.discretize`'s. It adds one evaluation of the score.

    Returns:
        x [B, ...] on the model's scale, evaluations of the score [B]. An example that the solver gave up on is NaN.
    """

    def flow(t, x):
        return batch_mul(sde.drift_coefficient(t), x) - batch_mul(0.5 * sde.diffusion_sq(t), score_fn(x, t))

    x, stats = rk45(flow, z, sde.T, eps, rtol=rtol, atol=atol, max_steps=max_steps)
    if not denoise:
        return x, stats.nfe
    t = jnp.full(x.shape[0], eps, x.dtype)
    f, g = sde.discretize(x, t)
    return x - f + batch_mul(jnp.square(g), score_fn(x, t)), stats.nfe + 1


def get_sampling_fn(
    sampling_config: Any, sde: SDE, shape: tuple[int, ...], inverse_scaler: Callable[[Array], Array]
) -> SamplingFn:
    """The sampler that `config.sampling` asks for, of images of `shape` [H, W, C]; UserError if it is unknown."""
    method = sampling_config.method.lower()
    if method == "pc":
        raise UserError("sampling.method='pc' (predictor-corrector) is not available yet; use ode")
    if method != "ode":
        raise UserError(f"sampling.method={sampling_config.method!r} is unknown; use ode")
    # Read once: a config changed later does not change the sampler.
    eps, rtol, atol = (float(sampling_config[key]) for key in ("smallest_time", "rtol", "atol"))
    denoise = bool(sampling_config.noise_removal)

    def sample(score_fn, key, batch):
        z = sde.prior_sampling(key, (batch, *shape))
        x, nfe = ode_sampler(sde, score_fn, z, eps=eps, rtol=rtol, atol=atol, denoise=denoise)
        return inverse_scaler(x), nfe

    return sample
