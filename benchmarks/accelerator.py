# SPDX-License-Identifier: Apache-2.0
"""What the full-size networks do on one accelerator, in parts, each with a time limit and a file of its own.

python -m benchmarks.accelerator [--minutes 10] [--out runs/accelerator] [--only NAME,NAME] [--list] [--tiny] [--json]

The parts run one after the other, each in its own process, so that its peak of memory is its own: versions and card;
the tests that matter on an accelerator; training steps of two CIFAR-10 networks by order, precision and `model.remat`,
in the smallest number of micro-batches that fits; likelihoods and samples of networks with random weights. A part's
result is written to <out>/<part>.json at once. Parts that are there are not run again, so that a second call goes on
where the first ran out of its minutes, and parts that failed are tried again. --tiny: the digits' networks on a few
images, to try the script itself on a CPU.
"""

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import datasets
import likelihood
import models
import sampling
import sde_lib
from benchmarks import common
from models.score import get_score_fn
from runtime.devices import memory_limit

ROOT = Path(__file__).parent.parent
NETWORKS = {  # name: config file, and that of --tiny
    "vp": ("configs/vp/cifar10_ddpmpp_continuous.py", "configs/digits/vp_ddpmpp.py"),
    "ve": ("configs/ve/cifar10_ncsnpp_continuous.py", "configs/digits/ve_ncsnpp.py"),
}
# "default" is TF32 on an NVIDIA card and bfloat16 on a TPU; the last has feature maps in bfloat16 as well.
PRECISIONS = {"default": ("default", "float32"), "float32": ("float32", "float32"), "bfloat16": ("default", "bfloat16")}
TESTS = (
    "tests/test_memory_paths.py::test_both_branches_of_the_convolution_agree",
    "tests/test_memory_paths.py::test_both_branches_give_the_gradient_of_the_third_order[]",
    "tests/test_losses.py::test_against_explicit_hessian_and_third_derivative",
    "tests/test_likelihood.py::test_ode_likelihood_of_a_gaussian",
    "tests/test_likelihood.py::test_even_grid_of_a_gaussian",
    "tests/test_checkpoints.py::test_the_old_one_stays_until_the_new_one_is_whole",
)


def config_of(network: str, tiny: bool) -> Any:
    config = common.config_of(NETWORKS[network][tiny])
    if tiny:
        config.model.update(nf=8, num_res_blocks=1)
        config.training.batch_size = 4
        config.model.num_scales = 4
    return config


def machine(tiny: bool) -> dict[str, Any]:
    """Versions, the card and the memory that programs may take of it."""
    device, limit = jax.devices()[0], memory_limit(0.0)
    versions = {"python": sys.version.split()[0], "jax": jax.__version__, "backend": jax.default_backend()}
    return {**versions, "device": device.device_kind, "limit_gb": limit / 1e9 if limit < float("inf") else None}


def tests(tiny: bool) -> dict[str, Any]:
    """The numerical tests that depend on the kind of device."""
    nodes = TESTS[-1:] if tiny else TESTS
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *nodes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return {"passed": list(nodes)}


def training_step(tiny: bool, network: str, order: int, precision: str, remat: bool) -> dict[str, Any]:
    """Seconds to compile, seconds a step, images a second and peak of memory, in as few micro-batches as fit."""
    config = config_of(network, tiny)
    products, config.model.dtype = PRECISIONS[precision]
    config.training.score_matching_order, config.model.remat = order, remat
    batch, limit, tried = config.training.batch_size, memory_limit(0.0), []
    with jax.default_matmul_precision(products):
        for parts in (count for count in (1, 2, 4, 8, 16) if batch % count == 0):
            step = common.train_step(config, batch, parts)
            need = (2 * step.argument_mb + step.scratch_mb) * 1e6  # the state before and after
            tried.append({"microbatches": parts, "compile_s": step.compile_s, "needs_gb": need / 1e9})
            if need <= limit:
                break
        else:
            return {"batch": batch, "tried": tried, "fits": False}
    seconds = common.seconds({"step": step}, repeats=2 if tiny else 5)["step"]
    stats = jax.devices()[0].memory_stats() or {}
    rates = {"seconds_a_step": seconds, "images_a_second": batch / seconds}
    return {"batch": batch, "tried": tried, "fits": True, **rates, "peak_gb": stats.get("peak_bytes_in_use", 0) / 1e9}


def _score(config: Any) -> tuple[sde_lib.SDE, Any, Any]:
    """The process, parameters -> score, and random parameters."""
    sde, model = sde_lib.from_config(config), models.create_model(config)
    shape = (1, *([config.data.image_size] * 2), config.data.num_channels)
    params, _ = models.init_params(model, jax.random.PRNGKey(0), shape)
    return sde, functools.partial(get_score_fn, sde, model, model_state={}), params


def likelihoods(tiny: bool, solver: str) -> dict[str, Any]:
    """Seconds and evaluations to the likelihood of 256 images, of a network with random weights."""
    config = config_of("vp", tiny)
    sde, score_of, params = _score(config)
    x = common.images(config, 4 if tiny else 256)
    v = jax.random.rademacher(jax.random.PRNGKey(3), x.shape, x.dtype)
    rtol, atol = (1e-1, 1e-1) if tiny else (config.eval.rtol, config.eval.atol)

    def run(params, x, v):
        if solver == "rk45":
            return likelihood.ode_log_likelihood(sde, score_of(params), x, v, rtol=rtol, atol=atol)[::2]
        steps = 4 if tiny else config.eval.ode_steps
        logp, _, nfe, _ = likelihood.even_grid_log_likelihood(sde, score_of(params), x, v, steps=steps)
        return logp, nfe

    with jax.default_matmul_precision("float32"):
        return _timed(common.compiled(run, params, x, v), len(x))


def samples(tiny: bool, network: str, method: str) -> dict[str, Any]:
    """Seconds, evaluations and images a second of a sampler, of a network with random weights."""
    config = config_of(network, tiny)
    config.sampling.method = method
    if tiny:
        config.sampling.update(rtol=1e-1, atol=1e-1)
    sde, score_of, params = _score(config)
    shape = (config.data.image_size, config.data.image_size, config.data.num_channels)
    inverse = datasets.get_data_inverse_scaler(config.data.centered)
    draw = sampling.get_sampling_fn(config.sampling, sde, shape, inverse)
    keys = jax.random.split(jax.random.PRNGKey(4), 4 if tiny else 64)
    with jax.default_matmul_precision(config.sampling.matmul_precision):
        return _timed(common.compiled(lambda params, keys: draw(score_of(params), keys), params, keys), len(keys))


def _timed(program: common.Program, count: int) -> dict[str, Any]:
    seconds = common.seconds({"run": program}, repeats=1)["run"]
    nfe = float(np.mean(jax.device_get(program.run(*program.args)[1])))
    rates = {"images": count, "seconds": seconds, "images_a_second": count / seconds, "evaluations": nfe}
    return {"compile_s": program.compile_s, **rates}


def parts() -> dict[str, tuple[float, Callable[[bool], dict[str, Any]]]]:
    """Name: the seconds it may take, and (tiny) -> its result; what is most wanted comes first."""
    found: dict[str, tuple[float, Callable]] = {"machine": (60, machine), "tests": (180, tests)}

    def add(network, order, precision, remat=False):
        name = f"step_{network}_order{order}_{precision}" + ("_remat" if remat else "")
        call = functools.partial(training_step, network=network, order=order, precision=precision, remat=remat)
        found[name] = (300, call)

    for order in (1, 2, 3):
        add("vp", order, "default")
    for solver in ("rk45", "adams"):
        found[f"likelihood_{solver}"] = (180, functools.partial(likelihoods, solver=solver))
    found["samples_vp_ode"] = (120, functools.partial(samples, network="vp", method="ode"))
    found["samples_ve_pc"] = (180, functools.partial(samples, network="ve", method="pc"))
    for order in (1, 3, 2):
        add("ve", order, "default")
    for network in NETWORKS:
        for precision, remat in (("bfloat16", False), ("default", True), ("float32", False)):
            for order in (3, 1, 2):
                add(network, order, precision, remat)
    return found


def _run(name: str, seconds: float, path: Path, tiny: bool) -> str:
    """Runs a part in a process of its own and writes its result or error. Returns what to print."""
    command = [sys.executable, "-m", "benchmarks.accelerator", f"--part={name}", *(["--tiny"] if tiny else [])]
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", **os.environ}
    start = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
        lines = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()
        last = (done.stderr.strip().splitlines() or lines)[-1]
        result = json.loads(lines[-1]) if done.returncode == 0 else {"error": last}
    except subprocess.TimeoutExpired:
        result = {"error": f"not done in {seconds:.0f} s"}
    path.write_text(json.dumps({**result, "wall_s": round(time.monotonic() - start, 1)}, indent=1) + "\n")
    return f"{name}: {json.dumps(result)}"


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=Path("runs/accelerator"))
    parser.add_argument("--only", default="", help="names of parts, with commas between them; all if empty")
    parser.add_argument("--list", action="store_true", help="print the names of the parts")
    parser.add_argument("--tiny", action="store_true", help="a few images of 8x8, to try the script")
    parser.add_argument("--part", default="", help="run this part here and print its result")
    args = parser.parse_args()
    known = parts()
    names = args.only.split(",") if args.only else list(known)
    if unknown := [name for name in [*names, *filter(None, [args.part])] if name not in known]:
        parser.error(f"no part {', '.join(unknown)}; --list prints them")
    if args.list:
        print("\n".join(known))
        return
    if args.part:
        print(json.dumps(jax.tree.map(common.rounded, known[args.part][1](args.tiny))))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    end, results = time.monotonic() + 60 * args.minutes, {}
    for name in names:
        path = args.out / f"{name}.json"
        if not path.exists() or "error" in json.loads(path.read_text()):
            left = end - time.monotonic()
            if left < 5:
                print(f"{args.minutes:g} minutes are over; run again for {name} and what comes after it", flush=True)
                break
            print(_run(name, min(known[name][0], left), path, args.tiny), flush=True)
        results[name] = json.loads(path.read_text())
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
