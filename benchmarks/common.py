# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: the network that they measure, its training step, and timing side by side."""

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import losses
import models
import sde_lib
from configs.default_configs import get_default_configs, use_ddpmpp
from models.score import get_score_fn
from task import new_state


class Program(NamedTuple):
    """A compiled program with its arguments."""

    run: Any  # jax.stages.Compiled
    args: tuple
    trace_s: float  # to trace and lower it
    xla_s: float  # to compile what that gives

    @property
    def compile_s(self) -> float:
        return self.trace_s + self.xla_s

    @property
    def argument_mb(self) -> float:
        """Memory of the arguments."""
        return self.run.memory_analysis().argument_size_in_bytes / 1e6

    @property
    def scratch_mb(self) -> float:
        """Memory for what the program keeps between its inputs and outputs, by the compiler's plan."""
        return self.run.memory_analysis().temp_size_in_bytes / 1e6

    @property
    def gflop(self) -> float:
        """Operations by the compiler's count; the body of a loop counts once."""
        return self.run.cost_analysis()["flops"] / 1e9


def ddpmpp_config(order: int, size: int = 16, **model: Any) -> Any:
    """DDPM++, VP: nf 32, ch_mult (1, 2, 2), 2 blocks, attention at 16, dropout 0.1, images of `size` and 3 channels."""
    config = get_default_configs()
    use_ddpmpp(config)
    config.training.update(sde="vpsde", score_matching_order=order)
    config.data.image_size = size
    config.model.update({"nf": 32, "ch_mult": (1, 2, 2), "num_res_blocks": 2, **model})
    return config


def config_of(path: str) -> Any:
    """What the config file's `get_config` gives."""
    spec = importlib.util.spec_from_file_location("config", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"error: {path} is not a config file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def compiled(fun: Callable, *args: Any, donate: tuple[int, ...] = (), **options: Any) -> Program:
    """`fun` compiled for the arguments, of which it may overwrite those of `donate`; options: of the compiler."""
    start = time.perf_counter()
    lowered = jax.jit(fun, donate_argnums=donate).lower(*args)
    traced = time.perf_counter()
    run = lowered.compile(compiler_options=options or None)
    return Program(run, args, traced - start, time.perf_counter() - traced)


def loss_fn_of(config: Any) -> losses.LossFn:
    """The training loss of the config's network."""
    model, sde = models.create_model(config), sde_lib.from_config(config)

    def score_fn_of_params(params, model_state, keys):
        return get_score_fn(sde, model, params, model_state, train=True, dropout_keys=keys)

    return losses.get_loss_fn(config.training, sde, score_fn_of_params, config.model.sigma_data)


def images(config: Any, batch: int) -> jax.Array:
    """Noise in [-1, 1] in the place of images."""
    size, channels = config.data.image_size, config.data.num_channels
    return jax.random.uniform(jax.random.PRNGKey(1), (batch, size, size, channels), minval=-1.0)


def train_step(
    config: Any, batch: int, num_microbatches: int = 1, loss_fn: Any = None, x0: Any = None, **options: Any
) -> Program:
    """One optimiser step (state, x0) -> (state, metrics); x0: in place of `images`; options: the compiler's.

    With x0 a `jax.ShapeDtypeStruct` nothing is allocated, and the step overwrites the state, as in training.
    """
    x0 = images(config, batch) if x0 is None else x0
    optimizer = losses.get_optimizer(config.optim)

    def fresh(key):
        params, model_state = models.init_params(models.create_model(config), key, x0.shape)
        return new_state(params, model_state, optimizer, jax.random.PRNGKey(2))

    abstract = isinstance(x0, jax.ShapeDtypeStruct)
    state = jax.eval_shape(fresh, jax.random.PRNGKey(0)) if abstract else fresh(jax.random.PRNGKey(0))
    step_fn = losses.get_step_fn(
        loss_fn or loss_fn_of(config), optimizer, config.model.ema_rate, None, num_microbatches=num_microbatches
    )
    return compiled(step_fn, state, x0, donate=(0,) if abstract else (), **options)


def seconds(programs: dict[Any, Program], repeats: int = 5) -> dict[Any, float]:
    """Median wall time of each, run in turns: twice a turn, of which the first, with cold caches, does not count."""
    times: dict[Any, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            jax.block_until_ready(program.run(*program.args))
            start = time.perf_counter()
            jax.block_until_ready(program.run(*program.args))
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def parser(doc: str | None) -> argparse.ArgumentParser:
    """With --json."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    return result


def report(result: dict[str, Any], as_json: bool) -> None:
    """Prints the result with the machine: cores, load over the last minute, device, JAX."""
    machine = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "device": jax.devices()[0].device_kind}
    result = {**jax.tree.map(rounded, result), "machine": {**machine, "jax": jax.__version__}}
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name}: {value}")


def rounded(value: Any) -> Any:
    """Four digits of a float; anything else as it is."""
    return float(f"{value:.4g}") if isinstance(value, (float, jnp.floating)) else value
