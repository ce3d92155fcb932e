# SPDX-License-Identifier: Apache-2.0
"""Seconds from a launch to the first step: the second launch against the first; and order 3's compile time.

python -m benchmarks.startup [--json] [--orders 1 3] [--config configs/digits/ve_ncsnpp.py] [--skip_baseline]

Launches `main.py` twice for each order with an empty compilation cache, and takes the time until the first step's line.
The compile time of the step is set against the baseline's: the same loss with JAX's own convolutions, as the public
code has, in place of `models/convolution.py`.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from benchmarks import common
from configs.digits import ve_ncsnpp
from models import convolution


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


def compile_seconds(order: int, plain: bool) -> float:
    """Of the digits' step; plain: with JAX's own convolutions and their derivatives."""
    config = ve_ncsnpp.get_config()
    config.training.score_matching_order = order
    if not plain:
        return common.train_step(config, config.training.batch_size).compile_s

    class ElsewhereCpu:
        """What `conv2d` asks JAX for: any other back end gets JAX's own convolution."""

        default_backend = staticmethod(lambda: "baseline")

    with mock.patch.object(convolution, "jax", ElsewhereCpu):
        return common.train_step(config, config.training.batch_size).compile_s


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--orders", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--config", default="configs/digits/ve_ncsnpp.py")
    parser.add_argument("--skip_baseline", action="store_true", help="launches only")
    args = parser.parse_args()
    result = {}
    for order in args.orders:
        with tempfile.TemporaryDirectory() as cache:
            first, second = (seconds_to_first_step(args.config, order, Path(cache)) for _ in range(2))
        row = {"first_launch": first, "second_launch": second, "ratio": second / first}
        print(
            f"order {order}: first launch {first:.1f} s, second {second:.1f} s, ratio {second / first:.2f}", flush=True
        )
        if not args.skip_baseline:
            ours, plain = (compile_seconds(order, plain) for plain in (False, True))
            row |= {"compile": ours, "compile_baseline": plain, "compile_ratio": ours / plain}
            print(f"order {order}: compiled in {ours:.1f} s, the baseline in {plain:.1f} s", flush=True)
        result[f"order {order}"] = row
    common.report(result, args.json)


if __name__ == "__main__":
    main()
