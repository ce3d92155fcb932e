# SPDX-License-Identifier: Apache-2.0
"""The diffusion processes: x_t = alpha(t) x_0 + sigma(t) z, with z ~ N(0, I) and t in [0, 1].

A process is its two functions log alpha(t) and sigma(t) and the standard deviation of its prior. Drift, diffusion,
log-SNR and its inverse are derived from those in the base class (Kingma et al. 2021, arXiv 2107.00630), so a
new process is two methods. Instances are frozen dataclasses: hashable, so static arguments of `jax.jit`.

`sigma` uses `expm1` and is exact to float32 rounding down to t = 0. The public code of the paper switches to a Taylor
series where |log alpha| <= 1e-3 and is off by up to 5e-4 relative there.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from errors import UserError

Time = Float[Array, "B"]
State = Float[Array, "B *shape"]
ScoreFn = Callable[[Array, Array], Array]  # (x [B, ...], t [B]) -> score [B, ...]


def batch_mul(a: Float[Array, "B"], x: State) -> State:
    """Multiplies each example of x [B, ...] by its own factor a [B]."""
    return a.reshape(a.shape + (1,) * (x.ndim - a.ndim)) * x


def _derivative(fn: Callable[[Array], Array], t: Array) -> Array:
    return jax.jvp(fn, (t,), (jnp.ones_like(t),))[1]


@dataclasses.dataclass(frozen=True)
class SDE:
    """Base class. A subclass defines `log_alpha(t)` and `sigma(t)`, elementwise in t, and may override `prior_std`."""

    N: int = 1000  # discretisation steps of the ancestral samplers

    T = 1.0  # end of time, the same for every process

    @property
    def prior_std(self) -> float:
        """Standard deviation of the prior that stands in for the marginal at T."""
        return 1.0

    @property
    def conditions_on_sigma(self) -> bool:
        """Whether the U-Net is told sigma(t), for noise that spans orders of magnitude, instead of 999 t."""
        return False

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

    def marginal_prob(self, x: State, t: Time) -> tuple[State, Time]:
        """Mean [B, ...] and standard deviation [B] of x_t given x_0 = x [B, ...]."""
        return batch_mul(self.alpha(t), x), self.sigma(t)

    def sde(self, x: State, t: Time) -> tuple[State, Time]:
        """Drift [B, ...] and diffusion coefficient g(t) [B] of dx = f x dt + g dw."""
        return batch_mul(self.drift_coefficient(t), x), jnp.sqrt(self.diffusion_sq(t))

    def probability_flow(self, x: State, t: Time, score: State) -> State:
        """dx/dt [B, ...] = f x - g^2 s / 2: the ODE of the marginals, whose score at x is s (arXiv 2011.13456)."""
        return batch_mul(self.drift_coefficient(t), x) - batch_mul(0.5 * self.diffusion_sq(t), score)

    def prior_sampling(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
        """Draws from the prior N(0, prior_std^2 I)."""
        return self.prior_std * jax.random.normal(key, shape)

    def prior_logp(self, z: State) -> Float[Array, "B"]:
        """Log density [B] of z [B, ...] under the prior, in nats."""
        dim = math.prod(z.shape[1:])
        norm_sq = jnp.sum(jnp.square(z / self.prior_std).reshape(z.shape[0], -1), axis=-1)
        return -0.5 * norm_sq - dim * (0.5 * math.log(2 * math.pi) + math.log(self.prior_std))

    def log_snr(self, t: Array) -> Array:
        """lambda(t) = log(alpha^2 / sigma^2), strictly falling in t; elementwise."""
        return 2 * (self.log_alpha(t) - jnp.log(self.sigma(t)))

    def time_at_log_snr(self, log_snr: Array) -> Array:
        """The t in [1e-8, T] at which `log_snr` is reached, elementwise; values outside are clipped to the ends.

        Bisection in log t, where float32 is relatively as fine near 0 as near 1, then one Newton step in t.
        """
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
        """Maps u uniform in [0, 1] to a time in [eps, T], elementwise: uniform, or importance weighted."""
        return self.importance_weighted_time(u, eps) if importance else eps + u * (self.T - eps)

    def inverse_time_density(self, t: Time, eps: float, importance: bool) -> Time:
        """1 / q(t) of `time`: T - eps, or (lambda(eps) - lambda(T)) sigma^2 / g^2."""
        if not importance:
            return jnp.full_like(t, self.T - eps)
        start, end = self.log_snr_range(eps, t.dtype)
        return (start - end) * jnp.square(self.sigma(t)) / self.diffusion_sq(t)

    def importance_weighted_time(self, u: Array, eps: float) -> Array:
        """Maps u uniform in [0, 1] to t in [eps, T] with density proportional to g^2 / sigma^2 = -d lambda / dt.

        Lambda is then uniform (Song et al. 2021, arXiv 2101.09258). u = 0 gives eps. Elementwise.
        """
        u = jnp.asarray(u)
        start, end = self.log_snr_range(eps, u.dtype)
        return jnp.clip(self.time_at_log_snr(start + u * (end - start)), eps, self.T)

    def log_snr_range(self, eps: float, dtype: Any = jnp.float32) -> tuple[Array, Array]:
        """lambda(eps) and lambda(T). Their difference normalises the density of `importance_weighted_time`."""
        return self.log_snr(jnp.asarray(eps, dtype)), self.log_snr(jnp.asarray(self.T, dtype))

    def discretize(self, x: State, t: Time) -> tuple[State, Time]:
        """f [B, ...] and G [B] of one forward step x + f + G z of N; here Euler-Maruyama."""
        drift, diffusion = self.sde(x, t)
        return drift / self.N, diffusion / math.sqrt(self.N)

    def discrete_alpha(self, t: Time) -> Time:
        """The factor [B] of the Langevin correctors' step size: 1 - beta of DDPM's step at t, 1 where there is none."""
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
        return jnp.sqrt(-jnp.expm1(2 * self.log_alpha(t)))

    @property
    def discrete_betas(self) -> Float[Array, "N"]:
        """The N betas of DDPM, from beta_min / N to beta_max / N."""
        return jnp.linspace(self.beta_min / self.N, self.beta_max / self.N, self.N)

    def discrete_alpha(self, t: Time) -> Time:
        return 1 - self.discrete_betas[self._step_index(t)]

    def discretize(self, x: State, t: Time) -> tuple[State, Time]:
        """DDPM's step: x_{i+1} = sqrt(1 - beta_i) x_i + sqrt(beta_i) z."""
        beta = self.discrete_betas[self._step_index(t)]
        return batch_mul(-beta / (1 + jnp.sqrt(1 - beta)), x), jnp.sqrt(beta)  # sqrt(1 - beta) - 1 without cancellation


@dataclasses.dataclass(frozen=True)
class subVPSDE(VPSDE):  # noqa: N801 - the field writes it so
    """Sub-variance preserving: the alpha of VP, sigma squared (Song et al. 2021, arXiv 2011.13456)."""

    def sigma(self, t: Array) -> Array:
        return -jnp.expm1(2 * self.log_alpha(t))

    def discretize(self, x: State, t: Time) -> tuple[State, Time]:
        """Euler-Maruyama: DDPM's chain discretises VP alone."""
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

    def discrete_sigma_pair(self, t: Time) -> tuple[Time, Time]:
        """The noise level [B] of NCSN's step at t and the one before it, 0 before the first."""
        index = self._step_index(t)
        return self.discrete_sigmas[index], jnp.where(index == 0, 0.0, self.discrete_sigmas[index - 1])

    def discretize(self, x: State, t: Time) -> tuple[State, Time]:
        """NCSN's step from one noise level to the next; Euler-Maruyama if `linear`."""
        if self.linear:
            return super().discretize(x, t)
        index = self._step_index(t)
        log_ratio = math.log(self.sigma_max / self.sigma_min) / (self.N - 1)
        # sqrt(sigma_i^2 - sigma_{i-1}^2) without cancellation; the first step starts from no noise
        share = jnp.where(index == 0, 1.0, math.sqrt(-math.expm1(-2 * log_ratio)))
        return jnp.zeros_like(x), share * self.discrete_sigmas[index]


def _vp(cls, model):
    return cls(N=model.num_scales, beta_min=model.beta_min, beta_max=model.beta_max)


def _ve(linear, model):
    return VESDE(N=model.num_scales, sigma_min=model.sigma_min, sigma_max=model.sigma_max, linear=linear)


SDES: dict[str, Callable[[Any], SDE]] = {
    "vpsde": functools.partial(_vp, VPSDE),
    "subvpsde": functools.partial(_vp, subVPSDE),
    "vesde": functools.partial(_ve, False),
    "linearvesde": functools.partial(_ve, True),
}


def from_config(config: Any) -> SDE:
    """The process named by `config.training.sde` with the constants of `config.model`; UserError if unknown."""
    name = config.training.sde.lower()
    if name not in SDES:
        raise UserError(f"training.sde={config.training.sde!r} is unknown; use one of {', '.join(SDES)}")
    return SDES[name](config.model)
