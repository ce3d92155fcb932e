# SPDX-License-Identifier: Apache-2.0
"""Scratch memory of a training step at batch 128: order 3 in micro-batches against order 1 whole, and `nn.remat`.

python -m benchmarks.memory [--json] [--batch 128] [--microbatches 8]

`compiled.memory_analysis().temp_size_in_bytes` of each step, the arguments and results (parameters, Adam's moments)
not counted. The baseline is the public code's way, the whole batch at once in one graph. Nothing is run, so the
compiler's back end need not optimise; that does not change the plan of the buffers.
"""

from benchmarks import common


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--microbatches", type=int, default=8)
    args = parser.parse_args()
    many = args.microbatches
    rows = {}
    for order, parts, remat in [(3, many, False), (1, 1, False), (3, many, True), (1, 1, True), (3, 1, False)]:
        config = common.ddpmpp_config(order, remat=remat)
        step = common.train_step(config, args.batch, parts, xla_backend_optimization_level=0)
        name = f"order {order}, {parts} micro-batch(es)" + (", remat" if remat else "")
        rows[name] = step.scratch_mb
        print(f"{name}: {step.scratch_mb:.1f} MB", flush=True)
    small = rows[f"order 3, {many} micro-batch(es)"]
    ratios = {
        "order 3 in micro-batches over order 1 whole": small / rows["order 1, 1 micro-batch(es)"],
        "order 3 in micro-batches over order 3 whole": small / rows["order 3, 1 micro-batch(es)"],
    }
    common.report({"scratch_mb": rows, **ratios}, args.json)


if __name__ == "__main__":
    main()
