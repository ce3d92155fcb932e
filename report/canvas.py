# SPDX-License-Identifier: Apache-2.0
"""The look that all pictures share: colours, style, panels, PNGs, and how a mean with its error is written."""

import io
import math
from typing import Any, NamedTuple

from matplotlib.figure import Figure

# Okabe and Ito's colours: any kind of colour vision tells them apart. Their yellow is too pale for a line on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MODEL, OTHER, TRUTH = PALETTE[0], PALETTE[1], "#9A9A9A"
STYLE: dict[Any, Any] = {"axes.grid": True, "figure.dpi": 130, "grid.alpha": 0.3, "legend.frameon": False}


class Picture(NamedTuple):
    """A PNG, the name of its file without the suffix, its caption, and the title of its section on a page."""

    name: str
    png: bytes
    caption: str
    title: str = ""


def png(figure: Figure) -> bytes:
    """Returns the figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def panels(rows: int, columns: int, width: float, height: float, layout: Any = "constrained", **kwargs):
    """Returns a figure and its axes [rows, columns]. `width` and `height` are those of one panel, in inches."""
    figure = Figure(figsize=(columns * width, rows * height), layout=layout)
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def plus_minus(mean: float, stderr: float) -> str:
    """Writes the mean and its standard error, both to the error's second significant digit."""
    if not (math.isfinite(mean) and math.isfinite(stderr) and stderr > 0):
        return f"{mean:.5g}"
    digits = max(0, 1 - math.floor(math.log10(stderr)))
    return f"{mean:.{digits}f} ± {stderr:.{digits}f}"
