# SPDX-License-Identifier: Apache-2.0
"""Trackers, to which `records.MetricsLog` gives the finite metrics of a run: TensorBoard and Weights & Biases."""

import importlib
import io
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter

from errors import UserError


class TensorBoard:
    """Writes event files to `workdir/tensorboard`; takes back what an interrupted run logged after `step`."""

    def __init__(self, workdir: Path, step: int):
        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def image(self, step: int, tag: str, png: bytes) -> None:
        self._writer.add_image(tag, np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), step, dataformats="HWC")

    def histogram(self, step: int, tag: str, values: np.ndarray) -> None:
        self._writer.add_histogram(tag, values, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Logs to one wandb run for each workdir. `workdir/wandb/run_id.txt` names it, so that a resumed run goes on in it.

    wandb takes no step twice, and says so: what an interrupted run had logged is not logged again.
    WANDB_MODE=offline keeps all in `workdir/wandb`, for `wandb sync`.
    """

    def __init__(self, workdir: Path, project: str, config: Mapping[str, Any]):
        try:
            wandb: Any = importlib.import_module("wandb")  # by name, late: few have it, and it is slow to import
        except ImportError as error:
            raise UserError(
                f"training.wandb_project={project!r} needs wandb, which cannot be imported ({error}): "
                "pip install wandb, or leave the key empty"
            ) from error
        self._wandb = wandb
        run_id = workdir / "wandb" / "run_id.txt"
        if not run_id.exists():
            run_id.parent.mkdir(parents=True, exist_ok=True)
            run_id.write_text(secrets.token_hex(8))
        try:
            names = {"project": project, "name": workdir.resolve().name, "id": run_id.read_text().strip()}
            self._run = wandb.init(**names, dir=str(workdir), config=dict(config), resume="allow")
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"training.wandb_project={project!r}: wandb refuses ({reason}); "
                "run `wandb login`, set WANDB_MODE=offline, or leave the key empty"
            ) from error

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, tag: str, png: bytes) -> None:
        self._run.log({tag: self._wandb.Image(Image.open(io.BytesIO(png)))}, step=step)

    def histogram(self, step: int, tag: str, values: np.ndarray) -> None:
        self._run.log({tag: self._wandb.Histogram(values)}, step=step)

    def close(self) -> None:
        self._run.finish()


Tracker = TensorBoard | WeightsAndBiases


def open_trackers(workdir: Path, step: int, wandb_project: str, config: Mapping[str, Any]) -> list[Tracker]:
    """TensorBoard and, if a project is named, Weights & Biases. UserError if wandb is not installed, or refuses."""
    trackers: list[Tracker] = [TensorBoard(workdir, step)]
    if wandb_project:
        trackers.append(WeightsAndBiases(workdir, wandb_project, config))
    return trackers
