# SPDX-License-Identifier: Apache-2.0
"""Likelihoods of discrete data: mixtures quantised to 5 and 17 levels, whose P(k) are known, under the exact score."""

import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit
from scipy import integrate, special, stats

import datasets
import losses
import report
import sde_lib
from configs.default_configs import get_default_configs
from dequantization import truncated_normal
from evaluators import EVALUATORS
from evaluators import dequantized as dequantizers
from evaluators.context import Context, Split
from evaluators.dequantized import create
from likelihood import discrete_bound, ode_log_likelihood
from report.run_files import newest_npz
from runtime import records
from runtime.devices import replicate
from task import Task

EPS = 1e-5
MEANS = np.array([[0.25, 0.3], [0.7, 0.55]])  # in [0, 1]^2; the first coordinate is the one-dimensional mixture
STDS, WEIGHTS = np.array([0.12, 0.2]), np.array([0.4, 0.6])


def quantised(levels: int, dim: int) -> np.ndarray:
    """P(k) [levels ** dim]: the mixture's mass in each of the cells, renormalised."""
    edges = np.linspace(0, 1, levels + 1)
    total = 0.0
    for weight, mean, std in zip(WEIGHTS, MEANS, STDS, strict=True):
        masses = [np.diff(stats.norm(mean[d], std).cdf(edges)) for d in range(dim)]
        total = total + weight * functools.reduce(np.multiply.outer, masses).reshape(-1)
    return total / total.sum()


def grid_of(levels: int) -> np.ndarray:
    """The levels k / (levels - 1), in [-1, 1]."""
    return np.linspace(-1, 1, levels)


def points_of(levels: int, dim: int) -> np.ndarray:
    """The places [levels ** dim, dim] of the levels."""
    return np.array(list(itertools.product(grid_of(levels), repeat=dim)))


def exact_score(sde, points, mass):
    """The score, at x [B, D], of the points under the forward process."""

    def score_fn(x, t):
        alpha, var = sde.alpha(t)[:, None], jnp.square(sde.sigma(t))[:, None]
        distance = x[:, None] - alpha[..., None] * points  # [B, N, D]
        share = jax.nn.softmax(jnp.log(mass) - 0.5 * jnp.sum(jnp.square(distance), -1) / var)
        return -jnp.einsum("bn,bnd->bd", share, distance) / var

    return score_fn


def log_density(sde, points, mass, x, t=EPS):
    """Of x [B, D] at the time t, in float64."""
    with jax.enable_x64(True):
        alpha, sigma = float(sde.alpha(jnp.asarray(t))), float(sde.sigma(jnp.asarray(t)))
    square = np.sum(np.square((x[:, None] - alpha * points) / sigma), axis=-1)
    return special.logsumexp(np.log(mass) - 0.5 * square, axis=1) - x.shape[1] * math.log(sigma * math.sqrt(2 * np.pi))


SIZES = [(5, 1), *(pytest.param(*size, marks=pytest.mark.slow) for size in ((17, 1), (5, 2)))]  # levels, dimensions
PROCESSES = {"vp": sde_lib.VPLogSNR, "straight": sde_lib.StraightPath}


@pytest.mark.parametrize(("levels", "log_snr_max"), [(256, 13.3), (17, 8.0), (17, 3.0)])
@pytest.mark.parametrize("name", PROCESSES)
def test_entropy_of_the_truncated_normal(name, levels, log_snr_max):
    """The mean of -log q over u against quadrature of -q log q, and against the closed form of the docstring."""
    with jax.enable_x64(True):
        sde, half = PROCESSES[name](log_snr_max=log_snr_max), 1 / (levels - 1)
        alpha, sigma = (float(f(jnp.float64(EPS))) for f in (sde.alpha, sde.sigma))
        tau = alpha * half / sigma
        u = (np.arange(20_000) + 0.5) / 20_000
        both = truncated_normal(sde, jnp.full((20_000, 1), 0.2), jnp.asarray(u)[:, None], half, EPS)
        x, log_q = map(np.asarray, both)
    law = stats.truncnorm(-tau, tau, alpha * 0.2, sigma)
    np.testing.assert_allclose(x[:, 0], law.ppf(u), atol=1e-9)
    np.testing.assert_allclose(log_q, law.logpdf(x[:, 0]), atol=1e-6)
    mass = math.erf(tau / math.sqrt(2))
    entropy = math.log(sigma * mass * math.sqrt(2 * math.pi * math.e)) - tau * stats.norm.pdf(tau) / mass
    by_quadrature = integrate.quad(lambda y: -law.pdf(y) * law.logpdf(y), *law.support())[0]
    assert entropy == pytest.approx(by_quadrature, abs=1e-8)
    assert entropy == pytest.approx(-log_q.mean(), abs=1e-4)
    if levels == 256:  # the levels lie six standard deviations apart
        assert tau == pytest.approx(3.03, abs=2e-3)


@pytest.mark.parametrize(("levels", "dim"), SIZES)
@pytest.mark.parametrize("name", PROCESSES)
def test_truncated_normal_is_a_bound_that_quadrature_confirms(name, levels, dim):
    mass, points = quantised(levels, dim), points_of(levels, dim)
    half = 1 / (levels - 1)
    with jax.enable_x64(True):
        sde = PROCESSES[name](log_snr_min=-22.0, log_snr_max=2 * math.log(2.5 / half))  # tau = 2.5
        nodes, weights = np.polynomial.legendre.leggauss(12)
        u = np.array(list(itertools.product((nodes + 1) / 2, repeat=dim)))
        weight = functools.reduce(np.multiply.outer, [weights / 2] * dim).reshape(-1)
        k = len(points) // 2
        x = np.broadcast_to(points[k], u.shape)
        x_eps, log_q = truncated_normal(sde, jnp.asarray(x), jnp.asarray(u), half, EPS)
        score_fn = exact_score(sde, points, mass)
        solve = jit(lambda x: ode_log_likelihood(sde, score_fn, x, None, eps=EPS, rtol=1e-7, atol=1e-7)[0])
        by_ode = weight @ np.asarray(solve(x_eps) - log_q)
        truth = weight @ (log_density(sde, points, mass, np.asarray(x_eps)) - np.asarray(log_q))
    assert by_ode == pytest.approx(truth, abs=1e-4)
    assert math.log(mass[k]) - 0.2 < truth < math.log(mass[k])


def alpha_and_sigma(sde, t):
    with jax.enable_x64(True):
        return float(sde.alpha(jnp.asarray(t))), float(sde.sigma(jnp.asarray(t)))


def parts_by_quadrature(sde, grid, points, mass, k):
    """prior, diffusion and reconstruction of `discrete_bound` at the point k, under the exact score."""
    dim = points.shape[1]
    z, w = special.roots_hermitenorm(80)
    w = w / w.sum()
    nodes = np.array(list(itertools.product(z, repeat=dim)))
    weight = functools.reduce(np.multiply.outer, [w] * dim).reshape(-1)

    def mean_log_ratio(t):  # of the density of x_t given x, and that of x_t
        alpha, sigma = alpha_and_sigma(sde, t)
        conditional = np.sum(stats.norm.logpdf(nodes), axis=1) - dim * math.log(sigma)
        return weight @ (conditional - log_density(sde, points, mass, alpha * points[k] + sigma * nodes, t))

    alpha, sigma = alpha_and_sigma(sde, 1.0)
    x_T = alpha * points[k] + sigma * nodes
    log_prior = np.sum(stats.norm(0, sde.prior_std).logpdf(x_T), axis=1)
    prior = weight @ (np.sum(stats.norm.logpdf(nodes), axis=1) - dim * math.log(sigma) - log_prior)

    alpha, sigma = alpha_and_sigma(sde, EPS)
    log_p = -0.5 * np.square((alpha * (points[k][:, None, None] - grid) + sigma * z[:, None]) / sigma)  # [D, z, L]
    here = [np.argmin(np.abs(grid - value)) for value in points[k]]
    chosen = [special.log_softmax(rows, axis=-1)[:, j] for rows, j in zip(log_p, here, strict=True)]
    # With the exact score the diffusion is the information that x_eps has of x and x_T has not.
    return {
        "prior": prior,
        "diffusion": mean_log_ratio(EPS) - mean_log_ratio(1.0),
        "reconstruction": -np.sum(np.stack(chosen) @ w),
    }


@pytest.mark.parametrize(("levels", "dim"), SIZES)
@pytest.mark.parametrize("name", PROCESSES)
def test_bound_of_discrete_data_by_its_parts(name, levels, dim):
    """Each part at one point against quadrature; the mean of their sum over the data is above the entropy."""
    mass, points, grid = quantised(levels, dim), points_of(levels, dim), grid_of(levels)
    sde = PROCESSES[name](log_snr_min=-5.0, log_snr_max=2 * math.log(1.2 * (levels - 1)))  # neighbours mix a little
    k, count = len(points) // 2 - 1, 2000
    x = jnp.asarray(np.broadcast_to(points[k], (count, dim)), jnp.float32)
    score_fn = exact_score(sde, jnp.asarray(points, jnp.float32), jnp.asarray(mass, jnp.float32))
    options = {"eps": EPS, "num_time_samples": 60}
    run = jit(lambda keys: discrete_bound(sde, score_fn, x, jnp.asarray(grid, jnp.float32), keys, **options))
    parts = run(jax.random.split(jax.random.key(0), count))._asdict()
    truth = [parts_by_quadrature(sde, grid, points, mass, j) for j in range(len(points))]
    for part, values in parts.items():
        assert_mean(np.asarray(values, np.float64), truth[k][part])
    mean = sum(p * sum(of_point.values()) for p, of_point in zip(mass, truth, strict=True))
    entropy = -np.sum(mass * np.log(mass))
    assert entropy < mean < entropy + 0.2 * dim


def assert_mean(values, truth):
    error = values.std() / math.sqrt(len(values))
    assert values.mean() == pytest.approx(truth, abs=4 * error + 1e-5) and error < 0.03


class Exact(nn.Module):
    """The exact score of images of one pixel, whose levels are those of the quantised mixture, in [-1, 1]."""

    sde: sde_lib.SDE
    levels: int
    is_uniform: bool  # of data with uniform noise, else of the levels themselves

    conditioning, parameterization = "time", "score"
    takes_images = True

    @nn.compact
    def __call__(self, x, t, train=False):
        scale = self.param("scale", nn.initializers.ones, ())
        mass, flat = jnp.asarray(quantised(self.levels, 1), jnp.float32), x.reshape(len(x), 1)
        if not self.is_uniform:
            points = jnp.asarray(points_of(self.levels, 1), jnp.float32)
            return scale * exact_score(self.sde, points, mass)(flat, t).reshape(x.shape)
        edges = jnp.linspace(-1, 1, self.levels + 1)
        z = (flat - self.sde.alpha(t)[:, None] * edges) / self.sde.sigma(t)[:, None]  # [B, L + 1]
        density = jax.scipy.stats.norm.pdf(z)
        cells = _interval(z)
        slope = jnp.sum(mass * (density[:, 1:] - density[:, :-1]), axis=1) / jnp.sum(mass * cells, axis=1)
        return scale * (slope / -self.sde.sigma(t)).reshape(x.shape)


def _interval(z):
    """Phi(z_j) - Phi(z_{j + 1}) of falling z, without cancellation in the tails."""
    high, low = z[:, :-1], z[:, 1:]
    flip = low > 0
    cdf = jax.scipy.special.ndtr
    return jnp.where(flip, cdf(-low) - cdf(-high), cdf(high) - cdf(low)) + 1e-30


def discrete_task(levels, is_uniform, **evaluation):
    config = get_default_configs()
    config.training.update(sde="vp_log_snr", batch_size=8)
    config.model.update(log_snr_min=-12.0, log_snr_max=2 * math.log(2.0 * (levels - 1)), scale_by_sigma=False)
    config.data.update(centered=True, image_size=1, num_channels=1)
    config.eval.update(batch_size=500, num_repeats=1, hutchinson_type="exact", **evaluation)
    sde = sde_lib.from_config(config)
    k = np.arange(levels).repeat(np.round(2000 * quantised(levels, 1)).astype(int)).astype(np.uint8)
    images = k[:, None, None, None]
    dataset = datasets.Dataset("quantised", (1, 1, 1), True, images, images, levels=levels)
    return Task(config, sde, dataset, Exact(sde, levels, is_uniform), losses.get_optimizer(config.optim))


def bits(tmp_path, levels, name, samples):
    task = discrete_task(levels, name == "uniform", dequantization=name, importance_samples=samples)
    context = Context(replicate({"scale": np.float32(1)}), replicate({}), 1, tmp_path, {"score": name})
    result = EVALUATORS["enable_bpd"](task, create(task, tmp_path))(context)["bpd"]
    return result["mean"], result["stderr"], np.load(context.file("bpd"))["bpd"][0], task.dataset.test[:, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uniform", "truncated_normal"])
@pytest.mark.parametrize("levels", [5, 17])
def test_importance_samples_tighten_the_bound(tmp_path, name, levels):
    """For K = 1, 5 and 20: above -log2 P(k) in the mean, falling in K, and equal to numpy's mean of its formula."""
    mass = quantised(levels, 1)
    rng, means, sde = np.random.default_rng(0), [], None
    for samples in (1, 5, 20):
        mean, _, values, k = bits(tmp_path / str(samples), levels, name, samples)
        sde = discrete_task(levels, True).sde
        means.append(mean)
        u = rng.uniform(size=(samples, 400 * levels))
        level = np.tile(np.arange(levels), 400)
        truth = numpy_bits(sde, name, levels, mass, level, u).reshape(400, levels)
        for j in range(levels):
            here = values[k == j]
            spread = np.hypot(here.std() / math.sqrt(len(here)), truth[:, j].std() / 20)
            assert here.mean() == pytest.approx(truth[:, j].mean(), abs=4.5 * spread + 2e-3)
        assert mean > -np.mean(np.log2(mass[k])) - 2e-3
    assert means[0] > means[1] + 1e-4 and means[1] > means[2] - 1e-3


def numpy_bits(sde, name, levels, mass, level, u):
    """-log2 of the mean of p / q over the K draws u [K, N], with the densities written out."""
    with jax.enable_x64(True):
        alpha, sigma = float(sde.alpha(jnp.asarray(EPS))), float(sde.sigma(jnp.asarray(EPS)))
    if name == "uniform":
        x, edges = 2 * (level + u) / levels - 1, np.linspace(-1, 1, levels + 1)
        z = (x[..., None] - alpha * edges) / sigma
        cells = np.where(
            z[..., 1:] > 0, special.ndtr(-z[..., 1:]) - special.ndtr(-z[..., :-1]), -np.diff(special.ndtr(z))
        )
        p = np.sum(mass * cells, axis=-1) / (alpha * 2 / levels)
        log_ratio = np.log(p * 2 / levels)
    else:
        tau = alpha / (levels - 1) / sigma
        law = stats.truncnorm(-tau, tau)
        n = law.ppf(u)
        x = alpha * grid_of(levels)[level] + sigma * n
        log_p = log_density(sde, points_of(levels, 1), mass, x.reshape(-1, 1)).reshape(x.shape)
        log_ratio = log_p - law.logpdf(n) + math.log(sigma)
    return -(special.logsumexp(log_ratio, axis=0) - math.log(len(u))) / math.log(2)


@pytest.mark.slow
def test_ledger_and_bound_of_the_levels(tmp_path):
    """Its rows are those of single evaluations, the parts of the bound add up, the report has a table and a picture."""
    task = discrete_task(5, False, bound_num_times=40, num_examples=60)
    context = Context(replicate({"scale": np.float32(1)}), replicate({}), 1, tmp_path, {"score": "exact"})
    result = EVALUATORS["ledger"](task, create(task, tmp_path))(context)
    rows, differences = result["ledger"], result["ledger_minus_uniform_1"]
    names = [f"{name}_{count}" for name in ("uniform", "truncated_normal") for count in (1, 5, 20)]
    assert list(rows) == [*names, "discrete_bound", "settings"] and list(differences) == [*names[1:], "discrete_bound"]
    arrays = np.load(context.file("ledger"))
    for name in names:
        assert rows[name]["num_repeats"] == 2 and rows[name]["stderr_over_repeats"] > 0
        assert rows[name]["mean"] == pytest.approx(arrays[name].mean(), rel=1e-6)
    gain = (arrays["truncated_normal_20"] - arrays["uniform_1"]).mean(axis=0)
    assert differences["truncated_normal_20"]["stderr"] == pytest.approx(gain.std(ddof=1) / math.sqrt(60), rel=1e-5)

    for name, count in (("truncated_normal", 1), ("truncated_normal", 5)):
        task.config.eval.update(dequantization=name, importance_samples=count, num_repeats=2)
        alone = EVALUATORS["enable_bpd"](task, create(task, tmp_path))(context)["bpd"]
        assert alone["mean"] == pytest.approx(rows[f"{name}_{count}"]["mean"], rel=1e-6)
        assert alone["settings"]["dequantization"] == name
    bound = EVALUATORS["discrete_bound"](task, create(task, tmp_path))(context)["discrete_bound"]
    assert bound["mean"] == pytest.approx(rows["discrete_bound"]["mean"], rel=1e-6)
    assert sum(bound["parts"].values()) == pytest.approx(bound["mean"], rel=1e-6)
    task.config.eval.bpd_dataset = "train"
    of_train = EVALUATORS["discrete_bound"](task, create(task, tmp_path))(context)
    assert list(of_train) == ["discrete_bound_train"] and context.file("discrete_bound_train").exists()

    (tmp_path / "eval").mkdir()
    for path in tmp_path.glob("*.npz"):
        path.rename(tmp_path / "eval" / path.name)
    records.write_json(tmp_path / "eval" / "report_1.json", {"checkpoint": 1, "step": 1, "dataset": "x", **result})
    page = report.write_report(tmp_path).read_text()
    assert "Ledger: truncated normal 20" in page and "by noise" in page
    assert (tmp_path / "report" / "ledger.png").read_bytes().startswith(b"\x89PNG")
    assert [*newest_npz(tmp_path / "eval", "ledger_*.npz")[1]] == [*names, "discrete_bound"]  # as the picture has them


@pytest.mark.parametrize("levels", [17, 256])
def test_truncated_normal_noise_is_finite_where_a_level_is_many_noises_wide(levels):
    """Uniform numbers of exactly 0 and (to float precision) 1, which are one draw in 2^24."""
    task = discrete_task(levels, False)
    task.config.model.log_snr_max = 2 * math.log(10.0 * (levels - 1))  # half a level is 10 noises
    task = task._replace(sde=sde_lib.from_config(task.config))
    level = np.arange(levels).repeat(2).reshape(-1, 1, 1, 1)

    class Corners(Split):
        def batch(self, unit, draw, dequantize=True, scale=True):
            u = np.tile([0.0, 1.0], levels).reshape(level.shape)
            x = (level + u) / levels if dequantize else level / (levels - 1)
            return 0, x.astype(np.float32), np.arange(2 * levels)

    _, x, _, log_q = dequantizers.truncated_normal(task).batch(Corners(task, "test", 2 * levels, 2 * levels, 1), 0, 0)
    n = (x - (2 * level / (levels - 1) - 1)) * 10 * (levels - 1)
    assert np.isfinite(log_q).all() and (3.5 < abs(n)).all() and (abs(n) < 6).all()
