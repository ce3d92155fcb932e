# SPDX-License-Identifier: Apache-2.0
"""`jax.jit` for programs that run once or twice, so that compilation is most of their time."""

import functools

import jax


def options(backend: str, level: int) -> dict[str, bool | int]:
    """Of the compiler.

    The lowering by XLA's fusion emitters takes most of the compilation of small programs. Other devices lack it.
    """
    of_backend = {"xla_cpu_use_fusion_emitters": False} if backend == "cpu" else {}
    return {**of_backend, "xla_backend_optimization_level": level}


jit = functools.partial(jax.jit, compiler_options=options(jax.default_backend(), 0))
# for those that work on many numbers or for many steps
busy_jit = functools.partial(jax.jit, compiler_options=options(jax.default_backend(), 1))
