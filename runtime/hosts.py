# SPDX-License-Identifier: Apache-2.0
"""Several hosts as one run, by `jax.distributed`."""

import os
import sys

import jax

from errors import UserError


def initialize(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins this process to the others of its run, before the first use of a device; alone it does nothing.

    The three arguments are given together, or none is and a SLURM job of several tasks or a TPU pod is recognised.
    UserError if some are missing, or the others cannot be reached.
    """
    given = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise UserError(f"several hosts need {', '.join(given)}: {' and '.join(missing)} missing")
    if missing and not _scheduled():
        return
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id} must be in 0 .. --num_processes - 1 = {num_processes - 1}")
    if num_processes == 1:
        return
    # Else two programs of a process may run at once on the CPU, and their sums over the hosts meet the wrong partners.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(coordinator_address, num_processes, process_id, initialization_timeout=120)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        where = coordinator_address or "the scheduler's coordinator"
        raise UserError(f"the other hosts of this run cannot be reached through {where}: {reason}") from error


def abandon(message: str) -> None:
    """Ends this process at once if it is one of several: the others would wait for it in vain, so must see it die."""
    if jax.distributed.is_initialized():
        print(message, file=sys.stderr, flush=True)
        os._exit(1)


def _scheduled() -> bool:
    """In a SLURM step of several tasks, or on one of several workers of a TPU pod."""
    slurm = "SLURM_JOB_ID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    return slurm or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
