# SPDX-License-Identifier: Apache-2.0
"""Denoising score matching of orders 1, 2 and 3 (Lu et al. 2022, arXiv 2206.08265), per example, and the training step.

The notation is the paper's: x = alpha x0 + sigma z, s = s_theta(x, t), J = ds/dx, v a probe with E[v v^T] = I, D the
number of dimensions, c = z + sigma sg(s), sg the stop-gradient. A power of sigma keeps every loss O(1) at all t.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from errors import UserError
from sde_lib import SDE, Batch, PerExample, ScoreFn, batch_mul, score_and_jacobian

PyTree = Any
# (params, model_state, dropout keys [B]) -> score function
ScoreFnOfParams = Callable[[PyTree, PyTree, Array], ScoreFn]
# (params, model_state, x0 [B, ...], example index in the global batch [B], key) -> (mean loss, terms [B] by name)
LossFn = Callable[[PyTree, PyTree, Array, Array, PRNGKeyArray], tuple[Array, dict[str, Array]]]

sg = jax.lax.stop_gradient


class DSMLosses(NamedTuple):
    """The terms, each [B] and unweighted. A term above the requested order is 0, as is `second_trace` if exact."""

    first: PerExample
    second_trace: PerExample
    second_frobenius: PerExample
    third: PerExample


def dsm_losses(
    sde: SDE, score_fn: ScoreFn, x0: Batch, t: PerExample, z: Batch, v: Batch | None, order: int, exact: bool = False
) -> DSMLosses:
    """Computes the denoising score matching losses up to `order` (Lu et al. 2022, section 4), per example.

    first = mean_D (sigma s + z)^2
    second_trace = ((sigma^2 v.Jv + v.v - (c.v)^2) / D)^2
    second_frobenius = |sigma^2 Jv + v - (c.v) c|^2 / D^2
    third = |sigma^3 grad_x(v.Jv) + (c.v)^2 c - (sigma^2 sg(v.Jv) + v.v) c - 2 (c.v)(sigma^2 sg(Jv) + v)|^2 / D^3

    `exact` replaces v v^T by its mean I, with Jacobians by `jax.jacfwd` (D + 1 passes, for small D):
    second_frobenius = mean over D^2 entries of (sigma^2 J + I - c c^T)^2
    third = mean_D (sigma^3 grad tr J + |c|^2 c - (sigma^2 sg(tr J) + D) c - 2 (sigma^2 sg(J) + I) c)^2

    Args:
        score_fn: must treat the examples of the batch independently, as networks without batch normalisation do.
        x0: clean data. t: times in (0, T]. z: the noise of the forward process.
        v: probe with E[v v^T] = I; Rademacher in the paper. May be None at order 1 and if `exact`, which do not use it.
    Raises:
        ValueError: order other than 1, 2, 3, or no probe where one is needed.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"score matching order {order} is unknown; use 1, 2 or 3")
    if v is None and order > 1 and not exact:
        raise ValueError(f"score matching order {order} needs a probe v, or exact=True")
    batch, dim = x0.shape[0], math.prod(x0.shape[1:])
    mean, std = sde.marginal_prob(x0, t)
    sigma = std[:, None]  # [B, 1]
    x, z = (mean + batch_mul(std, z)).reshape(batch, dim), z.reshape(batch, dim)
    v = None if exact or v is None else v.reshape(batch, dim)

    def score(x):
        return score_fn(x.reshape(x0.shape), t).reshape(batch, dim)

    s, derivative, gradient = _derivatives(score, x, v, order)
    first, zero = jnp.mean(jnp.square(sigma * s + z), axis=-1), jnp.zeros(batch, x.dtype)
    if order == 1:
        return DSMLosses(first, zero, zero, zero)
    c = z + sigma * sg(s)
    if exact:
        return DSMLosses(first, zero, *_exact_losses(sigma, c, derivative, gradient))
    return DSMLosses(first, *_probe_losses(sigma, c, v, derivative, gradient))


def _derivatives(score, x, v, order):
    """s; J v, or J without v; and grad_x (v . J v), or grad_x tr J. None for what the order does not need."""

    def form(x):
        if v is None:
            s, jac = score_and_jacobian(score, x)
            return jnp.sum(jnp.trace(jac, axis1=1, axis2=2)), (s, jac)
        s, jv = jax.jvp(score, (x,), (v,))
        return jnp.sum(v * jv), (s, jv)

    if order == 1:
        return score(x), None, None
    if order == 2:
        return *form(x)[1], None
    gradient, (s, first) = jax.grad(form, has_aux=True)(x)
    return s, first, gradient


def _inner(a: Float[Array, "B D"], b: Float[Array, "B D"]) -> Float[Array, "B 1"]:
    return jnp.sum(a * b, axis=-1, keepdims=True)


def _probe_losses(sigma, c, v, jv, grad_vjv):
    """second_trace, second_frobenius and third, each [B]. The third is 0 without its gradient."""
    dim = c.shape[-1]
    cv, vv, vjv = _inner(c, v), _inner(v, v), _inner(v, jv)  # [B, 1]
    second_trace = jnp.square((sigma**2 * vjv + vv - cv**2) / dim)[:, 0]
    second_frobenius = jnp.mean(jnp.square(sigma**2 * jv + v - cv * c), axis=-1) / dim
    if grad_vjv is None:
        return second_trace, second_frobenius, jnp.zeros_like(second_trace)
    residual = sigma**3 * grad_vjv + cv**2 * c - (sigma**2 * sg(vjv) + vv) * c - 2 * cv * (sigma**2 * sg(jv) + v)
    return second_trace, second_frobenius, jnp.mean(jnp.square(residual), axis=-1) / dim**2


def _exact_losses(sigma, c, jac, grad_trace):
    """second_frobenius and third, each [B]. The third is 0 without its gradient."""
    hessian = sigma[..., None] ** 2 * jac + jnp.eye(c.shape[-1], dtype=c.dtype)  # sigma^2 J + I  [B, D, D]
    second = jnp.mean(jnp.square(hessian - c[:, :, None] * c[:, None, :]), axis=(1, 2))
    if grad_trace is None:
        return second, jnp.zeros_like(second)
    hessian = sg(hessian)
    trace = jnp.trace(hessian, axis1=1, axis2=2)[:, None]  # sigma^2 tr J + D
    residual = sigma**3 * grad_trace + _inner(c, c) * c - trace * c - 2 * jnp.einsum("bij,bj->bi", hessian, c)  # [B, D]
    return second, jnp.mean(jnp.square(residual), axis=-1)


class Draws(NamedTuple):
    """The randomness of the loss of a batch."""

    t: PerExample
    z: Batch
    v: Batch


def draw(
    key: PRNGKeyArray,
    index: Int[Array, "B"],
    shape: tuple[int, ...],
    time: Callable[[Array], Array],
    antithetic: int = 0,
) -> Draws:
    """Draws time, noise and Rademacher probe of each example as a function of (key, index) alone, on any device.

    time: maps u uniform in [0, 1] to t. antithetic: 0, or the size B of the global batch, whose examples then share one
    u0 in u = (u0 + index / B) mod 1 (Kingma et al. 2021, arXiv 2107.00630, appendix I.1).
    """

    def draw_one(i):
        t_key, z_key, v_key = jax.random.split(jax.random.fold_in(key, i), 3)
        z = jax.random.normal(z_key, shape)
        return jax.random.uniform(t_key), z, jax.random.rademacher(v_key, shape, z.dtype)

    u, z, v = jax.vmap(draw_one)(index)
    if antithetic:
        u = (jax.random.uniform(key) + index / antithetic) % 1.0
    return Draws(time(u), z, v)


# (sde, t [B]) -> w(t) [B], the factor on `DSMLosses.first`
Weighting = Callable[[SDE, Array], Array]
# (sde, score function, x0 [B, ...], draws) -> [B]
Term = Callable[[SDE, ScoreFn, Array, Draws], Array]


def uniform_weight(sde: SDE, t: PerExample) -> PerExample:
    """1. With importance weighting, t already has a density proportional to g^2 / sigma^2."""
    return jnp.ones_like(t)


def likelihood_weight(sde: SDE, t: PerExample) -> PerExample:
    """g^2 / sigma^2 (Song et al. 2021, arXiv 2101.09258)."""
    return sde.diffusion_sq(t) / jnp.square(sde.sigma(t))


# A new weighting: one function and its line here. Its name is a value of `training.weighting`.
WEIGHTINGS: dict[str, Weighting] = {"uniform": uniform_weight, "likelihood": likelihood_weight}

# A further term is one function and its line here. Its factor in the objective is the key `training.<name>_weight`; at
# 0 the term is not computed. Orders 1 to 3 share their derivatives: `dsm_losses`.
TERMS: dict[str, Term] = {}


def get_weighting(training_config: Any) -> Weighting:
    """Returns the weighting of the first order. Raises UserError if `config.training` names an unknown one."""
    by_likelihood = training_config.likelihood_weighting and not training_config.importance_weighting
    name = training_config.weighting or ("likelihood" if by_likelihood else "uniform")
    if name not in WEIGHTINGS:
        raise UserError(f"training.weighting={name!r} is unknown; use one of {', '.join(WEIGHTINGS)}")
    return WEIGHTINGS[name]


def get_times(
    training_config: Any, sde: SDE, sigma_data: float
) -> tuple[Callable[[Array], Array], Callable[[PerExample], PerExample]]:
    """Returns t(u) for u uniform in [0, 1], and the factor w(t) on all terms of the objective.

    With `training.time_sampling` the mean of w L(t) is that of L over lambda from smallest_time to T, whatever L and
    the sampling are: the weight of the likelihood (Kingma et al. 2021, arXiv 2107.00630). Without it w = 1, and t is as
    in the public code.
    """
    eps, name = training_config.smallest_time, training_config.time_sampling
    if name == "velocity":

        def share(t):
            start, end = sde.log_snr_range(eps, t.dtype)
            return sde.inverse_velocity_density(t, eps, sigma_data) / (start - end)

        return lambda u: sde.velocity_time(u, eps, sigma_data), share
    importance = training_config.likelihood_weighting and training_config.importance_weighting
    by_log_snr = importance if not name else name == "log_snr"

    def factor(t):
        if name != "uniform":
            return jnp.ones_like(t)
        return sde.inverse_time_density(t, eps, False) / sde.inverse_time_density(t, eps, True)

    return lambda u: sde.time(u, eps, by_log_snr), factor


def term_weights(training_config: Any, dim: int) -> dict[str, float]:
    """The factor of each term of the objective for data of `dim` dimensions, by name; 0 for terms above the order.

    `training.third_order_scaling` = dimension multiplies the third's by `dim`, which keeps its share of the gradient
    (docs/math.md). Of the members of TERMS those with a factor of 0 are left out.
    """
    order = training_config.score_matching_order
    weights = {"first": 1.0, "second": 0.0, "third": 0.0}
    if order >= 2:
        weights["second"] = training_config.second_order_weight
    if order >= 3:
        scale = dim if training_config.third_order_scaling == "dimension" else 1
        weights["third"] = scale * training_config.third_order_weight
    return weights | {name: weight for name in TERMS if (weight := training_config[f"{name}_weight"])}


def get_loss_fn(
    training_config: Any,
    sde: SDE,
    score_fn_of_params: ScoreFnOfParams,
    sigma_data: float = 1.0,
    antithetic: int = 0,
) -> LossFn:
    """Makes the training objective of `config.training`: the batch mean of w L1 + w2 L2 + w3 L3 + further terms.

    sigma_data: S of `training.time_sampling` = velocity. antithetic: see `draw`.

    The function returns the scalar mean loss and the terms [B]: `loss`, `first` (with its weight w), `second` and
    `third` (without w2, w3), and the members of TERMS whose factor is not 0 (without it). All of them have the factor
    of `get_times`.
    """
    order = training_config.score_matching_order
    weighting, (time, factor) = get_weighting(training_config), get_times(training_config, sde, sigma_data)
    exact, reduce_mean = training_config.exact_jacobian, training_config.reduce_mean  # False: order 1 only

    def loss_fn(params, model_state, x0, index, key):
        draw_key, dropout_key = jax.random.split(key)
        draws = draw(draw_key, index, x0.shape[1:], time, antithetic)
        dropout_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(dropout_key, index)
        score_fn = score_fn_of_params(params, model_state, dropout_keys)
        w = factor(draws.t)
        terms = DSMLosses(*(w * term for term in dsm_losses(sde, score_fn, x0, *draws, order, exact)))
        first, dim = terms.first * weighting(sde, draws.t), math.prod(x0.shape[1:])
        weights = term_weights(training_config, dim)
        if not reduce_mean:
            first = 0.5 * dim * first
        second = terms.second_trace + terms.second_frobenius
        further = {name: w * TERMS[name](sde, score_fn, x0, draws) for name in weights if name in TERMS}
        values = {"first": first, "second": second, "third": terms.third, **further}
        loss = sum(weight * values[name] for name, weight in weights.items())
        return jnp.mean(loss), {"loss": loss, **values}

    return loss_fn


@flax.struct.dataclass
class TrainState:
    """Everything that training changes. The randomness of a step is `fold_in(key, step)`."""

    step: Any  # int32 []; with a leading axis of devices inside the loop, numpy when saved
    params: PyTree
    ema_params: PyTree
    opt_state: PyTree
    model_state: PyTree
    key: Any  # uint32 [2]


def get_optimizer(optim_config: Any) -> optax.GradientTransformation:
    """Adam after clipping the gradient by its GLOBAL norm; a negative `grad_clip` does not clip.

    The learning rate is lr min(step / warmup, 1), which is 0 at the very first step, as in the public code.
    """
    c = optim_config
    clip = optax.clip_by_global_norm(c.grad_clip) if c.grad_clip >= 0 else optax.identity()
    schedule = optax.linear_schedule(0.0, c.lr, c.warmup) if c.warmup else optax.constant_schedule(c.lr)
    return optax.chain(clip, optax.adamw(schedule, c.beta1, c.beta2, c.eps, weight_decay=c.weight_decay))


def _mean_over_parts(fun: Callable[..., PyTree], num_parts: int, *arrays: Array) -> PyTree:
    """Mean of `fun` over `num_parts` equal parts of arrays [B, ...], taken one after another in the memory of one."""
    if num_parts == 1:
        return fun(*arrays)
    parts = [x.reshape(num_parts, -1, *x.shape[1:]) for x in arrays]
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(fun, *(x[0] for x in parts)))
    total, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, fun(*part)), None), zeros, parts)
    return jax.tree.map(lambda x: x / num_parts, total)


def get_step_fn(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    ema_rate: float,
    axis_name: str | None = "batch",
    num_microbatches: int = 1,
) -> Callable[[TrainState, Array], tuple[TrainState, dict[str, Array]]]:
    """Makes one optimiser step (state, x0 [B, ...]) -> (state, metrics), to be scanned in a pmap over `axis_name`.

    Metrics are scalars: the batch means of the loss terms, `grad_norm` before clipping and `skipped`. An example's
    randomness follows from the step and its place in the global batch, so the number of devices does not change the
    result. A step whose loss or gradient is not finite changes nothing but `step`; `skipped` is then 1, else 0.
    The gradient is the mean over `num_microbatches` parts of the batch, a divisor of B, in the memory of one.
    """

    def step_fn(state, x0):
        device = jax.lax.axis_index(axis_name) if axis_name else 0
        index = device * x0.shape[0] + jnp.arange(x0.shape[0])
        key = jax.random.fold_in(state.key, state.step)

        def grads_and_metrics(x0, index):
            grads, terms = jax.grad(loss_fn, has_aux=True)(state.params, state.model_state, x0, index, key)
            return grads, jax.tree.map(jnp.mean, terms)

        grads, metrics = _mean_over_parts(grads_and_metrics, num_microbatches, x0, index)
        if axis_name:
            grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
        metrics["grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = optax.incremental_update(params, state.ema_params, 1 - ema_rate)
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        stepped = state.replace(params=params, ema_params=ema_params, opt_state=opt_state)
        state = jax.tree.map(lambda new, old: jnp.where(good, new, old), stepped, state)
        return state.replace(step=state.step + 1), {**metrics, "skipped": 1.0 - good}

    return step_fn


def get_term_gradients_fn(loss_fn: LossFn, weights: Mapping[str, float]) -> Callable[..., PyTree]:
    """Makes the gradients of the terms' means, times their weights, with the arguments of `loss_fn`.

    They have a leading axis of terms. One forward pass serves all.
    """

    def gradients(params, model_state, x0, index, key):
        def means(params):
            _, terms = loss_fn(params, model_state, x0, index, key)
            return jnp.stack([weight * jnp.mean(terms[name]) for name, weight in weights.items()])

        values, pull = jax.vjp(means, params)
        return jax.lax.map(lambda direction: pull(direction)[0], jnp.eye(len(weights), dtype=values.dtype))

    return gradients


def get_grad_shares_fn(
    loss_fn: LossFn, weights: Mapping[str, float], axis_name: str | None = "batch", num_microbatches: int = 1
) -> Callable[[TrainState, Array], dict[str, Array]]:
    """Makes (state, x0 [B, ...]) -> `grad_share/<term>`: the norm of the term's gradient, over the sum of these norms.

    weights: `term_weights`; a term with 0 is left out. The gradients are those of the weighted terms' means over the
    global batch, with the draws of the state's next step.
    """
    weights = {name: weight for name, weight in weights.items() if weight}
    gradients = get_term_gradients_fn(loss_fn, weights)

    def shares_fn(state, x0):
        device = jax.lax.axis_index(axis_name) if axis_name else 0
        index = device * x0.shape[0] + jnp.arange(x0.shape[0])
        key = jax.random.fold_in(state.key, state.step)
        of_part = functools.partial(gradients, state.params, state.model_state, key=key)
        total = _mean_over_parts(of_part, num_microbatches, x0, index)
        norms = jax.vmap(optax.tree.norm)(jax.lax.pmean(total, axis_name) if axis_name else total)
        return {f"grad_share/{name}": share for name, share in zip(weights, norms / jnp.sum(norms), strict=True)}

    return shares_fn
