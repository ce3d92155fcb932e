# SPDX-License-Identifier: Apache-2.0
"""Finds out within seconds whether a server answers. A download without a network would try for minutes."""

import ssl
import subprocess
import sys
import urllib.error
import urllib.request

SECONDS = 5.0


def why_unreachable(url: str) -> str:
    """Asks the server of `url`, or the environment's proxy. Returns '' if there is any answer, else the reason.

    A process of its own asks and is ended after `SECONDS`. The look-up of a name has no time-out, and a thread that
    waits for it would outlive this call.
    """
    try:
        done = subprocess.run([sys.executable, "-I", __file__, url], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"no answer within {SECONDS:g} s"
    return "" if done.returncode == 0 else (done.stderr.splitlines() or ["the probe failed"])[-1]


if __name__ == "__main__":
    try:
        urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="HEAD")).close()
    except OSError as error:  # an HTTP status or a failed handshake is an answer
        is_answer = isinstance(error, urllib.error.HTTPError) or isinstance(
            getattr(error, "reason", None), ssl.SSLError
        )
        sys.exit(None if is_answer else str(error))
