# SPDX-License-Identifier: Apache-2.0
"""The ODE's likelihood: scipy's RK45 on the host over a whole batch, as the public code does it, against ours.

python -m benchmarks.likelihood [--json] [--quick] [--sde vpsde|vesde]
                                [--workdir RUN --config FILE] [--batch N] [--repeats N] [--steps N]
                                [--no-reference | --reference FILE] [--ends]
                                [--recipe RUN --recipe-config FILE --recipe-steps N]

Same network, weights, images and probes on both sides, in one run, at tolerance 1e-5. Baseline: two programs a step's
evaluation, the drift, and the divergence by reverse mode, and one step size for the batch. Then a line for each lever,
each with those above it. Errors in bits/dim are against the same probes at 1e-7 in float64, which is most of the time
of a run. The even grid (eval.ode_solver=adams) takes the place of RK45 and has no tolerance.
Without --workdir: a DDPM++ (VE: NCSN++) with nf 32, ch_mult (1, 2, 2), 2 blocks and random weights of
init_scale 1 on 16x16x3 images. That one is stiff: `--ends --repeats 1` takes three quarters of an hour on 2 cores, the
whole several hours. Every solve is told on stderr as it ends. The last line is the ratio; with --json one object.
With --recipe the baseline on the run's network stands against our solvers on that other run's, on the same images.
"""

import argparse
import functools
import hashlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp

import checkpoints
import datasets
import likelihood
import sde_lib
import task
from benchmarks import common
from configs.default_configs import get_default_configs, use_ddpmpp
from models import create_model, init_params
from models.score import get_score_fn

EPS, TOLERANCE = 1e-5, 1e-5
BASELINE = "scipy, drift and reverse mode"


class Problem(NamedTuple):
    """A score in either precision, and float32 images and probes [B, H, W, C]."""

    sde: sde_lib.SDE
    score_of: Callable[[Any], Callable]  # parameters -> score_fn
    params: Any
    x: np.ndarray
    v: np.ndarray
    data_std: float
    bits_per_dim: Callable[[np.ndarray], Any]  # of log p [B] in nats


class Result(NamedTuple):
    logp: np.ndarray  # [B], nats
    nfe: np.ndarray  # [B]


def random_network(sde_name: str, batch: int) -> Problem:
    """Of the claim, on smooth colour images with the 8-bit noise of dequantisation."""
    config = get_default_configs()
    config.training.sde = sde_name
    if sde_name != "vesde":
        use_ddpmpp(config)
    config.data.image_size = 16
    config.model.update(nf=32, ch_mult=(1, 2, 2), num_res_blocks=2, attn_resolutions=(8,), init_scale=1.0)
    sde, model = sde_lib.from_config(config), create_model(config)
    params, _ = init_params(model, jax.random.key(0), (1, 16, 16, 3))
    rng, grid = np.random.default_rng(0), np.linspace(0, 1, 16)
    a, b, c = rng.normal(size=(3, batch, 1, 1, 3))
    waves = a * np.sin(3 * grid[:, None, None] + b) + c * np.cos(4 * grid[None, :, None])
    images = (np.floor(255 * (0.5 + 0.35 * np.tanh(waves))) + rng.random((batch, 16, 16, 3))) / 256
    x = 2 * images - 1 if config.data.centered else images
    v = rng.choice([-1.0, 1.0], x.shape)
    score_of = functools.partial(get_score_fn, sde, model, model_state={})
    inverse = datasets.get_data_inverse_scaler(config.data.centered)
    bits_per_dim = functools.partial(likelihood.bits_per_dim, dim=x[0].size, inverse_scaler=inverse)
    x, v = x.astype(np.float32), v.astype(np.float32)
    return Problem(sde, score_of, params, x, v, config.eval.ode_data_std, bits_per_dim)


def trained_network(workdir: str, config_file: str, batch: int) -> Problem:
    """The EMA parameters of a run's newest checkpoint, on the first images of its test split."""
    config = common.config_of(config_file)
    built = task.build(config)
    state = checkpoints.restore(checkpoints.find(Path(workdir) / "checkpoints", 0)).state
    x = datasets.eval_batch(built.dataset, config.data, "test", np.arange(batch), seed=config.seed, repeat=0)
    v = np.random.default_rng(0).choice([-1.0, 1.0], x.shape)
    score_of = functools.partial(built.score_fn, model_state=state.get("model_state", {}))
    x, v = np.asarray(x, np.float32), v.astype(np.float32)
    unit = {"dim": x[0].size, "inverse_scaler": built.inverse_scaler, "levels": built.dataset.levels}
    bits_per_dim = functools.partial(likelihood.bits_per_dim, **unit)
    return Problem(built.sde, score_of, state["ema_params"], x, v, config.eval.ode_data_std, bits_per_dim)


def public_solver(problem: Problem, *, one_program: str | None) -> Callable[[], Result]:
    """scipy on the host. one_program: None, "reverse" or "jvp", how one program makes both drift and divergence."""
    sde, score_fn, x, v = problem.sde, problem.score_of(problem.params), problem.x, jnp.asarray(problem.v)
    count, dim = len(x), x[0].size

    def drift(x, t):
        return sde.probability_flow(x, t, score_fn(x, t))

    def reverse(x, t):
        gradient = jax.grad(lambda x: jnp.sum(drift(x, t) * v))(x)
        return jnp.sum(gradient * v, axis=(1, 2, 3))

    def both(x, t):
        if one_program == "jvp":
            value, tangent = jax.jvp(lambda x: drift(x, t), (x,), (v,))
            return value, jnp.sum(tangent * v, axis=(1, 2, 3))
        value, pull = jax.vjp(lambda x: drift(x, t), x)
        return value, jnp.sum(pull(v)[0] * v, axis=(1, 2, 3))

    p_drift, p_reverse, p_both = jax.jit(drift), jax.jit(reverse), jax.jit(both)

    def rhs(t, y):
        x_t, times = jnp.asarray(y[: count * dim].reshape(x.shape), jnp.float32), jnp.full(count, t, jnp.float32)
        change, divergence = p_both(x_t, times) if one_program else (p_drift(x_t, times), p_reverse(x_t, times))
        return np.concatenate([np.asarray(change, np.float64).ravel(), np.asarray(divergence, np.float64)])

    def solve() -> Result:
        start = np.concatenate([x.astype(np.float64).ravel(), np.zeros(count)])
        solved = solve_ivp(rhs, (EPS, sde.T), start, method="RK45", rtol=TOLERANCE, atol=TOLERANCE)
        z = jnp.asarray(solved.y[: count * dim, -1].reshape(x.shape), jnp.float32)
        logp = np.asarray(sde.prior_logp(z), np.float64) + solved.y[count * dim :, -1]
        return Result(logp, np.full(count, solved.nfev))

    rhs(0.5, np.zeros(count * dim + count))  # compiles
    return solve


def device_solver(problem: Problem, **options: Any) -> Callable[..., Result]:
    """Ours in the precision of the parameters, with `steps` the one on an even grid. Takes a tolerance, void there."""
    dtype = jax.tree.leaves(problem.params)[0].dtype
    arrays = problem.params, jnp.asarray(problem.x, dtype), jnp.asarray(problem.v, dtype)

    def program(params, x, v, tolerance):
        score_fn = problem.score_of(params)
        if "steps" in options:
            grid = {"eps": EPS, "data_std": problem.data_std, **options}
            logp, _, nfe, _ = likelihood.even_grid_log_likelihood(problem.sde, score_fn, x, v, **grid)
            return logp, nfe
        solver = {"eps": EPS, "rtol": tolerance, "atol": tolerance, **options}
        logp, _, nfe = likelihood.ode_log_likelihood(problem.sde, score_fn, x, v, **solver)
        return logp, nfe

    compiled = jax.jit(program).lower(*arrays, jnp.asarray(TOLERANCE, dtype)).compile()

    def solve(tolerance: float = TOLERANCE) -> Result:
        logp, nfe = compiled(*arrays, jnp.asarray(tolerance, dtype))
        return Result(np.asarray(logp, np.float64), np.asarray(nfe))

    return solve


def reference(problem: Problem) -> np.ndarray:
    """log p [B] at 1e-7 in float64."""
    with jax.enable_x64(True):
        in_float64 = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), problem.params)
        return device_solver(problem._replace(params=in_float64), max_steps=1_000_000)(1e-7).logp


def known_reference(problem: Problem, path: Path | None) -> np.ndarray:
    """`reference`, which is read from `path` if it is there for this very problem, and is kept there."""
    leaves = [problem.x, problem.v, *jax.tree.leaves(problem.params)]
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()
    if path is not None and path.exists():
        known = np.load(path)
        if known["digest"] == digest:
            return known["logp"]
        raise SystemExit(f"error: {path} is of another network or other images: remove it or name another file")
    logp = timed("reference", lambda: Result(reference(problem), np.zeros(1)))[0].logp
    if path is not None:
        with path.open("wb") as file:
            np.savez(file, digest=digest, logp=logp)
    return logp


def bits_per_dim_error(problem: Problem, logp: np.ndarray, truth: np.ndarray) -> float:
    """Mean over the images of the absolute error."""
    return float(np.mean(np.abs(logp - truth)) / (problem.x[0].size * math.log(2)))


class Lever(NamedTuple):
    problem: Problem
    solver: Callable[[Problem], Callable[..., Result]]


def levers(problem: Problem, steps: int) -> dict[str, Lever]:
    """What makes each solver, with the levers above it; the last is in place of RK45."""
    solvers = {
        BASELINE: functools.partial(public_solver, one_program=None),
        "scipy, one reverse-mode program": functools.partial(public_solver, one_program="reverse"),
        "scipy, one jvp": functools.partial(public_solver, one_program="jvp"),
        "on the device, steps per example": device_solver,
        f"even grid in log-SNR, {steps} steps": functools.partial(device_solver, steps=steps),
    }
    return {name: Lever(problem, solver) for name, solver in solvers.items()}


def recipes(public: Problem, recipe: Problem, steps: int) -> dict[str, Lever]:
    """The public code's way on one network, and ours on another."""
    *_, on_device, even_grid = levers(recipe, steps).items()
    ours = {f"recipe, {name}": lever for name, lever in (on_device, even_grid)}
    return {BASELINE: levers(public, steps)[BASELINE], **ours}


def references(measured: dict[str, Lever], path: Path | None) -> dict[str, np.ndarray]:
    """`known_reference` for each. Those of a second network are kept beside `path`."""
    found: dict[int, np.ndarray] = {}
    for problem, _ in measured.values():
        if id(problem) not in found:
            found[id(problem)] = known_reference(problem, path and path.with_name(path.name + ".recipe" * len(found)))
    return {name: found[id(problem)] for name, (problem, _) in measured.items()}


def timed(name: str, solve: Callable[[], Result]) -> tuple[Result, float]:
    """The result and its seconds, told on stderr."""
    start = time.perf_counter()
    result = solve()
    seconds = time.perf_counter() - start
    print(f"{name}: {seconds:.2f} s, NFE {result.nfe.mean():.0f}", file=sys.stderr, flush=True)
    return result, seconds


def measure(solvers: dict[str, Callable[[], Result]], repeats: int) -> tuple[dict[str, Result], dict[str, float]]:
    """What each gives, and its median seconds; they take turns, so that a busy machine is busy for all."""
    results: dict[str, Result] = {}
    seconds: dict[str, list[float]] = {name: [] for name in solvers}
    for _ in range(repeats):
        for name, solve in solvers.items():
            results[name], once = timed(name, solve)
            seconds[name].append(once)
    return results, {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--quick", action="store_true", help="1 repeat, 2 images")
    parser.add_argument("--sde", default="vpsde", help="of the random network: vpsde, subvpsde or vesde")
    parser.add_argument("--workdir", default="", help="a trained run; needs --config")
    parser.add_argument("--config", default="", help="the config file of that run")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=0, help="of the even grid (eval.ode_steps); 0: 192, with random weights 1280"
    )
    parser.add_argument(
        "--no-reference", action="store_true", help="no errors in bits/dim, which saves the float64 run"
    )
    parser.add_argument(
        "--reference", type=Path, help=".npz file that keeps the float64 run's result for the next call"
    )
    parser.add_argument("--ends", action="store_true", help="only the baseline and the even grid")
    parser.add_argument("--recipe", default="", help="a run whose network our solvers are measured on")
    parser.add_argument("--recipe-config", default="", help="the config file of that run")
    parser.add_argument("--recipe-steps", type=int, default=54, help="of the even grid there, for 65 evaluations")
    args = parser.parse_args()
    if bool(args.workdir) != bool(args.config) or bool(args.recipe) != bool(args.recipe_config):
        parser.error("--workdir and --config go together, and so do --recipe and --recipe-config")
    if args.recipe and not args.workdir:
        parser.error("--recipe needs --workdir, the run of the baseline")
    batch, repeats = (2, 1) if args.quick else (args.batch, args.repeats)
    if args.workdir:
        problem = trained_network(args.workdir, args.config, batch)
    else:
        problem = random_network(args.sde, batch)
    measured = levers(problem, args.steps or (192 if args.workdir else 1280))
    if args.recipe:
        measured = recipes(problem, trained_network(args.recipe, args.recipe_config, batch), args.recipe_steps)
    if args.ends:
        measured = {name: lever for name, lever in measured.items() if name in (BASELINE, [*measured][-1])}
    solvers = {name: lever.solver(lever.problem) for name, lever in measured.items()}
    truths = {} if args.no_reference else references(measured, args.reference)
    errors: dict[str, Any] = dict.fromkeys(measured)
    results, seconds = measure(solvers, repeats)
    rows = {}
    for name, (of, _) in measured.items():
        result, speedup = results[name], seconds[BASELINE] / seconds[name]
        if truths:
            errors[name] = bits_per_dim_error(of, result.logp, truths[name])
        nfe, bpd = float(result.nfe.mean()), float(np.mean(of.bits_per_dim(result.logp)))
        rows[name] = {"seconds": seconds[name], "nfe": nfe, "bpd": bpd, "bpd_error": errors[name], "speedup": speedup}
        accuracy = "" if errors[name] is None else f"  error {errors[name]:.1e}"
        print(f"{name:42}  {seconds[name]:7.2f} s  NFE {nfe:6.0f}  {bpd:.4f} bits/dim{accuracy}  {speedup:4.1f} times")
    # of those of ours with no larger error the fastest, or if there is none the most accurate
    ours = [name for name in rows if not name.startswith("scipy")]
    accurate = [name for name in ours if not truths or errors[name] <= errors[BASELINE]]
    best = min(accurate, key=lambda name: seconds[name]) if accurate else min(ours, key=lambda name: errors[name])
    summary = {
        "speedup": rows[best]["speedup"],
        "nfe": rows[best]["nfe"],
        "nfe_baseline": rows[BASELINE]["nfe"],
        "bpd_error": rows[best]["bpd_error"],
        "bpd_error_baseline": rows[BASELINE]["bpd_error"],
        "repeats": repeats,
        "batch": batch,
        "levers": rows,
    }
    print(json.dumps(summary) if args.json else f"ratio {summary['speedup']:.1f} ({best})")


if __name__ == "__main__":
    main()
