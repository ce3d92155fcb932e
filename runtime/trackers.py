# SPDX-License-Identifier: Apache-2.0
"""Where the metrics of a run go beside `metrics.jsonl`: TensorBoard, and Weights & Biases for those who ask for it."""

import importlib
import io
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter

from errors import UserError


@runtime_checkable
class Tracker(Protocol):
    """What `records.MetricsLog` asks of one; a tag is `split/name`, all numbers are finite."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One number for each tag."""
        ...

    def image(self, step: int, tag: str, png: bytes) -> None:
        """A picture, as a PNG."""
        ...

    def histogram(self, step: int, tag: str, values: np.ndarray) -> None:
        """Of values [N]."""
        ...

    def close(self) -> None:
        """Writes what it still holds."""
        ...


def open_trackers(workdir: Path, step: int, wandb_project: str, config: Mapping[str, Any]) -> list[Tracker]:
    """TensorBoard and, if a project is named, Weights & Biases, for a run that goes on from `step`.

    UserError if wandb is wanted and not installed, or refuses.
    """
    trackers: list[Tracker] = [TensorBoard(workdir, step)]
    if wandb_project:
        trackers.append(WeightsAndBiases(workdir, wandb_project, config))
    return trackers


class TensorBoard:
    """Event files in `workdir/tensorboard`; what an interrupted run logged after `step` is taken back."""

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
    """One run of a project for each workdir: `workdir/wandb/run_id.txt` names it, so that a resumed run goes on in it.

    A step that an interrupted run had logged already is not logged again: wandb takes no step twice, and says so.
    WANDB_MODE=offline keeps all of it in `workdir/wandb`, for `wandb sync`.
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
        try:
            self._run = wandb.init(
                project=project,
                name=workdir.resolve().name,
                id=_run_id(workdir / "wandb" / "run_id.txt"),
                dir=str(workdir),
                config=dict(config),
                resume="allow",
            )
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


def _run_id(path: Path) -> str:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(8))
    return path.read_text().strip()
