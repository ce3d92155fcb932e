# SPDX-License-Identifier: Apache-2.0
"""Seconds from a launch to the first step: the second launch against the first.

python -m benchmarks.startup [--json] [--orders 1 3] [--config configs/digits/ve_ncsnpp.py]

Launches `main.py` twice for each order with an empty compilation cache, and takes the time until the first step's line.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import common


def seconds_to_first_step(config: str, order: int, cache: Path) -> float:
    """Of a new run, ended as soon as its first step is logged."""
    folder = Path(tempfile.mkdtemp())
    command = [sys.executable, "main.py", f"--config={config}", f"--workdir={folder}", "--mode=train"]
    command += [f"--compilation_cache={cache}", f"--config.training.score_matching_order={order}"]
    command += ["--config.training.log_freq=1", "--config.training.n_jitted_steps=1"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if "step 1/" in line:
                return time.perf_counter() - start
        raise SystemExit("no step was made:\n" + "".join(lines[-5:]))
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--orders", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--config", default="configs/digits/ve_ncsnpp.py")
    args = parser.parse_args()
    result = {}
    for order in args.orders:
        with tempfile.TemporaryDirectory() as cache:
            first, second = (seconds_to_first_step(args.config, order, Path(cache)) for _ in range(2))
        result[f"order {order}"] = {"first_launch": first, "second_launch": second, "ratio": second / first}
    common.report(result, args.json)


if __name__ == "__main__":
    main()
