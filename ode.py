# SPDX-License-Identifier: Apache-2.0
"""Adaptive Runge-Kutta 4(5) on the device, with a step size for each example, and Adams-Bashforth on an even grid.

The formulae are those of Dormand & Prince 1980, "A family of embedded Runge-Kutta formulae". Hairer, Norsett & Wanner,
"Solving Ordinary Differential Equations I", sec. II.4, give starting step and step control. The constants and so the
steps are those of `scipy.integrate.RK45`. There is no dense output, no event and no gradient through the solver.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from errors import UserError

SAFETY, MIN_FACTOR, MAX_FACTOR = 0.9, 0.2, 10.0
SUCCESS, STEP_LIMIT, BREAKDOWN = 0, 1, 2
STARTING_EVALUATIONS = 11  # `adams_bashforth` adds them to its one a step

# Stages 2 to 7 of the tableau. The last row is also b: stage 7 is the next step's stage 1 (FSAL).
NODES = np.array([1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1])
STAGES = np.array(
    [
        [1 / 5, 0, 0, 0, 0, 0, 0],
        [3 / 40, 9 / 40, 0, 0, 0, 0, 0],
        [44 / 45, -56 / 15, 32 / 9, 0, 0, 0, 0],
        [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729, 0, 0, 0],
        [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656, 0, 0],
        [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0],
    ]
)
ERROR = np.array([-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40])

Rows = Float[Array, "B n"]
Derivative = Callable[[Float[Array, "B"], Any], Any]  # (t [B], y) -> dy/dt with the structure of y
Flow = Callable[[Float[Array, "B"], Rows], Rows]


class Stats(NamedTuple):
    """Evaluations of the right-hand side, steps taken, steps tried in vain and how it ended, each per example.

    status: 0 at t1; 1 at the step limit; 2 at a state that is not finite, or a step below the spacing of t.
    """

    nfe: Int[Array, "B"]
    accepted: Int[Array, "B"]
    rejected: Int[Array, "B"]
    status: Int[Array, "B"]


class _Loop(NamedTuple):
    t: Array  # [B]
    y: Array  # [B, n]
    f: Array  # [B, n], fun(t, y)
    h: Array  # [B], size of the next step, positive
    retry: Array  # [B], the last trial was rejected
    accepted: Array
    rejected: Array
    status: Array


def rk45(
    fun: Derivative,
    y0: Any,
    t0: ArrayLike,
    t1: ArrayLike,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 20_000,
    second_stage: Derivative | None = None,
) -> tuple[Any, Stats]:
    """Solves dy/dt = fun(t, y), y(t0) = y0, up to t1 for independent examples, each with its own t, h and acceptance.

    Args:
        fun: (t [B], y) -> dy/dt with the structure of y. Row i may depend on t[i] and row i of y only.
        y0: a pytree of float arrays, each [B, ...].
        t0, t1: scalars or [B]; t1 may lie before t0.
        rtol, atol: tolerances of the error of one step, see `_trial`.
        max_steps: limit on accepted + rejected steps of one example.
        second_stage: replaces `fun` at the second stage of every step. That stage has weight 0 in y_new and in the
            error, so it may return 0 for the entries of y that no derivative depends on, and save their work.

    Returns:
        y(t1) in the structure of y0, and Stats with nfe = 2 + 6 (accepted + rejected). A failed example (status not 0)
        is NaN throughout, so that it cannot be taken for a result. Nothing is raised here.
    """
    y, t, t1, unravel = _flat(y0, t0, t1)

    def running(loop):
        return (loop.status == SUCCESS) & (loop.t != t1) & (loop.accepted + loop.rejected < max_steps)

    flows = _on_rows(fun, unravel), _on_rows(second_stage, unravel) if second_stage else None
    f, h = _starting_step(flows[0], t, y, t1, rtol, atol)
    zero = jnp.zeros(t.shape, jnp.int32)
    status = jnp.where(_finite(y) & _finite(f), zero, BREAKDOWN)
    end = jax.lax.while_loop(
        lambda loop: jnp.any(running(loop)),
        lambda loop: _trial(flows, loop, running(loop), t1, rtol, atol),
        _Loop(t, y, f, h, retry=zero > 0, accepted=zero, rejected=zero, status=status),
    )
    status = jnp.where((end.status == SUCCESS) & (end.t != t1), STEP_LIMIT, end.status)
    y1 = jnp.where((status == SUCCESS)[:, None], end.y, jnp.nan)
    return unravel(y1), Stats(2 + 6 * (end.accepted + end.rejected), end.accepted, end.rejected, status)


def adams_bashforth(fun: Derivative, y0: Any, t0: ArrayLike, t1: ArrayLike, *, steps: int) -> tuple[Any, Any]:
    """Solves dy/dt = fun(t, y), y(t0) = y0, by the third-order Adams-Bashforth formula in even steps.

    It takes two Dormand-Prince steps, then one evaluation a step: `steps` + STARTING_EVALUATIONS in all (Hairer et al.,
    sec. III.1). It suits a fun that is rough in t: between the ends every evaluation has the same weight, so the error
    is that of an average over an even grid.

    Args:
        fun, y0, t0, t1: as for `rk45`.
        steps: an even number, 4 or more; UserError for another.

    Returns:
        y(t1), and what the trapezoidal rule would add to it if every other evaluation were left out, both in the
        structure of y0. The latter is the size of the error for entries of y whose derivative is rough. It is large or
        not finite if the solve diverges.
    """
    if steps < 4 or steps % 2:
        raise UserError(f"an even grid takes an even number of steps, 4 or more, not {steps}")
    y, t, t1, unravel = _flat(y0, t0, t1)
    h, flow = (t1 - t) / steps, _on_rows(fun, unravel)

    def advance(state, n, y, f):
        _, recent, alternating = state
        weight = jnp.where(n % 2, -1, 1) * jnp.where(n == steps, 0.5, 1)
        return y, (f, *recent[:2]), alternating + weight * f

    def runge_kutta(n, state):
        y, f, _ = dormand_prince_step(flow, t + n * h, state[0], state[1][0], h)
        return advance(state, n + 1, y, f)

    def multistep(n, state):
        y, (f0, f1, f2), _ = state
        y += h[:, None] / 12 * (23 * f0 - 16 * f1 + 5 * f2)
        return advance(state, n + 1, y, flow(t + (n + 1) * h, y))

    f = flow(t, y)
    state = jax.lax.fori_loop(0, 2, runge_kutta, (y, (f, f, f), 0.5 * f))
    y, _, alternating = jax.lax.fori_loop(2, steps, multistep, state)
    return unravel(y), unravel(h[:, None] * alternating)


_ravel = jax.vmap(lambda tree: ravel_pytree(tree)[0])  # any structure of [B, ...] -> [B, n]


def _flat(y0, t0, t1):
    """y0 as [B, n], both times as [B], and the function from [B, n] back to the structure of y0."""
    unravel = jax.vmap(ravel_pytree(jax.tree.map(lambda leaf: leaf[0], y0))[1])
    y = _ravel(y0)
    t0, t1 = (jnp.broadcast_to(jnp.asarray(time, y.dtype), y.shape[:1]) for time in (t0, t1))
    return y, t0, t1, unravel


def _on_rows(fun, unravel):
    """`fun` with y and its result as [B, n]."""
    return lambda t, y: _ravel(fun(t, unravel(y)))


def _trial(flows, loop, running, t1, rtol, atol):
    """One trial step of every running example; the others stay as they are.

    norm = root mean square over the example's state of error / (atol + rtol max(|y|, |y_new|)). A norm below 1 accepts
    the step. The next h is h times 0.9 norm^(-1/5); this factor is clipped to [0.2, 10], and to 1 after a rejection.
    """
    t, y, direction = loop.t, loop.y, jnp.sign(t1 - loop.t)
    min_step = 10 * jnp.abs(jnp.nextafter(t, direction * jnp.inf) - t) + jnp.finfo(t.dtype).tiny
    h = jnp.where(loop.retry, loop.h, jnp.maximum(loop.h, min_step))
    broken = running & (h < min_step)
    active = running & ~broken
    t_new = t + direction * h
    t_new = jnp.where(direction * (t_new - t1) > 0, t1, t_new)
    step = jnp.where(active, t_new - t, 0)

    y_new, f_new, error = dormand_prince_step(flows[0], t, y, loop.f, step, second_stage=flows[1])
    norm = _rms(error / (atol + rtol * jnp.maximum(jnp.abs(y), jnp.abs(y_new))))
    # An overflowed state has an infinite scale, which would pass any error.
    norm = jnp.where(_finite(y_new) & jnp.isfinite(norm), norm, jnp.inf)
    factor = jnp.clip(SAFETY * norm ** (-1 / 5), MIN_FACTOR, MAX_FACTOR)
    factor = jnp.where(loop.retry, jnp.minimum(factor, 1), factor)
    accept, reject = active & (norm < 1), active & (norm >= 1)
    return _Loop(
        t=jnp.where(accept, t_new, t),
        y=jnp.where(accept[:, None], y_new, y),
        f=jnp.where(accept[:, None], f_new, loop.f),
        h=jnp.where(active, jnp.abs(step) * factor, h),
        retry=reject,
        accepted=loop.accepted + accept,
        rejected=loop.rejected + reject,
        status=jnp.where(broken, BREAKDOWN, loop.status),
    )


def dormand_prince_step(
    fun: Flow, t: Float[Array, "B"], y: Rows, f: Rows, h: Float[Array, "B"], *, second_stage: Flow | None = None
) -> tuple[Rows, Rows, Rows]:
    """y_new, fun(t + h, y_new) and the error estimate of y_new, for one step of signed size h with f = fun(t, y)."""
    h_column = h[:, None]
    nodes, stages, error = (jnp.asarray(table, y.dtype) for table in (NODES, STAGES, ERROR))

    def combine(weights, k):
        # Not a matrix product: accelerators round those to fewer bits.
        return h_column * jnp.sum(weights[:, None, None] * k, axis=0)

    def stage(i, k, fun=fun):
        return k.at[i + 1].set(fun(t + nodes[i] * h, y + combine(stages[i], k)))

    k = jnp.zeros((7, *y.shape), y.dtype).at[0].set(f)
    if second_stage:
        k = stage(0, k, second_stage)
    # A loop compiles a large network once and not six times.
    k = jax.lax.fori_loop(1 if second_stage else 0, 6, stage, k)
    return y + combine(stages[5], k), k[6], combine(error, k)


def _starting_step(fun, t, y, t1, rtol, atol):
    """fun(t, y) [B, n] and a first step size [B] from two evaluations (Hairer et al., sec. II.4)."""
    span, direction = jnp.abs(t1 - t), jnp.sign(t1 - t)
    scale = atol + rtol * jnp.abs(y)

    def euler_then_guess(carry, _):
        f, h = carry
        f = fun(t + direction * h, y + (direction * h)[:, None] * f)
        d0, d1 = _rms(y / scale), _rms(f / scale)
        h = jnp.minimum(jnp.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1), span)
        return (f, h), (f, h)

    # The first pass is an empty Euler step for f0 and h0; the second gives f1. One loop compiles one copy of fun.
    _, (f, h) = jax.lax.scan(euler_then_guess, (jnp.zeros_like(y), jnp.zeros_like(t)), length=2)
    (f0, f1), h0 = f, h[0]
    d1, d2 = _rms(f0 / scale), _rms((f1 - f0) / scale) / h0
    slope = jnp.maximum(d1, d2)
    h1 = jnp.where(slope <= 1e-15, jnp.maximum(1e-6, 1e-3 * h0), (0.01 / slope) ** (1 / 5))
    h = jnp.minimum(jnp.minimum(100 * h0, h1), span)
    return f0, jnp.where(jnp.isfinite(h), h, h0)


def _rms(x):
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=-1))


def _finite(x):
    return jnp.all(jnp.isfinite(x), axis=-1)
