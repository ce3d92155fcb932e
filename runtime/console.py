# SPDX-License-Identifier: Apache-2.0
"""The text of `main.py --help`, and the format of the log. Nothing slow is imported, so that --help answers at once."""

import ast
import logging as std_logging
import textwrap
from collections.abc import Mapping
from pathlib import Path

from absl import logging

from errors import UserError

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
    for path in sorted(root.glob("configs/*/[!_]*.py")):
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


class _Console(std_logging.Formatter):
    """Shows the time of day and the message; marks a warning or an error as such."""

    def __init__(self):
        super().__init__("%(asctime)s %(mark)s%(message)s", "%H:%M:%S")

    def format(self, record: std_logging.LogRecord) -> str:
        record.mark = f"{record.levelname}: " if record.levelno >= std_logging.WARNING else ""
        return super().format(record)


def quieten_libraries() -> None:
    """Silences what libraries log below a warning; to be called before the first of them logs."""
    for name in ("jax", "orbax", "tensorboardX"):
        std_logging.getLogger(name).setLevel(std_logging.WARNING)
    logging.get_absl_handler().addFilter(_from_this_project)
    logging.get_absl_handler().setFormatter(_Console())


def set_up_logging(workdir: Path, to_file: bool) -> None:
    """Sends progress to the console and, if `to_file`, appends it to `workdir/stdout.txt`."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = std_logging.FileHandler(workdir / "stdout.txt") if to_file else std_logging.NullHandler()
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {error.strerror}") from error
    file.setFormatter(std_logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    std_logging.getLogger().addHandler(file)
    logging.set_verbosity(logging.INFO)
    file.addFilter(_from_this_project)


def _from_this_project(record: std_logging.LogRecord) -> bool:
    """Whether a record is this project's or a warning: orbax and grain log their routine through absl as well."""
    return record.levelno >= std_logging.WARNING or "site-packages" not in record.pathname
