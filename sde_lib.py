# SPDX-License-Identifier: Apache-2.0
"""The diffusion processes: x_t = alpha(t) x_0 + sigma(t) z, with z ~ N(0, I) and t in [0, 1].

A process is two functions, log alpha(t) and sigma(t), and the standard deviation of its prior. The base class derives
drift, diffusion, log-SNR and its inverse from these (Kingma et al. 2021, arXiv 2107.00630). Instances are frozen
dataclasses: they are hashable, so they can be static arguments of `jax.jit`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from errors import UserError

PerExample = Float[Array, "B"]
Batch = Float[Array, "B *shape"]
ScoreFn = Callable[[Array, Array], Array]  # (x [B, ...], t [B]) -> score [B, ...]


def batch_mul(a: Float[Array, "B"], x: Batch) -> Batch:
    """Multiplies each example of x [B, ...] by its own factor a [B]."""
    return a.reshape(a.shape + (1,) * (x.ndim - a.ndim)) * x


def score_and_jacobian(score: Callable[[Batch], Batch], x: Batch) -> tuple[Batch, Float[Array, "B D D"]]:
    """s [B, ...] and its Jacobian by D forward-mode tangents, for small D. Examples must be independent in `score`."""

    def shifted(shift):  # the derivative by one shift of all examples holds the Jacobian of each
        s = score(x + shift)
        return s, s

    jacobian, s = jax.jacfwd(shifted, has_aux=True)(jnp.zeros_like(x[0]))
    return s, jacobian.reshape(len(x), x[0].size, x[0].size)


def _derivative(fn: Callable[[Array], Array], t: Array) -> Array:
    return jax.jvp(fn, (t,), (jnp.ones_like(t),))[1]


@dataclasses.dataclass(frozen=True)
class SDE:
    """Base class. A subclass defines `log_alpha(t)` and `sigma(t)`; it may override the two constants."""

    N: int = 1000  # discretisation steps of the ancestral samplers

    T = 1.0  # end of time
    prior_std = 1.0  # standard deviation of the prior that stands in for the marginal at T
    conditions_on_sigma = False  # whether the U-Net takes sigma(t), for noise of many orders of magnitude, or 999 t

    def log_alpha(self, t: Array) -> Array:
        """Logarithm of the coefficient of x_0 in the mean of x_t, elementwise in t."""
        raise NotImplementedError

    def sigma(self, t: Array) -> Array:
        """Standard deviation of x_t given x_0, elementwise in t."""
        raise NotImplementedError

    def alpha(self, t: Array) -> Array:
        """Coefficient of x_0 in the mean of x_t, elementwise in t."""
        return jnp.exp(self.log_alpha(t))

    def drift_coefficient(self, t: Array) -> Array:
        """f(t) = d log alpha / dt: the drift is f(t) x."""
        return _derivative(self.log_alpha, t)

    def diffusion_sq(self, t: Array) -> Array:
        """g(t)^2 = d sigma^2 / dt - 2 f(t) sigma^2."""
        sigma = self.sigma(t)
        return 2 * sigma * (_derivative(self.sigma, t) - self.drift_coefficient(t) * sigma)

    def marginal_prob(self, x: Batch, t: PerExample) -> tuple[Batch, PerExample]:
        """Mean [B, ...] and standard deviation [B] of x_t given x_0 = x [B, ...]."""
        return batch_mul(self.alpha(t), x), self.sigma(t)

    def sde(self, x: Batch, t: PerExample) -> tuple[Batch, PerExample]:
        """Drift [B, ...] and diffusion coefficient g(t) [B] of dx = f x dt + g dw."""
        return batch_mul(self.drift_coefficient(t), x), jnp.sqrt(self.diffusion_sq(t))

    def probability_flow(self, x: Batch, t: PerExample, score: Batch) -> Batch:
        """dx/dt [B, ...] = f x - g^2 s / 2, the ODE of the marginals whose score at x is s (arXiv 2011.13456)."""
        return batch_mul(self.drift_coefficient(t), x) - batch_mul(0.5 * self.diffusion_sq(t), score)

    def prior_sampling(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
        """Draws from the prior N(0, prior_std^2 I)."""
        return self.prior_std * jax.random.normal(key, shape)

    def prior_logp(self, z: Batch) -> Float[Array, "B"]:
        """Log density [B] of z [B, ...] under the prior, in nats."""
        dim = math.prod(z.shape[1:])
        norm_sq = jnp.sum(jnp.square(z / self.prior_std).reshape(z.shape[0], -1), axis=-1)
        return -0.5 * norm_sq - dim * (0.5 * math.log(2 * math.pi) + math.log(self.prior_std))

    def log_snr(self, t: Array) -> Array:
        """lambda(t) = log(alpha^2 / sigma^2), strictly falling in t; elementwise."""
        return 2 * (self.log_alpha(t) - jnp.log(self.sigma(t)))

    def time_at_log_snr(self, log_snr: Array) -> Array:
        """Inverts lambda(t) for t in [1e-8, T], elementwise, by bisection in log t, as t may be near 0, and Newton."""
        low, high = jnp.full_like(log_snr, math.log(1e-8)), jnp.full_like(log_snr, math.log(self.T))

        def halve(_, bounds):
            low, high = bounds
            middle = 0.5 * (low + high)
            too_early = self.log_snr(jnp.exp(middle)) > log_snr
            return jnp.where(too_early, middle, low), jnp.where(too_early, high, middle)

        low, high = jax.lax.fori_loop(0, 50 if log_snr.dtype == jnp.float64 else 26, halve, (low, high))
        t = jnp.exp(0.5 * (low + high))
        t = t + (log_snr - self.log_snr(t)) / _derivative(self.log_snr, t)
        return jnp.clip(t, 1e-8, self.T)

    def time(self, u: Array, eps: float, importance: bool) -> Array:
        """Maps u uniform in [0, 1] to t in [eps, T], elementwise: t is uniform or, if `importance`, lambda(t) is.

        The density of t is then proportional to g^2 / sigma^2 = -d lambda / dt (Song et al. 2021, arXiv 2101.09258).
        """
        if not importance:
            return eps + u * (self.T - eps)
        start, end = self.log_snr_range(eps, u.dtype)
        return jnp.clip(self.time_at_log_snr(start + u * (end - start)), eps, self.T)

    def inverse_time_density(self, t: PerExample, eps: float, importance: bool) -> PerExample:
        """1 / q(t) for the density q of `time`: T - eps, or (lambda(eps) - lambda(T)) sigma^2 / g^2."""
        if not importance:
            return jnp.full_like(t, self.T - eps)
        start, end = self.log_snr_range(eps, t.dtype)
        return (start - end) * jnp.square(self.sigma(t)) / self.diffusion_sq(t)

    def velocity_time(self, u: Array, eps: float, sigma_data: float) -> Array:
        """Maps u uniform in [0, 1] to t in [eps, T] whose log-SNR has a density ~ s(lambda + 2 ln S), elementwise.

        s is the logistic function, its integral softplus: softplus(lambda + 2 ln S) is uniform. S = sigma_data. With
        `velocity` networks each lambda then has the same weight in F (Zheng et al. 2023, arXiv 2305.03935).
        """
        start, end, shift = *self.log_snr_range(eps, u.dtype), 2 * math.log(sigma_data)
        first, last = jax.nn.softplus(start + shift), jax.nn.softplus(end + shift)
        y = first + u * (last - first)
        return jnp.clip(self.time_at_log_snr(y + jnp.log(-jnp.expm1(-y)) - shift), eps, self.T)

    def inverse_velocity_density(self, t: PerExample, eps: float, sigma_data: float) -> PerExample:
        """1 / q(lambda(t)) for the density q, over lambda, of `velocity_time`."""
        start, end, shift = *self.log_snr_range(eps, t.dtype), 2 * math.log(sigma_data)
        mass = jax.nn.softplus(start + shift) - jax.nn.softplus(end + shift)
        return mass / jax.nn.sigmoid(self.log_snr(t) + shift)

    def log_snr_range(self, eps: float, dtype: Any = jnp.float32) -> tuple[Array, Array]:
        """lambda(eps) and lambda(T). Their difference normalises the importance-weighted density of `time`."""
        return self.log_snr(jnp.asarray(eps, dtype)), self.log_snr(jnp.asarray(self.T, dtype))

    def discretize(self, x: Batch, t: PerExample) -> tuple[Batch, PerExample]:
        """f [B, ...] and G [B] of one of N forward steps x + f + G z, by Euler-Maruyama."""
        drift, diffusion = self.sde(x, t)
        return drift / self.N, diffusion / math.sqrt(self.N)

    def discrete_alpha(self, t: PerExample) -> PerExample:
        """The factor [B] of the Langevin correctors' step size: 1 - beta of DDPM's step at t, or 1 outside of VP."""
        return jnp.ones_like(t)

    def _step_index(self, t: Array) -> Array:
        return (t * (self.N - 1) / self.T).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class VPSDE(SDE):
    """Variance preserving, beta(t) linear from beta_min to beta_max (Song et al. 2021, arXiv 2011.13456)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def log_alpha(self, t: Array) -> Array:
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def sigma(self, t: Array) -> Array:
        return jnp.sqrt(-jnp.expm1(2 * self.log_alpha(t)))  # `expm1`: exact to float32 rounding down to t = 0

    @property
    def discrete_betas(self) -> Float[Array, "N"]:
        """The N betas of DDPM, from beta_min / N to beta_max / N."""
        return jnp.linspace(self.beta_min / self.N, self.beta_max / self.N, self.N)

    def discrete_alpha(self, t: PerExample) -> PerExample:
        return 1 - self.discrete_betas[self._step_index(t)]

    def discretize(self, x: Batch, t: PerExample) -> tuple[Batch, PerExample]:
        """f and G of DDPM's step: x_{i+1} = sqrt(1 - beta_i) x_i + sqrt(beta_i) z."""
        beta = self.discrete_betas[self._step_index(t)]
        return batch_mul(-beta / (1 + jnp.sqrt(1 - beta)), x), jnp.sqrt(beta)  # sqrt(1 - beta) - 1 without cancellation


@dataclasses.dataclass(frozen=True)
class subVPSDE(VPSDE):  # noqa: N801 - the field writes it so
    """Sub-variance preserving: the alpha of VP, sigma squared (Song et al. 2021, arXiv 2011.13456)."""

    def sigma(self, t: Array) -> Array:
        return -jnp.expm1(2 * self.log_alpha(t))

    def discretize(self, x: Batch, t: PerExample) -> tuple[Batch, PerExample]:
        """f and G by Euler-Maruyama, since DDPM's chain discretises VP alone."""
        return SDE.discretize(self, x, t)


@dataclasses.dataclass(frozen=True)
class VESDE(SDE):
    """Variance exploding. sigma is geometric from sigma_min to sigma_max, or t * sigma_max if `linear`."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    linear: bool = False

    @property
    def prior_std(self) -> float:
        return self.sigma_max

    @property
    def conditions_on_sigma(self) -> bool:
        return not self.linear  # as in the public code

    def log_alpha(self, t: Array) -> Array:
        return jnp.zeros_like(t)

    def sigma(self, t: Array) -> Array:
        if self.linear:
            return t * self.sigma_max
        return self.sigma_min * jnp.exp(t * math.log(self.sigma_max / self.sigma_min))

    @property
    def discrete_sigmas(self) -> Float[Array, "N"]:
        """The N noise levels of NCSN, rising from sigma_min to sigma_max."""
        if self.linear:
            return jnp.linspace(self.sigma_min, self.sigma_max, self.N)
        return jnp.exp(jnp.linspace(math.log(self.sigma_min), math.log(self.sigma_max), self.N))

    def discrete_sigma_pair(self, t: PerExample) -> tuple[PerExample, PerExample]:
        """The noise level [B] of NCSN's step at t and the level before it, which is 0 for the first."""
        index = self._step_index(t)
        return self.discrete_sigmas[index], jnp.where(index == 0, 0.0, self.discrete_sigmas[index - 1])

    def discretize(self, x: Batch, t: PerExample) -> tuple[Batch, PerExample]:
        """f and G of NCSN's step from one noise level to the next, or by Euler-Maruyama if `linear`."""
        if self.linear:
            return super().discretize(x, t)
        index = self._step_index(t)
        log_ratio = math.log(self.sigma_max / self.sigma_min) / (self.N - 1)
        # sqrt(sigma_i^2 - sigma_{i-1}^2) without cancellation; the first step starts from no noise
        share = jnp.where(index == 0, 1.0, math.sqrt(-math.expm1(-2 * log_ratio)))
        return jnp.zeros_like(x), share * self.discrete_sigmas[index]


@dataclasses.dataclass(frozen=True)
class LogSNRPath(SDE):
    """Processes whose log-SNR falls linearly in t between two ends (Zheng et al. 2023, arXiv 2305.03935)."""

    log_snr_min: float = -5.0
    log_snr_max: float = 13.3

    @property
    def prior_std(self) -> float:
        with jax.ensure_compile_time_eval():
            return float(self.sigma(jnp.asarray(self.T)))

    def log_snr(self, t: Array) -> Array:
        return self.log_snr_max + t * (self.log_snr_min - self.log_snr_max)

    def time_at_log_snr(self, log_snr: Array) -> Array:
        return jnp.clip((self.log_snr_max - log_snr) / (self.log_snr_max - self.log_snr_min), 0, self.T)


@dataclasses.dataclass(frozen=True)
class VPLogSNR(LogSNRPath):
    """Variance preserving: alpha^2 and sigma^2 are the logistic function of lambda and of -lambda."""

    def log_alpha(self, t: Array) -> Array:
        return -0.5 * jax.nn.softplus(-self.log_snr(t))

    def sigma(self, t: Array) -> Array:
        return jnp.exp(-0.5 * jax.nn.softplus(self.log_snr(t)))


@dataclasses.dataclass(frozen=True)
class StraightPath(LogSNRPath):
    """alpha + sigma = 1, so that x_t lies on the straight line from data to noise (Lipman et al. 2023)."""

    def log_alpha(self, t: Array) -> Array:
        return -jax.nn.softplus(-0.5 * self.log_snr(t))

    def sigma(self, t: Array) -> Array:
        return jax.nn.sigmoid(-0.5 * self.log_snr(t))


# A value of `training.sde` -> the process with the constants of `config.model`
SDES: dict[str, Callable[[Any], SDE]] = {
    "vpsde": lambda model: VPSDE(model.num_scales, model.beta_min, model.beta_max),
    "subvpsde": lambda model: subVPSDE(model.num_scales, model.beta_min, model.beta_max),
    "vesde": lambda model: VESDE(model.num_scales, model.sigma_min, model.sigma_max),
    "linearvesde": lambda model: VESDE(model.num_scales, model.sigma_min, model.sigma_max, linear=True),
    "vp_log_snr": lambda model: VPLogSNR(model.num_scales, model.log_snr_min, model.log_snr_max),
    "straight": lambda model: StraightPath(model.num_scales, model.log_snr_min, model.log_snr_max),
}


def from_config(config: Any) -> SDE:
    """The process named by `config.training.sde`, with the constants of `config.model`. UserError if it is unknown."""
    name = config.training.sde.lower()
    if name not in SDES:
        raise UserError(f"training.sde={config.training.sde!r} is unknown; use one of {', '.join(SDES)}")
    return SDES[name](config.model)
