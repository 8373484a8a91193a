"""Probes of all objectives' gradients over the steps of a run: one line an objective (`rspo_jax.training.probe`).

Objectives of one family share a colour. This file must never compute a gradient.
"""

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from experiments.reporting.curves import (
    BLUE,
    DASHED,
    FEWEST_FOR_A_MEAN,
    GREEN,
    GREY,
    INK,
    ORANGE,
    RED,
    Rows,
    column,
    finish,
    mean_window,
    plot,
    running_mean,
    steps_of,
    use_log_scale,
)

_PURPLE, _BROWN = "#CC79A7", "#A6761D"
_DOTTED = (0, (1, 1.5))
STYLES: dict[str, tuple[str, Any, str]] = {
    "rspo": (BLUE, "-", "RSPO"),
    "gmpo": (BLUE, DASHED, "GMPO"),
    "gspo_rs": (GREEN, "-", "GSPO + shift"),
    "gspo": (GREEN, DASHED, "GSPO"),
    "gspo_token": (GREEN, _DOTTED, "GSPO-token"),
    "grpo_rs": (ORANGE, "-", "GRPO + shift"),
    "grpo": (ORANGE, DASHED, "GRPO"),
    "dr_grpo": (ORANGE, _DOTTED, "Dr. GRPO"),
    "dapo": (RED, "-", "DAPO"),
    "cispo": (RED, DASHED, "CISPO"),
    "sapo": (_PURPLE, "-", "SAPO"),
    "rloo": (_BROWN, "-", "RLOO"),
    "reinforce_pp": (_BROWN, DASHED, "REINFORCE++"),
}
"""Colour, dashes and label by the name that the metrics end with."""
NEEDED = "probe_reference_cosine_sequence_mean"
"""Every probe has it."""


def draw_cosine(axes: Axes, rows: Rows) -> None:
    """Of each objective's gradient with the on-policy one; that of the halves of the latter in grey."""
    probed = _probed(rows)
    _draw(axes, probed, "cosine")
    plot(axes, steps_of(probed), _smooth(probed, NEEDED), GREY, "halves of on-policy", linewidth=2.2)
    axes.axhline(0, color=GREY, linewidth=0.8, alpha=0.6)
    _finish(axes, "Cosine to the on-policy gradient", "cosine")


def draw_signal(axes: Axes, rows: Rows) -> None:
    """The signal-to-noise ratio of each objective's gradient."""
    probed = _probed(rows)
    values = _draw(axes, probed, "snr")
    positive = values[np.isfinite(values) & (values > 0)]
    if positive.size:
        use_log_scale(axes, float(positive.min()), float(positive.max()))
    axes.axhline(1, color=GREY, linewidth=0.8, alpha=0.6)
    _finish(axes, "Signal-to-noise ratio of gradients", "|mean|² / variance of the mean")


def _probed(rows: Rows) -> Rows:
    return [row for row in rows if NEEDED in row]


def _draw(axes: Axes, probed: Rows, kind: str) -> np.ndarray:
    """A line for each objective that there is; returns the values."""
    drawn = [np.empty(0)]
    for name, (colour, dashes, label) in STYLES.items():
        drawn.append(_smooth(probed, f"probe_{kind}_{name}"))
        plot(axes, steps_of(probed), drawn[-1], colour, label, linestyle=dashes)
    return np.concatenate(drawn)


def _smooth(probed: Rows, name: str) -> np.ndarray:
    values = column(probed, name)
    return values if len(probed) < FEWEST_FOR_A_MEAN else running_mean(values, mean_window(probed))


def _finish(axes: Axes, title: str, label: str) -> None:
    finish(axes, title, label, legend=False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=7.5, labelcolor=INK, handlelength=2.4
        )
