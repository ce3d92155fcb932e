# SPDX-License-Identifier: Apache-2.0
"""How long the training loop waits for data: prefetched by threads, as it is, against made when asked for.

python -m benchmarks.input [--json] [--steps 30 | --only_large]

The digits with their config, Fashion-MNIST with its own, and 50,000 random 32x32x3 images with the digits' network,
batch 128 (Fashion-MNIST: 64): so many steps with two calls in flight, as in `loop.py`. The share is the time inside
`next` over the whole, the first batch not counted. A step on an accelerator is shorter than here, so the loader's own
speed, in images a second of one thread, is printed too. Last come batches of 1,024 of the random images, those
of a node of eight accelerators, by one thread and by the threads of training.
"""

import collections
import time
from unittest import mock

import jax
import numpy as np

import datasets
from benchmarks import common
from configs.digits import ve_ncsnpp as digits
from configs.fashion_mnist import ve_ncsnpp as fashion_mnist

IN_FLIGHT = 2


def synthetic() -> tuple:
    """Random 32x32x3 images for the digits' network, with flips and dequantisation."""
    config = digits.get_config()
    config.data.update(image_size=32, num_channels=3, random_flip=True)
    images = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)
    return config, datasets.Dataset("random", (32, 32, 3), True, images, images[:100])


def problems() -> dict[str, tuple]:
    configs = {"digits": digits.get_config(), "Fashion-MNIST": fashion_mnist.get_config()}
    known = {name: (config, datasets.load(config.data)) for name, config in configs.items()}
    return {**known, "random 32x32x3": synthetic()}


def loader_of(config, dataset, prefetch: bool):
    real = datasets.grain.ReadOptions
    options = {} if prefetch else {"num_threads": 0, "prefetch_buffer_size": 0}
    with mock.patch.object(datasets.grain, "ReadOptions", lambda **given: real(**{**given, **options})):
        return datasets.train_loader(dataset, config.data, batch_size=config.training.batch_size, seed=0)


def waiting_share(program: common.Program, loader, steps: int) -> float:
    """Of the wall time of `steps` steps."""
    state, _ = program.args
    in_flight: collections.deque = collections.deque()
    next(loader)
    waited, start = 0.0, time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        x = next(loader)["x"]
        waited += time.perf_counter() - asked
        state, metrics = program.run(state, jax.device_put(x))
        in_flight.append(metrics)
        if len(in_flight) > IN_FLIGHT:
            jax.block_until_ready(in_flight.popleft())
    jax.block_until_ready(state)
    return waited / (time.perf_counter() - start)


def images_a_second(loader, batch: int, batches: int = 20) -> float:
    next(loader)
    start = time.perf_counter()
    for _ in range(batches):
        next(loader)
    return batch * batches / (time.perf_counter() - start)


def large(batch: int = 1024) -> dict[str, float]:
    """Images a second of one host in batches of a node's size, more of them than the threads have made in advance."""
    config, dataset = synthetic()
    config.training.batch_size = batch
    threads, one = (images_a_second(loader_of(config, dataset, prefetch), batch, 60) for prefetch in (True, False))
    return {"images_a_second": threads, "ms_a_batch": 1e3 * batch / threads, "images_a_second_one_thread": one}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only_large", action="store_true", help="only the batches of 1,024")
    args = parser.parse_args()
    of_1024 = large()
    print(f"batches of 1,024: {of_1024}", flush=True)
    if args.only_large:
        common.report({"batches of 1,024": of_1024}, args.json)
        return
    rows = {}
    for name, (config, dataset) in problems().items():
        batch = config.training.batch_size
        program = common.train_step(config, batch)
        prefetched, in_line = (
            waiting_share(program, loader_of(config, dataset, prefetch), args.steps) for prefetch in (True, False)
        )
        speed = images_a_second(loader_of(config, dataset, prefetch=False), batch)
        rows[name] = {"waiting": prefetched, "waiting_in_line": in_line, "images_a_second_one_thread": speed}
        print(
            f"{name}: waits {prefetched:.2%} of the time, made in line {in_line:.2%}; {speed:.0f} images/s", flush=True
        )
    ratio = max(row["waiting"] for row in rows.values()) / max(row["waiting_in_line"] for row in rows.values())
    common.report({"rows": rows, "batches of 1,024": of_1024, "ratio of the largest": ratio}, args.json)


if __name__ == "__main__":
    main()
