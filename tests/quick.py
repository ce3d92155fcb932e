# SPDX-License-Identifier: Apache-2.0
"""`jax.jit` for programs that run once or twice, so that compilation is most of their time."""

import functools

import jax

# The lowering by XLA's fusion emitters takes most of the compilation of small programs. Other devices lack the option.
_OPTIONS = {"xla_cpu_use_fusion_emitters": False} if jax.default_backend() == "cpu" else {}
jit = functools.partial(jax.jit, compiler_options={**_OPTIONS, "xla_backend_optimization_level": 0})
# for those that work on many numbers or for many steps
busy_jit = functools.partial(jax.jit, compiler_options={**_OPTIONS, "xla_backend_optimization_level": 1})
