"""Probes of all objectives' gradients over the steps of a run, one line per objective (`rspo_jax.training.probe`)."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from experiments.reporting.curves import (
    BLUE,
    BROWN,
    DASHED,
    DOTTED,
    FEWEST_FOR_A_MEAN,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    RED,
    column,
    finish,
    mean_window,
    plot,
    running_mean,
    steps_of,
    use_log_scale,
)
from experiments.reporting.record import Rows

STYLES: dict[str, tuple[str, Any, str]] = {
    "rspo": (BLUE, "-", "RSPO"),
    "gmpo": (BLUE, DASHED, "GMPO"),
    "gspo_rs": (GREEN, "-", "GSPO + shift"),
    "gspo": (GREEN, DASHED, "GSPO"),
    "gspo_token": (GREEN, DOTTED, "GSPO-token"),
    "grpo_rs": (ORANGE, "-", "GRPO + shift"),
    "grpo": (ORANGE, DASHED, "GRPO"),
    "dr_grpo": (ORANGE, DOTTED, "Dr. GRPO"),
    "dapo": (RED, "-", "DAPO"),
    "cispo": (RED, DASHED, "CISPO"),
    "sapo": (PURPLE, "-", "SAPO"),
    "rloo": (BROWN, "-", "RLOO"),
    "reinforce_pp": (BROWN, DASHED, "REINFORCE++"),
}
"""Colour, dashes and label by the name that the metrics end with. Objectives of one family share a colour."""
NEEDED = "probe_reference_cosine_sequence_mean"
"""The metric that every probe has."""


def draw_cosine(axes: Axes, rows: Rows) -> None:
    """Draw the cosine of each objective's gradient to the on-policy one, and that of the latter's halves in grey."""
    probed = [row for row in rows if NEEDED in row]
    _draw_objectives(axes, probed, "cosine")
    plot(axes, steps_of(probed), _smooth(probed, NEEDED), GREY, "halves of on-policy", linewidth=2.2)
    axes.axhline(0, color=GREY, linewidth=0.8, alpha=0.6)
    _finish_panel(axes, "Cosine to the on-policy gradient", "cosine")


def draw_signal(axes: Axes, rows: Rows) -> None:
    """Draw the signal-to-noise ratio of each objective's gradient."""
    probed = [row for row in rows if NEEDED in row]
    use_log_scale(axes, _draw_objectives(axes, probed, "snr"))
    axes.axhline(1, color=GREY, linewidth=0.8, alpha=0.6)
    _finish_panel(axes, "Signal-to-noise ratio of gradients", "|mean|² / variance of the mean")


def _draw_objectives(axes: Axes, probed: Rows, kind: str) -> np.ndarray:
    """Draw a line for each objective that was probed; return all values drawn."""
    drawn = [np.empty(0)]
    for name, (colour, dashes, label) in STYLES.items():
        drawn.append(_smooth(probed, f"probe_{kind}_{name}"))
        plot(axes, steps_of(probed), drawn[-1], colour, label, linestyle=dashes)
    return np.concatenate(drawn)


def _smooth(probed: Rows, name: str) -> np.ndarray:
    values = column(probed, name)
    return values if len(probed) < FEWEST_FOR_A_MEAN else running_mean(values, mean_window(probed))


def _finish_panel(axes: Axes, title: str, label: str) -> None:
    """Finish a panel whose legend stands beside it, as there are too many lines for one above."""
    finish(axes, title, label, legend=False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=7.5, labelcolor=INK, handlelength=2.4
        )
