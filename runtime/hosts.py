# SPDX-License-Identifier: Apache-2.0
"""Several hosts as one run, by `jax.distributed`."""

import ctypes
import hashlib
import os
import re
import signal
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from errors import UserError

HEARTBEAT_S = 60  # a host that gives no sign of life for so long counts as dead
LOST = (
    "error: another host of this run has died or cannot be reached, so this one ends too; look at the others' output "
    "and start all of them again, which goes on from the newest checkpoint"
)
_OF_A_LOSS = re.compile(
    "Gloo .* failed|coordination service|Connection (reset|closed)|Socket closed|remote process exited", re.IGNORECASE
)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _ON_ABORT(_: int) -> None:  # noqa: N802
    """Ends the process in one line where JAX aborts it: its thread hears of a dead host and can raise no exception."""
    abandon(LOST)


def initialize(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins this process to the others of its run; to be called before the first use of a device.

    Without the three arguments it recognises a SLURM job of several tasks and a TPU pod; a process alone stays alone.
    Raises UserError if some arguments are missing, or if the others cannot be reached.
    """
    names = "--coordinator_address", "--num_processes", "--process_id"
    values = coordinator_address, num_processes, process_id
    missing = [name for name, value in zip(names, values, strict=True) if value is None]
    if 0 < len(missing) < 3:
        raise UserError(f"several hosts need {', '.join(names)}: {' and '.join(missing)} missing")
    if missing and not _scheduled():
        return
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id} must be in 0 .. --num_processes - 1 = {num_processes - 1}")
    if num_processes == 1:
        return
    # Else a process may run two programs at once on the CPU, whose sums over the hosts meet the wrong partners.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=120,
            heartbeat_timeout_seconds=HEARTBEAT_S,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        where = coordinator_address or "the scheduler's coordinator"
        raise UserError(f"the other hosts of this run cannot be reached through {where}: {reason}") from error
    ctypes.CDLL(None).signal(signal.SIGABRT, _ON_ABORT)


def number_of_first(number: int) -> int:
    """The first host's number, on every host."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number))) if jax.process_count() > 1 else number


def check_same(facts: str) -> None:
    """Raises UserError, on every host, if the `facts` of all hosts (config, digest of the parameters) are not equal."""
    if jax.process_count() == 1:
        return
    digests = multihost_utils.process_allgather(np.frombuffer(hashlib.sha256(facts.encode()).digest(), np.uint8))
    others = np.flatnonzero((digests != digests[0]).any(axis=1)).tolist()
    if others:
        raise UserError(
            f"process {', '.join(map(str, others))} of this run has config or parameters other than the first's; "
            "start all with the same command, config and --workdir, which all must see"
        )


def is_loss(error: Exception | None) -> bool:
    """Whether this is the error that a collective raises when another host has died."""
    return isinstance(error, (ValueError, RuntimeError)) and bool(_OF_A_LOSS.search(str(error)))


def abandon(message: str) -> None:
    """Ends this process at once if it is one of several: the others must see it die, or they would wait for it."""
    if jax.distributed.is_initialized():
        print(message, file=sys.stderr, flush=True)
        os._exit(1)


def _scheduled() -> bool:
    """Whether this process is in a SLURM step of several tasks, or on one of several workers of a TPU pod."""
    slurm = "SLURM_JOB_ID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    return slurm or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
