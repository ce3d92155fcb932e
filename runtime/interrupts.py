# SPDX-License-Identifier: Apache-2.0
"""Signals that ask a run to stop, and the agreement of all hosts on the step after which they stop."""

import collections
import contextlib
import signal
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np


class StopRequest:
    """Inside `with`, the first SIGTERM or SIGINT is noted, not obeyed; a second one ends the process as usual.

    Signals reach the hosts at different moments, yet all must leave a loop with collectives after the same step. So
    each host tells the others by a sum over all devices at every step. Its value is read two steps later, when it
    costs no waiting.
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

        due: whether this host's clock asks for a save. Only the first host's counts. What it asked for between its
        first request and the agreement asks for no second save.
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
