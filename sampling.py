# SPDX-License-Identifier: Apache-2.0
"""Samplers: they solve the reverse process of a score model from the prior at T to eps."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from errors import UserError
from ode import rk45
from sde_lib import SDE, VESDE, VPSDE, Batch, ScoreFn, batch_mul, subVPSDE

# (score_fn, keys [B], one for each sample) -> (images [B, ...] as the inverse scaler gives them, evaluations [B])
SamplingFn = Callable[[ScoreFn, Array], tuple[Array, Array]]


def ode_sampler(
    sde: SDE,
    score_fn: ScoreFn,
    z: Batch,
    *,
    eps: float = 1e-5,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    denoise: bool = True,
) -> tuple[Batch, Int[Array, "B"]]:
    """Solves the probability flow ODE dx/dt = f x - g^2 s / 2 from z at T to x at eps (Song et al., arXiv 2011.13456).

    If `denoise`, one reverse-diffusion step without noise ends it: x - f_N(x) + G_N^2 s at eps, with f_N and G_N from
    `sde.discretize`. The step is one more evaluation of the score.

    Returns x [B, ...] on the model's scale and evaluations of the score [B]. x is NaN where the solver gave up.
    """
    x, stats = rk45(lambda t, x: sde.probability_flow(x, t, score_fn(x, t)), z, sde.T, eps, rtol=rtol, atol=atol)
    if not denoise:
        return x, stats.nfe
    t = jnp.full(x.shape[0], eps, x.dtype)
    f, g = sde.discretize(x, t)
    return x - f + batch_mul(jnp.square(g), score_fn(x, t)), stats.nfe + 1


# (sde, score_fn, x [B, ...], t [B], noise [B, ...], probability_flow) -> x one step earlier, and the same without noise
Predictor = Callable[[SDE, ScoreFn, Array, Array, Array, bool], tuple[Array, Array]]
# (sde, score_fn, x [B, ...], t [B], noise [B, ...], snr) -> x after one step at the same t, and the same without noise
Corrector = Callable[[SDE, ScoreFn, Array, Array, Array, float], tuple[Array, Array]]


def euler_maruyama(sde, score_fn, x, t, noise, probability_flow):
    """Euler-Maruyama on the reverse SDE or the probability flow, with step T / N."""
    drift, diffusion = sde.sde(x, t)
    share = 0.5 if probability_flow else 1.0
    x_mean = x - (drift - batch_mul(share * jnp.square(diffusion), score_fn(x, t))) / sde.N
    return (x_mean if probability_flow else x_mean + batch_mul(diffusion / math.sqrt(sde.N), noise)), x_mean


def reverse_diffusion(sde, score_fn, x, t, noise, probability_flow):
    """The reverse of `sde.discretize` (Song et al. 2021, arXiv 2011.13456, appendix E)."""
    f, g = sde.discretize(x, t)
    share = 0.5 if probability_flow else 1.0
    x_mean = x - f + batch_mul(share * jnp.square(g), score_fn(x, t))
    return (x_mean if probability_flow else x_mean + batch_mul(g, noise)), x_mean


def ancestral_sampling(sde, score_fn, x, t, noise, probability_flow):
    """The ancestral step of DDPM (VP) and NCSN (VE), always with noise (Song et al. 2021, arXiv 2011.13456, app. F)."""
    if probability_flow:
        raise ValueError("ancestral_sampling has no probability flow; use reverse_diffusion or euler_maruyama")
    if isinstance(sde, VESDE):
        sigma, previous = sde.discrete_sigma_pair(t)
        x_mean = x + batch_mul(sigma**2 - previous**2, score_fn(x, t))
        std = previous * jnp.sqrt(1 - jnp.square(previous / sigma))
        return x_mean + batch_mul(std, noise), x_mean
    if isinstance(sde, VPSDE) and not isinstance(sde, subVPSDE):
        beta = 1 - sde.discrete_alpha(t)
        x_mean = batch_mul(1 / jnp.sqrt(1 - beta), x + batch_mul(beta, score_fn(x, t)))
        return x_mean + batch_mul(jnp.sqrt(beta), noise), x_mean
    raise UserError("sampling.predictor='ancestral_sampling' is defined for vpsde and vesde; use reverse_diffusion")


def langevin(sde, score_fn, x, t, noise, snr, axis_name=None):
    """Langevin step of size 2 alpha (snr |noise| / |s|)^2 (Song et al. 2021, arXiv 2011.13456, algorithms 4 and 5).

    The norms are means over the batch, which may be spread over a pmap over `axis_name`.
    """
    score = score_fn(x, t)

    def mean_norm(a):
        mean = jnp.mean(jnp.linalg.norm(a.reshape(a.shape[0], -1), axis=-1))
        return jax.lax.pmean(mean, axis_name) if axis_name else mean

    step = 2 * sde.discrete_alpha(t) * (snr * mean_norm(noise) / mean_norm(score)) ** 2
    x_mean = x + batch_mul(step, score)
    return x_mean + batch_mul(jnp.sqrt(2 * step), noise), x_mean


def annealed_langevin(sde, score_fn, x, t, noise, snr):
    """Annealed Langevin step of size 2 alpha (snr sigma)^2 (Song and Ermon 2019, arXiv 1907.05600)."""
    step = 2 * sde.discrete_alpha(t) * jnp.square(snr * sde.sigma(t))
    x_mean = x + batch_mul(step, score_fn(x, t))
    return x_mean + batch_mul(jnp.sqrt(2 * step), noise), x_mean


PREDICTORS: dict[str, Predictor | None] = {
    "euler_maruyama": euler_maruyama,
    "reverse_diffusion": reverse_diffusion,
    "ancestral_sampling": ancestral_sampling,
    "none": None,
}
CORRECTORS: dict[str, Corrector | None] = {"langevin": langevin, "ald": annealed_langevin, "none": None}


def pc_sampler(
    sde: SDE,
    score_fn: ScoreFn,
    z: Batch,
    noise_fn: Callable[[Array], tuple[Array, Array]],
    *,
    predictor: Predictor | None,
    corrector: Corrector | None,
    snr: float,
    n_steps: int = 1,
    probability_flow: bool = False,
    denoise: bool = True,
    eps: float = 1e-3,
) -> tuple[Batch, Int[Array, "B"]]:
    """Predictor-corrector sampling from z at T to eps in `sde.N` steps (Song et al. 2021, arXiv 2011.13456, alg. 1).

    Each step is `n_steps` of the corrector and one of the predictor, at times evenly spaced from T to eps. `denoise`
    leaves out the noise of the very last update. `noise_fn` maps the step number [] to the standard normal noise of the
    corrector [n_steps, B, ...] and the predictor [B, ...].

    Returns x [B, ...] on the model's scale and evaluations of the score [B].
    """
    times = jnp.linspace(sde.T, eps, sde.N)

    def step(i, carry):
        x, x_mean = carry
        t = jnp.full(x.shape[0], times[i], x.dtype)
        corrector_noise, predictor_noise = noise_fn(i)
        if corrector is not None:
            for k in range(n_steps):
                x, x_mean = corrector(sde, score_fn, x, t, corrector_noise[k], snr)
        if predictor is not None:
            x, x_mean = predictor(sde, score_fn, x, t, predictor_noise, probability_flow)
        return x, x_mean

    x, x_mean = jax.lax.fori_loop(0, sde.N, step, (z, z))
    evaluations = sde.N * ((predictor is not None) + n_steps * (corrector is not None))
    return (x_mean if denoise else x), jnp.full(z.shape[0], evaluations, jnp.int32)


def get_sampling_fn(
    sampling_config: Any,
    sde: SDE,
    shape: tuple[int, ...],
    inverse_scaler: Callable[[Array], Array],
    axis_name: str | None = None,
) -> SamplingFn:
    """Makes the sampler of images of `shape` [H, W, C] that `config.sampling` asks for.

    A sample's noise is a function of its key alone. If the batch is spread over a pmap, `axis_name` is its axis.
    """
    c = sampling_config
    prior = jax.vmap(functools.partial(sde.prior_sampling, shape=shape))

    def sample_ode(score_fn, keys):
        options = {"eps": c.smallest_time, "rtol": c.rtol, "atol": c.atol, "denoise": c.noise_removal}
        x, nfe = ode_sampler(sde, score_fn, prior(keys), **options)
        return inverse_scaler(x), nfe

    if c.method == "ode":
        return sample_ode
    predictor, corrector = PREDICTORS[c.predictor.lower()], CORRECTORS[c.corrector.lower()]
    if corrector is langevin:
        corrector = functools.partial(langevin, axis_name=axis_name)
    steps = {"predictor": predictor, "corrector": corrector, "snr": c.snr, "n_steps": c.n_steps_each}
    options = {"probability_flow": c.probability_flow, "denoise": c.noise_removal, "eps": c.smallest_time}
    normal = functools.partial(jax.random.normal, shape=(c.n_steps_each + 1, *shape))

    def sample_pc(score_fn, keys):
        prior_keys, noise_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)

        def noise_fn(i):
            keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(noise_keys, i)
            noise = jax.vmap(normal, out_axes=1)(keys)  # [n_steps + 1, B, ...]
            return noise[:-1], noise[-1]

        x, nfe = pc_sampler(sde, score_fn, prior(prior_keys), noise_fn, **steps, **options)
        return inverse_scaler(x), nfe

    return sample_pc
