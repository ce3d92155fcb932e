# SPDX-License-Identifier: Apache-2.0
"""How large the gradient of each order's term is in a trained model, and what weight gives the third a stated share.

python -m reproduce.studies.shares RUN [RUN ...] [--batches 16] [--out assets/reproduce/shares.json]

Each run is a folder of `--mode train`; its newest kept checkpoint is taken, and batches of its training split.
`mean` is the norm of the gradient of the term's expectation, `spread` the root of the mean squared distance of an
example's gradient from it, both estimated from batches and their differences, at weight 1. A batch of B has a norm of
sqrt(mean^2 + spread^2 / B), of which `share` is made.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import datasets
import losses
from errors import UserError
from task import restored

WEIGHTS = {"first": 1.0, "second": 1.0, "third": 1.0}
SHARES = (0.1, 0.3)


def gradients(folder: Path, batches: int) -> tuple[np.ndarray, int]:
    """Gradients [batches, 3, P] of the terms of a run's model on as many training batches, and the batch size."""
    built, params, model_state = restored(folder)
    config = built.config
    config.training.score_matching_order = 3
    size = config.training.batch_size
    antithetic = size if config.training.antithetic_times else 0

    def score_fn_of(params, model_state, _):
        return built.score_fn(params, model_state)

    loss_fn = losses.get_loss_fn(config.training, built.sde, score_fn_of, config.model.sigma_data, antithetic)
    of_batch = jax.jit(losses.get_term_gradients_fn(loss_fn, WEIGHTS))
    found = []
    for number in range(batches):
        index = np.arange(number * size, (number + 1) * size) % len(built.dataset.train)
        x = datasets.eval_batch(built.dataset, config.data, "train", index, seed=config.seed, repeat=0)
        tree = of_batch(params, model_state, x, np.arange(size), jax.random.PRNGKey(number))
        found.append(np.concatenate([np.asarray(leaf).reshape(3, -1) for leaf in jax.tree.leaves(tree)], axis=1))
    return np.stack(found).astype(np.float64), size


def summary(found: np.ndarray, size: int) -> dict[str, Any]:
    """Mean, spread and share of each term, and the third's weights for SHARES of the sum of the norms."""
    mean = found.mean(axis=0)
    variance = np.sum(np.var(found, axis=0, ddof=1), axis=1)  # of a batch's gradient
    square = np.maximum(np.sum(mean**2, axis=1) - variance / len(found), 0)
    norms = np.sqrt(np.mean(np.sum(found**2, axis=2), axis=0))
    columns = {"mean": np.sqrt(square), "spread": np.sqrt(variance * size), "share": norms / norms.sum()}
    terms = {name: {key: float(c[k]) for key, c in columns.items()} for k, name in enumerate(WEIGHTS)}
    weights = {str(share): float(share / (1 - share) * norms[:2].sum() / norms[2]) for share in SHARES}
    return {"batch_size": size, "terms": terms, "third_order_weight_of_share": weights}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("assets/reproduce/shares.json"))
    args = parser.parse_args()
    table = {}
    for run in args.runs:
        result = table["/".join(run.parts[-2:])] = summary(*gradients(run, args.batches))
        for name, row in result["terms"].items():
            print(f"{run}: {name:7}" + "".join(f"  {key} {value:.3g}" for key, value in row.items()))
        for share, weight in result["third_order_weight_of_share"].items():
            print(f"{run}: third_order_weight for a share of {share}: {weight:.3g}", flush=True)
    args.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
