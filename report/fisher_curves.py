# SPDX-License-Identifier: Apache-2.0
"""The picture of the score diagnostics (`diagnostics.FisherCurves`), of the means over examples."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

SCORES = {
    "score_ode": r"model – ODE score: $|s - \nabla \log q_t|^2$",
    "score_normal": r"model – normal: $|s + x / \sigma^2|^2$",
    "ode_normal": r"ODE score – normal: $|\nabla \log q_t + x / \sigma^2|^2$",
    "score_true": r"model – truth: $|s - \nabla \log p_t|^2$",
    "ode_true": r"ODE score – truth: $|\nabla \log q_t - \nabla \log p_t|^2$",
}
DIVERGENCES = {
    "divergence_normal": r"divergence – normal's: $(v \cdot J v + D / \sigma^2)^2$",
    "grad_divergence_normal": r"its gradient (normal's is 0): $|\nabla_x (v \cdot J v)|^2$",
}
REQUIRED = ("times", *list(SCORES)[:3], *DIVERGENCES)
CAPTION = (
    "Score diagnostics along the ODE from data: squared distances times g², mean over examples, ± one standard error. "
    "s: the model's score; q_t: density of its ODE; J = ds/dx; v: probe; normal: the score of N(0, σ² I)."
)
LINES = "-", "--", "-.", ":", (0, (5, 1))
DECADES = 9  # at most, of the y axis: at T distances may vanish up to rounding


def draw(axes: Sequence[Axes] | np.ndarray, arrays: Mapping[str, np.ndarray], colors: Sequence[str]) -> None:
    """Two panels: distances of scores, and of the divergence and its gradient, over time, on logarithmic axes.

    arrays: `times` [K] and, for a curve, its `<name>` and, if known, `<name>_stderr` [K]. KeyError if one of
    `REQUIRED` is missing; the curves with the truth are drawn where they are there.
    """
    for ax, curves in zip(axes, (SCORES, DIVERGENCES), strict=True):
        top, bottom = 0.0, np.inf
        for (name, label), color, line in zip(curves.items(), colors, LINES, strict=False):
            if name not in arrays and name not in REQUIRED:
                continue
            mean = np.where(arrays[name] > 0, arrays[name], np.nan)
            ax.plot(arrays["times"], mean, color=color, ls=line, lw=1.6, label=label)
            if f"{name}_stderr" in arrays:
                stderr = arrays[f"{name}_stderr"]
                ax.fill_between(arrays["times"], mean - stderr, mean + stderr, color=color, alpha=0.2, lw=0)
            if np.any(np.isfinite(mean)):
                top, bottom = max(top, np.nanmax(mean)), min(bottom, np.nanmin(mean))
        ax.set(xlabel="t", yscale="log")
        if top > 0:
            ax.set_ylim(max(bottom, top / 10**DECADES) / 2, top * 2)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize="small")
    axes[0].set_ylabel("g² × squared distance of scores\n(nats / unit of time)")
    axes[1].set_ylabel("g² × squared distance\n(nats per unit of time and of x², x⁴)")
