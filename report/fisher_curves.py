# SPDX-License-Identifier: Apache-2.0
"""The picture of the score diagnostics (`diagnostics.FisherCurves`), averaged over examples."""

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
DECADES = 9  # The y axis spans no more: at t = 1 a distance may vanish up to rounding.


def draw(axes: Sequence[Axes] | np.ndarray, arrays: Mapping[str, np.ndarray], colors: Sequence[str]) -> None:
    """Draws the distances of scores in one panel, those of the divergence and its gradient in another, over time.

    arrays: `times` [K] and for each curve `<name>` [K] and, if known, `<name>_stderr` [K]. A curve that is not there is
    left out.
    """
    for ax, curves in zip(axes, (SCORES, DIVERGENCES), strict=True):
        for (name, label), color, line in zip(curves.items(), colors, LINES, strict=False):
            if name in arrays:
                mean = np.where(arrays[name] > 0, arrays[name], np.nan)
                ax.plot(arrays["times"], mean, color=color, ls=line, lw=1.6, label=label)
                if (stderr := arrays.get(f"{name}_stderr")) is not None:
                    ax.fill_between(arrays["times"], mean - stderr, mean + stderr, color=color, alpha=0.2, lw=0)
        ax.set(xlabel="t", yscale="log")
        drawn = np.concatenate([arrays[name] for name in curves if name in arrays])
        if np.any(drawn > 0):
            low, high = drawn[drawn > 0].min(), drawn[drawn > 0].max()
            ax.set_ylim(max(low, high / 10**DECADES) / 2, high * 2)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize="small")
    axes[0].set_ylabel("g² × squared distance of scores\n(nats / unit of time)")
    axes[1].set_ylabel("g² × squared distance\n(nats per unit of time and of x², x⁴)")
