# SPDX-License-Identifier: Apache-2.0
"""The text of `python main.py --help`. This module imports nothing slow, so that the answer comes at once."""

import ast
import textwrap
from collections.abc import Mapping
from pathlib import Path

WIDTH = 120
MODES = {
    "train": "trains the score model; started again in the same workdir, goes on from its newest checkpoint",
    "eval": "likelihoods, samples and metrics of a trained model, into WORKDIR/eval and WORKDIR/report/report.html",
    "train_deq": "trains a variational dequantiser of a trained model of images; eval.dequantizer then uses it",
    "stats": "statistics of the training images for FID and KID, once for each data set; needs no workdir",
}
EXAMPLES = (
    "python main.py --config configs/toy/mog_ve.py --workdir runs/mog --mode train",
    "python main.py --config configs/toy/mog_ve.py --workdir runs/mog --mode eval --config.eval.num_samples=1000",
    "python main.py --config configs/digits/ve_ncsnpp.py --workdir runs/d --mode train --config.training.n_iters=500",
)


def help_text(flags: Mapping[str, str], root: Path) -> str:
    """The text, from the flags (name -> what it does, default included) and the folder `root` that holds `configs/`."""
    configs = {}
    for path in sorted(root.glob("configs/*/*.py")):
        if path.name != "__init__.py":
            docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
            configs[str(path.relative_to(root))] = docstring.partition("\n")[0]
    parts = [
        "Trains and evaluates score-based diffusion ODEs by denoising score matching of order 1, 2 or 3.",
        "usage: python main.py --config FILE --workdir FOLDER --mode MODE [--config.SECTION.KEY=VALUE ...]",
        "modes\n" + _table(MODES),
        "flags\n" + _table({f"--{name}": what for name, what in flags.items()}),
        "examples\n" + "\n".join(f"  {example}" for example in EXAMPLES),
        "config files\n" + _table(configs),
        "configs/default_configs.py has every key and its default; another key is refused. More: README.md, --helpfull",
    ]
    return "\n\n".join(parts)


def _table(rows: Mapping[str, str]) -> str:
    width = max(map(len, rows)) + 4
    lines = []
    for name, what in rows.items():
        first, *others = textwrap.wrap(what, WIDTH - width) or [""]
        lines += [f"  {name}".ljust(width) + first, *(" " * width + line for line in others)]
    return "\n".join(lines)
