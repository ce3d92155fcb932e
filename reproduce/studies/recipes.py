# SPDX-License-Identifier: Apache-2.0
"""Recipes for bits/dim side by side, on the same data with the same steps: the public code's, and `configs/ml/`.

python -m reproduce.studies.recipes [--only digits,patches,fashion_mnist] [--seeds 3] [--workdir runs/reproduce]
                                    [--study recipes|radians] [--recipes vp,ve,ml_vp]

Trains and evaluates what is not there yet, as `python -m reproduce` does, and writes <out>/<study>_<data>.json: of each
recipe bits/dim, the paired difference to the best public recipe over the test images, evaluations of RK45
at a tolerance of 1e-5, and how far an even grid of 65 and 129 evaluations is from it on the same probes. Beside it
<out>/samples_<data>.png shows samples of seed 0 by the ODE, of VE and of the recipe for bits/dim from the same noise.
The study `radians` is the recipe `ml_vp` with other values of `model.log_snr_scale`, and differences are to that.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from errors import UserError
from report.canvas import png
from report.run_files import newest_npz
from reproduce import pictures
from reproduce.results import mean_and_error
from reproduce.runner import Run, run_all
from reproduce.studies import length

GRIDS = {65: 54, 129: 118}  # evaluations of the network: steps of `adams`
WEIGHTED = ("training.likelihood_weighting=True", "training.importance_weighting=True")
PLAIN = ("training.likelihood_weighting=False", "training.importance_weighting=False")
LEVELS = ("data.uniform_dequantization=False", "eval.dequantization=truncated_normal")
VE_VELOCITY = ("model.parameterization=velocity", "model.scale_by_sigma=False")
SAMPLED = ("ve", "ml_vp")  # whose samples are drawn side by side
PUBLIC = ("vp", "vp_weighted", "ve")
RADIANS = {f"ml_vp_{scale}": (f"model.log_snr_scale={scale}",) for scale in (1.0, 16.0, 64.0)}
LOG_SNR_MAX = {"digits": ("model.log_snr_max=7.8",)}  # half a level is 3 noises, as at 13.3 for 256
FOURIER = {"digits": "model.input_frequencies=(2, 3)"}  # the last turns once from level to level, as 7 does for 256
DATA = {  # name: config files of VP, VE and the recipe for bits/dim, and what all three change
    "digits": ("configs/digits/vp_ddpmpp.py", "configs/digits/ve_ncsnpp.py", "configs/ml/digits.py", ()),
    "patches": ("configs/patches/vp_ddpmpp.py", "configs/patches/ve_ncsnpp.py", "configs/ml/patches.py", ()),
    "fashion_mnist": (
        "configs/reproduce/fashion_vp.py",
        "configs/reproduce/fashion_ve.py",
        "configs/ml/fashion_mnist.py",
        ("eval.num_examples=512",),
    ),
}


def runs_of(study: str, data: str, seeds: int) -> list[Run]:
    """The runs of one data set for each seed: eight recipes, or that for bits/dim with four numbers of radians."""
    vp, ve, ml, common = DATA[data]
    levels = (*LEVELS, *LOG_SNR_MAX.get(data, ()))
    recipes = {
        "vp": (vp, PLAIN),
        "vp_weighted": (vp, WEIGHTED),
        "ve": (ve, ()),
        "ve_velocity": (ve, VE_VELOCITY),
        "ml_vp": (ml, ()),
        "ml_vp_levels": (ml, levels),
        "ml_vp_levels_fourier": (ml, (*levels, FOURIER.get(data, "model.input_frequencies=(6, 7)"))),
        "ml_straight": (ml, ("training.sde=straight",)),
    }
    radians = {"ml_vp": (ml, ()), **{name: (ml, overrides) for name, overrides in RADIANS.items()}}
    evaluations: list[tuple[str, tuple[str, ...]]] = [("eval", ("sampling.method=ode", "eval.num_samples=64"))]
    for evaluated, steps in GRIDS.items():
        grid = ("eval.enable_sampling=False", "eval.ode_solver=adams", f"eval.ode_steps={steps}")
        evaluations.append((f"eval_{evaluated}", grid))
    common = (*length(2_000), "training.snapshot_sampling=False", *common)
    return [
        Run(f"recipes_{data}", variant, seed, config, (*common, *overrides), evaluations=tuple(evaluations))
        for seed in range(seeds)
        for variant, (config, overrides) in (recipes if study == "recipes" else radians).items()
    ]


def measured(folder: Path) -> dict[str, np.ndarray]:
    """bits/dim [N] by RK45 and by each even grid, and evaluations of RK45 [N], of an evaluated run."""
    found: dict[str, np.ndarray] = {}
    for name in ("eval", *(f"eval_{n}" for n in GRIDS)):
        if (newest := newest_npz(folder / name, "bpd_*.npz", "bpd", "nfe")) is None:
            raise UserError(f"{folder / name} has no likelihoods; run the study without --collect")
        found[name] = newest[1]["bpd"].mean(axis=0)
        if name == "eval":
            found["nfe"] = newest[1]["nfe"].mean(axis=0)
    return found


def table(workdir: Path, runs: list[Run]) -> dict[str, dict[str, Any]]:
    """A row for each recipe; differences are to the public recipe of the lowest mean, or else to the first."""
    by_recipe: dict[str, list[dict[str, np.ndarray]]] = {}
    for run in runs:  # seeds in the same order for each
        by_recipe.setdefault(run.variant, []).append(measured(workdir / run.folder))
    public = [name for name in PUBLIC if name in by_recipe] or [next(iter(by_recipe))]
    best = min(public, key=lambda name: np.mean([run["eval"].mean() for run in by_recipe[name]]))
    return {name: _row(here, by_recipe[best], best) for name, here in by_recipe.items()}


def _row(here: Sequence[Mapping], reference: Sequence[Mapping], best: str) -> dict[str, Any]:
    gains = [run["eval"] - other["eval"] for run, other in zip(here, reference, strict=True)]
    errors = {f"error_{n}": np.mean([np.abs(run[f"eval_{n}"] - run["eval"]).mean() for run in here]) for n in GRIDS}
    return {
        "bpd": mean_and_error([run["eval"].mean() for run in here]),
        f"minus {best}": mean_and_error([gain.mean() for gain in gains]),
        "paired stderr over images": float(np.mean(gains, axis=0).std(ddof=1) / np.sqrt(len(gains[0]))),
        "nfe": float(np.mean([run["nfe"].mean() for run in here])),
        **{name: float(error) for name, error in errors.items()},
    }


def samples(workdir: Path, runs: Sequence[Run]) -> bytes | None:
    """A PNG of the samples of `SAMPLED` with seed 0, None unless all of them are there."""
    folders = {run.variant: workdir / run.folder / "eval" for run in runs if run.seed == 0}
    found = {name: newest_npz(folders[name], "samples_*.npz") for name in SAMPLED if name in folders}
    shown = {name: newest[1] for name, newest in found.items() if newest}
    return png(pictures.grids(shown)) if len(shown) == len(SAMPLED) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--out", type=Path, default=Path("assets/reproduce"))
    parser.add_argument("--only", default=",".join(DATA), help="names of data sets, with commas between them")
    parser.add_argument("--study", choices=("recipes", "radians"), default="recipes")
    parser.add_argument("--recipes", default="", help="their names, with commas between them; all if empty")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time")
    parser.add_argument("--collect", action="store_true", help="run nothing; the numbers of what is there")
    args = parser.parse_args()
    if unknown := [name for name in args.only.split(",") if name not in DATA]:
        parser.error(f"no data {', '.join(unknown)}; there are {', '.join(DATA)}")
    for data in args.only.split(","):
        runs = runs_of(args.study, data, args.seeds)
        if args.recipes:
            chosen = args.recipes.split(",")
            if unknown := set(chosen) - {run.variant for run in runs}:
                parser.error(f"no recipe {', '.join(sorted(unknown))} in the study {args.study}")
            runs = [run for run in runs if run.variant in chosen]
        if not args.collect and (failures := run_all(args.workdir, runs, args.jobs)):
            raise UserError("; ".join(failures))
        path = args.out / f"{args.study}_{data}.json"
        path.write_text(json.dumps(table(args.workdir, runs), indent=1) + "\n")
        print(path)
        if picture := samples(args.workdir, runs):
            path.with_name(f"samples_{data}.png").write_bytes(picture)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
