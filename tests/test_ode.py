# SPDX-License-Identifier: Apache-2.0
"""ode.rk45 and ode.adams_bashforth against scipy's RK45, matrix exponentials and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.linalg import expm

from errors import UserError
from ode import adams_bashforth, dormand_prince_step, rk45


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def van_der_pol(t, y):
    """Stiffness 20, forced so that t matters; y [..., 2]."""
    return jnp.stack([y[..., 1], 20 * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0] + jnp.sin(t)], axis=-1)


def scipy_rk45(y0, t0, t1, tol):
    return solve_ivp(lambda t, y: np.asarray(van_der_pol(t, y)), (t0, t1), y0, method="RK45", rtol=tol, atol=tol)


@pytest.mark.parametrize(("t0", "t1", "tol"), [(0.0, 30.0, 1e-4), (0.0, 3.0, 1e-7), (1.0, 0.8, 1e-5)])
def test_takes_the_steps_of_scipy(x64, t0, t1, tol):
    """No rounding decides a step here: the counts stay as they are if y0 is changed by 1e-6."""
    expected = scipy_rk45(np.array([2.0, 0.5]), t0, t1, tol)
    y, stats = rk45(van_der_pol, jnp.array([[2.0, 0.5]]), t0, t1, rtol=tol, atol=tol)
    assert abs(int(stats.accepted[0]) - (len(expected.t) - 1)) <= 1
    assert abs(int(stats.nfe[0]) - expected.nfev) <= 12
    np.testing.assert_allclose(y[0], expected.y[:, -1], rtol=1e-2 * tol**0.5, atol=tol)


def test_first_same_as_last_spares_an_evaluation(x64):
    calls = []

    def fun(t, y):
        jax.debug.callback(lambda _: calls.append(1), t[0])
        return van_der_pol(t, y)

    _, stats = rk45(fun, jnp.array([[2.0, 0.5]]), 0.0, 2.0)
    jax.effects_barrier()
    assert stats.rejected[0] > 0
    assert len(calls) == stats.nfe[0] == 2 + 6 * (stats.accepted[0] + stats.rejected[0])


def random_matrix():
    return np.random.default_rng(0).normal(size=(4, 4))


def test_one_step_has_local_error_of_order_six(x64):
    matrix, y = random_matrix(), np.random.default_rng(1).normal(size=4)
    steps = 0.2 * 2.0 ** -np.arange(6)

    def fun(t, y):
        return y @ matrix.T

    y0 = jnp.tile(y, (6, 1))
    y1, f1, estimate = dormand_prince_step(fun, jnp.zeros(6), y0, fun(0, y0), jnp.asarray(steps))
    truth = np.stack([expm(h * matrix) @ y for h in steps])
    assert np.polyfit(np.log(steps), np.log(np.linalg.norm(y1 - truth, axis=-1)), 1)[0] == pytest.approx(6, abs=0.15)
    # The estimate is the distance to the solution of order 4.
    assert np.polyfit(np.log(steps), np.log(np.linalg.norm(estimate, axis=-1)), 1)[0] == pytest.approx(5, abs=0.15)
    np.testing.assert_allclose(f1, fun(0, y1), rtol=1e-14)


@pytest.mark.parametrize("direction", [1, -1])
def test_error_follows_the_tolerance(x64, direction):
    matrix, y = random_matrix(), np.random.default_rng(1).normal(size=(1, 4))
    truth = expm(2 * direction * matrix) @ y[0]
    for tol in (1e-4, 1e-7, 1e-10):
        y1, _ = rk45(lambda t, y: y @ matrix.T, jnp.asarray(y), 1, 1 + 2 * direction, rtol=tol, atol=tol)
        assert np.linalg.norm(y1[0] - truth) < 20 * tol * np.linalg.norm(truth)


def test_there_and_back_in_float32():
    y0 = jnp.array([[1.0, 0.0], [0.3, -2.0]])

    def rotate(t, y):
        return jnp.stack([y[:, 1], -y[:, 0]], axis=-1)

    y1, _ = rk45(rotate, y0, 0.0, jnp.array([1.0, 5.0]))
    assert y1.dtype == jnp.float32
    np.testing.assert_allclose(y1[1], [0.3 * np.cos(5) - 2 * np.sin(5), -0.3 * np.sin(5) - 2 * np.cos(5)], atol=2e-4)
    y2, _ = rk45(rotate, y1, jnp.array([1.0, 5.0]), 0.0)
    np.testing.assert_allclose(y2, y0, atol=3e-4)


def test_state_may_be_a_tree():
    state = {"x": jnp.full((3, 2, 2), 2.0), "log": (jnp.zeros(3),)}
    rate = jnp.array([0.5, 1.0, 2.0])

    def fun(t, y):
        return {"x": -rate[:, None, None] * y["x"], "log": (rate * jnp.cos(t),)}

    y, _ = jax.jit(lambda y: rk45(fun, y, 0.0, 1.5))(state)
    np.testing.assert_allclose(y["x"], jnp.broadcast_to(2 * np.exp(-1.5 * rate)[:, None, None], (3, 2, 2)), rtol=1e-4)
    np.testing.assert_allclose(y["log"][0], rate * np.sin(1.5), rtol=1e-4)


def test_neighbours_do_not_touch_a_result():
    def fun(t, y):  # y [B, 2]: a decay of rate y[:, 1], constant in t
        return jnp.stack([-y[:, 1] * (y[:, 0] - jnp.cos(t)), 0 * y[:, 1]], axis=-1)

    solve = jax.jit(lambda y: rk45(fun, y, 0.0, 3.0))
    easy = jnp.array([[0.5, 1.3]])
    stiff = jnp.stack([jnp.linspace(-4, 4, 15), jnp.linspace(200, 3000, 15)], axis=-1)
    alone, _ = solve(easy)
    batch, stats = solve(jnp.concatenate([stiff, easy]))
    others, other_stats = solve(jnp.concatenate([stiff[::-1] * jnp.array([-1, 0.5]), easy]))
    np.testing.assert_array_equal(batch[-1], others[-1])  # the same program
    for field, other_field in zip(stats, other_stats, strict=True):
        assert field[-1] == other_field[-1]
    np.testing.assert_allclose(batch[-1], alone[0], rtol=1e-5)  # another program
    assert stats.nfe[-1] < 100 and np.all(stats.nfe[:-1] > 600)  # 56, and 1310 or more
    assert len(set(np.asarray(stats.accepted).tolist())) > 10  # each has its own steps


def test_step_limit_is_reported_and_the_others_finish():
    y0 = jnp.array([[1.0, 1.0], [1.0, 5000.0], [2.0, 1.0]])

    def fun(t, y):
        return jnp.stack([-y[:, 1] * y[:, 0], 0 * y[:, 1]], axis=-1)

    y1, stats = rk45(fun, y0, 0.0, 1.0, max_steps=50)
    assert stats.status.tolist() == [0, 1, 0]
    assert stats.accepted[1] + stats.rejected[1] == 50
    assert np.isnan(y1[1]).all()
    np.testing.assert_allclose(y1[jnp.array([0, 2]), 0], np.exp(-1) * np.array([1, 2]), rtol=1e-4)


@pytest.mark.parametrize(
    ("fun", "bad_y0"),
    [
        (lambda t, y: y**2, 1.0),  # blows up at t = 1
        (lambda t, y: jnp.where((t[:, None] > 0.5) & (y > 0.9), jnp.nan, -0.1 * y), 1.0),
        (lambda t, y: -y, jnp.nan),
        (lambda t, y: jnp.where(y > 1e30, 2e37, -y), 3.2e38),  # the state overflows, its error does not
    ],
)
def test_breakdown_is_found_and_the_others_finish(fun, bad_y0):
    y1, stats = rk45(fun, jnp.array([[0.1], [bad_y0], [0.1]]), 0.0, 2.0)
    assert stats.status.tolist() == [0, 2, 0]
    assert np.isnan(y1[1]).all() and np.isfinite(y1[0]).all()
    np.testing.assert_allclose(y1[0], y1[2], rtol=1e-6)


def test_equal_ends_leave_the_state():
    y1, stats = rk45(lambda t, y: -y, jnp.ones((2, 1)), 0.5, jnp.array([0.5, 0.6]))
    assert y1[0] == 1 and stats.accepted[0] == 0 and stats.status.tolist() == [0, 0]


def test_a_quadrature_needs_no_derivative_at_the_second_stage(x64):
    """An integral beside the state: the same steps and result with anything for its derivative there; a state, not."""
    y0 = jnp.stack([jnp.linspace(-2, 2, 5), jnp.ones(5)], axis=-1), jnp.zeros(5)

    def fun(t, y, noise=0.0, shift=0.0):
        return van_der_pol(t, y[0]) + shift, y[0][:, 0] * jnp.cos(3 * t) + noise

    def solve(second_stage):
        return rk45(fun, y0, 0.0, 2.0, second_stage=second_stage)

    (state, integral), stats = solve(None)
    (same_state, same_integral), same_stats = solve(lambda t, y: fun(t, y, noise=1e3))
    # a change of y0 by 1e-8 leaves the counts as they are; one by 1e-15 moves the state by 4e-13
    np.testing.assert_array_equal(stats.nfe, same_stats.nfe)
    np.testing.assert_allclose(same_state, state, rtol=1e-11)
    np.testing.assert_allclose(same_integral, integral, rtol=1e-9)
    (other, _), _ = solve(lambda t, y: fun(t, y, shift=1e-2))
    assert np.max(np.abs(other - state)) > 1e-9


@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.5), (1.5, 0.0)])
def test_adams_bashforth_has_order_three(x64, t0, t1):
    """y' = A y cos t, so y(t1) = exp(A (sin t1 - sin t0)) y0; the error falls by 8 as the steps are halved."""
    matrix, y0 = random_matrix(), np.random.default_rng(1).normal(size=(2, 4))
    truth = y0 @ expm(matrix.T * (np.sin(t1) - np.sin(t0)))

    def fun(t, y):
        return jnp.cos(t)[:, None] * (y @ matrix.T)

    errors = [
        np.abs(adams_bashforth(fun, jnp.asarray(y0), t0, t1, steps=steps)[0] - truth).max() for steps in (64, 128, 256)
    ]
    assert errors[-1] < 1e-4
    np.testing.assert_allclose(np.log2(errors[:-1]) - np.log2(errors[1:]), 3, atol=0.15)


def test_adams_bashforth_is_the_formula(x64):
    """Six steps by hand, of a tree whose examples have their own times."""
    t0, t1 = np.array([0.0, 0.5]), np.array([1.2, -0.7])
    y0 = {"a": jnp.array([[1.0, 2.0], [0.5, -1.0]]), "b": jnp.array([0.0, 3.0])}

    def slope(t, a, b):
        return np.sin(t)[:, None] * a - b[:, None], np.cos(3 * t) + a.sum(1)

    def fun(t, y):
        return {
            "a": jnp.sin(t)[:, None] * y["a"] - y["b"][:, None],
            "b": jnp.cos(3 * t) + jnp.sum(y["a"], axis=1),
        }

    h = (t1 - t0) / 6
    a, b, slopes = np.asarray(y0["a"]), np.asarray(y0["b"]), []
    for n in range(6):
        t = t0 + n * h
        slopes.append(slope(t, a, b))
        if n < 2:
            a, b = solve_both(slope, t, t + h, a, b)
        else:
            (fa2, fb2), (fa1, fb1), (fa0, fb0) = slopes[-3:]
            a = a + h[:, None] / 12 * (23 * fa0 - 16 * fa1 + 5 * fa2)
            b = b + h / 12 * (23 * fb0 - 16 * fb1 + 5 * fb2)
    slopes.append(slope(t1, a, b))
    signs = np.array([0.5, -1, 1, -1, 1, -1, 0.5])
    y, alternating = adams_bashforth(fun, y0, t0, t1, steps=6)
    np.testing.assert_allclose(y["a"], a, atol=2e-5)  # the first two steps are exact here, and of order 5 there
    np.testing.assert_allclose(y["b"], b, atol=2e-5)
    by_hand = h * sum(sign * fb for sign, (_, fb) in zip(signs, slopes, strict=True))
    np.testing.assert_allclose(alternating["b"], by_hand, atol=2e-5)


def solve_both(slope, t0, t1, a, b):
    """Each row of (a, b) from its t0 to its t1 by scipy at 1e-10."""
    rows = []
    for i in range(len(a)):

        def fun(t, y):
            da, db = slope(np.array([t]), y[None, :-1], y[-1:])
            return np.concatenate([da[0], db])

        start = np.concatenate([a[i], b[i : i + 1]])
        rows.append(solve_ivp(fun, (t0[i], t1[i]), start, rtol=1e-10, atol=1e-10).y[:, -1])
    return np.stack(rows)[:, :-1], np.stack(rows)[:, -1]


def test_an_even_grid_averages_out_what_rk45_errs_by(x64):
    """A quadrature of 1 + sin^2(pi t) cos(w t + phase), of up to 29 waves: 50 even steps against ten of RK45."""
    rng = np.random.default_rng(0)
    frequency, phase = rng.uniform(100, 180, 64), rng.uniform(0, 2 * np.pi, 64)

    def rate(t):
        return 1 + np.sin(np.pi * t) ** 2 * np.cos(frequency * t + phase)

    truth = np.mean(rate((np.arange(4000) / 4000)[:, None]), axis=0)  # nothing is left of the wave at the ends

    def fun(t, y):
        return 1 + jnp.square(jnp.sin(np.pi * t)) * jnp.cos(frequency * t + phase)

    even, alternating = adams_bashforth(fun, jnp.zeros(64), 0.0, 1.0, steps=50)
    y = jnp.zeros((64, 1))
    for n in range(10):
        t = jnp.full(64, 0.1 * n)
        y, _, _ = dormand_prince_step(lambda t, y: fun(t, y)[:, None], t, y, fun(t, y)[:, None], jnp.full(64, 0.1))
    error_even, error_rk = np.abs(even - truth), np.abs(y[:, 0] - truth)
    assert np.mean(error_even) < np.mean(error_rk) / 50
    assert np.mean(error_even) < np.mean(np.abs(alternating))


def test_adams_bashforth_takes_the_evaluations_that_it_says(x64):
    calls = []

    def fun(t, y):
        jax.debug.callback(lambda _: calls.append(1), t[0])
        return -y

    adams_bashforth(fun, jnp.ones((1, 2)), 0.0, 1.0, steps=10)
    jax.effects_barrier()
    assert len(calls) == 10 + 11
    for steps in (2, 7):
        with pytest.raises(UserError, match=f"even number of steps, 4 or more, not {steps}"):
            adams_bashforth(fun, jnp.ones((1, 2)), 0.0, 1.0, steps=steps)
