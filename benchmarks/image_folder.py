# SPDX-License-Identifier: Apache-2.0
"""A folder of image files: what indexing it costs, and how much faster a loader reads the index than the files.

python -m benchmarks.image_folder [--json] [--count 10000]

Writes so many PNG files of 128x96 colour pixels into a temporary folder and loads them as `IMAGE_FOLDER` at 32x32, in
three processes with two empty caches: one that is killed (SIGKILL) halfway, one that goes on there, and one without
interruption. Seconds are of `datasets.load`; memory is the process's peak above what it had after its imports. Then a
loader of one thread, batch 128, is timed against decoding each file when it is asked for.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import datasets
from benchmarks import common
from benchmarks.input import images_a_second, loader_of
from configs.default_patches_configs import get_patches_configs
from sources import images

SIZE = 32


def config_of(folder: Path):
    config = get_patches_configs(SIZE)
    config.data.update(dataset="IMAGE_FOLDER", dir=str(folder))
    return config


def write_images(folder: Path, count: int) -> None:
    """Random colours at 16x12, enlarged, with a little noise: PNG files of about 25 kB."""
    rng = np.random.default_rng(0)
    for k in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((128, 96))
        noisy = np.clip(np.asarray(coarse) + rng.integers(-4, 5, (96, 128, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{k:06d}.png")


def load_here(folder: Path) -> dict[str, float]:
    """Loads the folder in this process."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    dataset = datasets.load(config_of(folder).data)
    seconds = time.perf_counter() - start
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": seconds, "peak_mb": kilobytes / 1e3, "images": len(dataset.train) + len(dataset.test)}


def start(folder: Path, cache: Path) -> subprocess.Popen:
    """A process that calls `load_here` with this cache."""
    command = [sys.executable, "-m", "benchmarks.image_folder", f"--load={folder}"]
    return subprocess.Popen(command, env={**os.environ, "XDG_CACHE_HOME": str(cache)}, stdout=subprocess.PIPE)


def result_of(process: subprocess.Popen) -> dict[str, float]:
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"error: loading ended with {process.returncode}")
    return json.loads(output)


def kill_at(process: subprocess.Popen, cache: Path, count: int) -> int:
    """Kills the process once `count` files are in the manifest, and returns how many there are."""
    while process.poll() is None:
        manifests = list(cache.rglob("manifest.jsonl"))
        if manifests and (known := manifests[0].read_bytes().count(b"\n")) >= count:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return known
        time.sleep(0.01)
    raise SystemExit("error: loading ended before it was killed")


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--load", type=Path, help="only load this folder here")
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load_here(args.load)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder, killed, whole = (Path(temporary, name) for name in ("images", "killed", "whole"))
        folder.mkdir()
        write_images(folder, args.count)
        known = kill_at(start(folder, killed), killed, args.count // 2)
        result = {"files when killed": known, "then": result_of(start(folder, killed))}
        result |= {"without interruption": result_of(start(folder, whole))}
        result |= {"again": result_of(start(folder, whole))}
        same = [[path.read_bytes() for path in cache.rglob("images") if path.is_file()] for cache in (killed, whole)]
        result["the same images"] = same[0] == same[1]

        os.environ["XDG_CACHE_HOME"] = str(whole)
        config = config_of(folder)
        dataset = datasets.load(config.data)
        from_index = images_a_second(loader_of(config, dataset, prefetch=False), 128)
        begin, files = time.perf_counter(), sorted(folder.iterdir())[:1_000]
        for path in files:
            images.square(path, SIZE, 3)
        from_files = len(files) / (time.perf_counter() - begin)
        speeds = {"index": from_index, "files": from_files}
        common.report({**result, "images/s, one thread": speeds, "ratio": from_index / from_files}, args.json)


if __name__ == "__main__":
    main()
