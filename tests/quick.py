# SPDX-License-Identifier: Apache-2.0
"""`jit` for programs that run once or twice on small arrays, so that compilation is their time."""

import functools

import jax

# Unoptimised, and without XLA's fusion emitters, whose lowering takes three quarters of what is left then.
OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
jit = functools.partial(jax.jit, compiler_options=OPTIONS)
