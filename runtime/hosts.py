# SPDX-License-Identifier: Apache-2.0
"""Several hosts as one run, by `jax.distributed`: how they join, what they agree on, signals that stop them."""

import collections
import contextlib
import ctypes
import hashlib
import os
import re
import signal
import sys
import threading
import urllib.request
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
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
_ENDING = threading.Lock()


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _ON_ABORT(_: int) -> None:  # noqa: N802
    """Ends the process in one line where a thread of JAX hears of a dead host and aborts."""
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
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id} must be in 0 .. --num_processes - 1 = {num_processes - 1}")
    tasks, nodes = os.environ.get("SLURM_STEP_NUM_TASKS", "1"), os.environ.get("SLURM_STEP_NUM_NODES")
    slurm = "SLURM_JOB_ID" in os.environ and int(tasks) > 1
    scheduled = slurm or "," in _tpu_workers()
    if num_processes == 1 or (missing and not scheduled):
        return
    # Else a process may run two programs at once on the CPU, whose sums over the hosts meet the wrong partners.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        options: dict[str, Any] = {"initialization_timeout": 120, "heartbeat_timeout_seconds": HEARTBEAT_S}
        if tasks == nodes and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
            options["local_device_ids"] = []  # of its node all: under SLURM JAX would give each task one device
        jax.distributed.initialize(coordinator_address, num_processes, process_id, **options)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        where = coordinator_address or "the scheduler's coordinator"
        raise UserError(f"the other hosts of this run cannot be reached through {where}: {reason}") from error
    ctypes.CDLL(None).signal(signal.SIGABRT, _ON_ABORT)


def _tpu_workers() -> str:
    """The hosts of this TPU slice, with commas between them; '' where there is no TPU.

    GKE names them in the environment, and a TPU VM of Google Cloud asks its metadata server.
    """
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if name in os.environ:
            return os.environ[name]
    if "TPU_SKIP_MDS_QUERY" in os.environ:  # set by JAX on a machine without a TPU
        return ""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=10
        ) as page:
            return page.read().decode()
    except OSError:
        return ""


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


def abandon(message: str, error: Exception | None = None) -> None:
    """Ends this process at once if it is one of several: the others must see it die, or they would wait for it.

    If `error` is what a collective raises when another host has died, the message is `LOST`.
    """
    if jax.distributed.is_initialized():
        is_loss = isinstance(error, (ValueError, RuntimeError)) and _OF_A_LOSS.search(str(error))
        _ENDING.acquire()  # for good: a second thread that comes here waits for the end
        sys.stderr.flush()
        stderr = os.dup(2)
        with open(os.devnull, "w") as nowhere:  # a thread of JAX that learns of the loss at once writes to it, too
            os.dup2(nowhere.fileno(), 2)
        os.write(stderr, f"{LOST if is_loss else message}\n".encode())
        os._exit(1)


class StopRequest:
    """Inside `with`, the first SIGTERM or SIGINT is noted, not obeyed; a second one ends the process as usual.

    All hosts must leave a loop with collectives after the same step. So each tells the others of a signal by a sum over
    all devices at every step. The sum is read two steps later, when it costs no waiting.
    """

    def __init__(self):
        self.signal = ""
        self._previous = {}
        self._sums: collections.deque = collections.deque()
        self._already = 0  # how many of the sums under way are from before the save that was agreed last
        self._sum = jax.pmap(lambda flag: jax.lax.psum(flag, "hosts"), axis_name="hosts")

    def __enter__(self):
        with contextlib.suppress(ValueError):  # this is not the main thread, which alone gets signals
            self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        self.__exit__()

    def agreed(self, due: bool) -> tuple[bool, bool]:
        """Whether to stop, and whether to save, after this step. All hosts call it once after each step.

        due: whether this host's clock asks for a save. Only the first host's counts, once until that save is due.
        """
        if jax.process_count() == 1:
            return bool(self.signal), due
        flags = np.array([bool(self.signal), due and jax.process_index() == 0], np.float32)
        self._sums.append(self._sum(jnp.asarray(np.stack([flags] * jax.local_device_count()))))
        if len(self._sums) <= 2:
            return False, False
        stop, due = (np.asarray(self._sums.popleft().addressable_data(0)).reshape(-1) > 0).tolist()
        if stop and not self.signal:
            self.signal = "a signal to another host"
        due = due and not self._already
        self._already = len(self._sums) if due else max(0, self._already - 1)
        return stop, due
