# SPDX-License-Identifier: Apache-2.0
"""How time and scratch memory of a training step grow with batch, resolution, order and number of probes.

python -m benchmarks.growth [--json] [--out benchmarks/growth.png] [--levels 2] [--batches 8 16 32 128]

DDPM++ of two resolutions and one block a resolution, without attention (it alone is quadratic in the pixels), so that
the some twenty programs compile in minutes; batch 16 and 16x16x3 where nothing else is said. Medians of 5, in turns.
An exponent e is the slope of log cost against log size: cost ~ size^e. Probes share one evaluation of the score.
"""

import math
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import matplotlib

import losses
from benchmarks import common

ORDERS = (1, 2, 3)


def averaged_over_probes(count: int):
    """`losses.dsm_losses` averaged over `count` probes."""
    one = losses.dsm_losses
    if count == 1:
        return one

    def several(sde, score_fn, x0, t, z, v, order, exact):
        probes = jax.random.rademacher(jax.random.PRNGKey(3), (count, *v.shape), v.dtype)
        terms = jax.vmap(lambda v: one(sde, score_fn, x0, t, z, v, order, exact))(probes)
        return jax.tree.map(lambda term: jnp.mean(term, axis=0), terms)

    return several


def exponent(sizes, costs) -> float:
    """Least-squares slope of log cost against log size."""
    x, y = ([math.log(value) for value in values] for values in (sizes, costs))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def measure(args) -> list[dict]:
    """One row a program: what grows, its size, the order, seconds and scratch memory."""
    model = dict(nf=args.nf, ch_mult=(1, 2)[: args.levels], num_res_blocks=1, attn_resolutions=())
    lines = [("batch", args.batches), ("resolution", args.sizes), ("probes", args.probes)]
    places = {
        (what, size, order): (order, *({"batch": 16, "resolution": 16, "probes": 1} | {what: size}).values())
        for order in ORDERS
        for what, sizes in lines
        for size in sizes
        if order > 1 or what != "probes"
    }
    programs = {}
    for order, batch, resolution, count in dict.fromkeys(places.values()):
        config = common.ddpmpp_config(order, resolution, **model)
        with mock.patch.object(losses, "dsm_losses", averaged_over_probes(count)):
            program = common.train_step(config, batch)
        programs[order, batch, resolution, count] = program
        print(f"{order=} {batch=} {resolution=} probes={count}: compiled in {program.compile_s:.0f} s", flush=True)
    times = common.seconds(programs)
    return [
        {"what": what, "size": size, "order": order, "seconds": times[key], "scratch_mb": programs[key].scratch_mb}
        for (what, size, order), key in places.items()
    ]


def fit(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Exponents of time and memory, by what grows and the order."""
    result = {}
    for what, order in sorted({(row["what"], row["order"]) for row in rows}):
        line = [row for row in rows if (row["what"], row["order"]) == (what, order)]
        sizes = [row["size"] for row in line]
        result[f"{what}, order {order}"] = {
            cost: round(exponent(sizes, [row[cost] for row in line]), 2) for cost in ("seconds", "scratch_mb")
        }
    return result


def plot(rows: list[dict], exponents: dict, path: Path) -> None:
    """One column for what grows, time above memory, one line an order with its exponent."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = ("batch", "resolution", "probes")
    figure, axes = plt.subplots(2, len(kinds), figsize=(11, 6), layout="constrained")
    for column, what in enumerate(kinds):
        for axis, (cost, label) in zip(
            axes[:, column], {"seconds": "seconds a step", "scratch_mb": "scratch MB"}.items(), strict=True
        ):
            for order in ORDERS:
                line = [row for row in rows if (row["what"], row["order"]) == (what, order)]
                if line:
                    slope = exponents[f"{what}, order {order}"][cost]
                    points = [row["size"] for row in line], [row[cost] for row in line]
                    axis.loglog(*points, "o-", label=f"order {order}: {slope:.2f}")
            axis.set(xlabel=what, ylabel=label)
            axis.set_xticks(sorted({row["size"] for row in rows if row["what"] == what}))
            axis.xaxis.set_major_formatter("{x:.0f}")
            axis.minorticks_off()
            axis.legend(title="exponent", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--out", type=Path, default=None, help="PNG to write")
    parser.add_argument("--nf", type=int, default=16)
    parser.add_argument("--levels", type=int, default=2, choices=(1, 2), help="resolutions of the network")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32, 128])
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--probes", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    rows = measure(args)
    exponents = fit(rows)
    if args.out:
        plot(rows, exponents, args.out)
    at_16 = {row["order"]: row for row in rows if row["what"] == "resolution" and row["size"] == 16}
    ratios = {f"order {n} over 1": at_16[n]["seconds"] / at_16[1]["seconds"] for n in (2, 3)}
    rows = [jax.tree.map(common.rounded, row) for row in rows]
    common.report({"rows": rows, "exponents": exponents, "time": ratios}, args.json)


if __name__ == "__main__":
    main()
