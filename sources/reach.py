# SPDX-License-Identifier: Apache-2.0
"""Whether a server answers, found out within seconds. A download without a network would try for minutes."""

import ssl
import subprocess
import sys
import urllib.error
import urllib.request

SECONDS = 5.0


def why_unreachable(url: str) -> str:
    """Asks the server of `url`, or the proxy of the environment. Returns '' if there is any answer, else the reason.

    A process of its own asks, and is ended after `SECONDS`: the look-up of a name has no time-out, and a thread that
    waits for it would outlive this call.
    """
    try:
        done = subprocess.run([sys.executable, "-I", __file__, url], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"no answer within {SECONDS:g} s"
    return "" if done.returncode == 0 else (done.stderr.splitlines() or ["the probe failed"])[-1]


def _ask(url: str) -> None:
    """Ends the process with the reason if there is no answer. What an answer is worth the download will tell."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD")).close()
    except urllib.error.HTTPError:
        return
    except OSError as error:
        if not isinstance(getattr(error, "reason", None), ssl.SSLError):
            sys.exit(str(error))


if __name__ == "__main__":
    _ask(sys.argv[1])
