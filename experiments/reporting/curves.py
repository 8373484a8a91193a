"""Lines over the steps of a run: their colours, running means, gaps, and the look of a panel."""

from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes

from experiments.reporting.record import Rows

# Distinguishable with any kind of colour vision (Okabe and Ito, "Color universal design", 2008); brown is added.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BROWN = "#CC79A7", "#56B4E9", "#A6761D"
GREY, INK = "#8A8A8A", "#333333"
DASHED, DOTTED = (0, (4, 2)), (0, (1, 1.5))
FEWEST_FOR_A_MEAN = 10
"""Number of rows from which a metric is drawn with its running mean."""


def steps_of(rows: Rows) -> np.ndarray:
    """Return the steps of the rows, int64 [rows]."""
    return np.array([row["step"] for row in rows], dtype=np.int64)


def column(rows: Rows, name: str) -> np.ndarray:
    """Return a metric of the rows, float64 [rows]; NaN where it is missing."""
    return np.array([row.get(name, np.nan) for row in rows], dtype=np.float64)


def plot(
    axes: Axes,
    steps: np.ndarray,
    values: np.ndarray,
    colour: str,
    label: str | None = None,
    linewidth: float = 1.3,
    alpha: float = 1.0,
    linestyle: Any = "-",
) -> None:
    """Draw a line with gaps at NaN, and dots for isolated values; nothing if no value is finite."""
    finite = np.isfinite(values)
    if not finite.any():
        return
    padded = np.concatenate([[False], finite, [False]])
    alone = np.flatnonzero(finite & ~padded[:-2] & ~padded[2:])
    (line,) = axes.plot(steps, values, color=colour, label=label, linewidth=linewidth, alpha=alpha, linestyle=linestyle)
    if alone.size:
        line.set(marker="o", markersize=4, markevery=alone.tolist())


def plot_with_mean(axes: Axes, rows: Rows, name: str, colour: str, label: str) -> None:
    """Draw a metric faintly under its running mean, or plainly if there are few rows."""
    steps, values = steps_of(rows), column(rows, name)
    if len(rows) < FEWEST_FOR_A_MEAN:
        plot(axes, steps, values, colour, label)
    else:
        plot(axes, steps, values, colour, f"_{label}, each step", linewidth=0.8, alpha=0.3)
        plot(axes, steps, running_mean(values, mean_window(rows)), colour, label, linewidth=1.8)


def mean_window(rows: Rows) -> int:
    """Return the number of steps that a running mean covers: about 5 % of them, and odd so that it has a middle."""
    return min(max(len(rows) // 20, 5), 501) | 1


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of the finite values in a window around each value; NaN where there are none.

    Args:
      values: float64 [steps].
      window: length of the window, odd.
    """
    finite = np.isfinite(values)
    around = slice(window // 2, window // 2 + len(values))
    totals, counts = (np.convolve(x, np.ones(window))[around] for x in (np.where(finite, values, 0.0), finite))
    return np.divide(totals, counts, out=np.full(len(values), np.nan), where=counts > 0)


def use_log_scale(axes: Axes, values: np.ndarray) -> None:
    """Make the y axis logarithmic, with a handful of plain numbers on it; do nothing if no value is positive.

    Args:
      axes: the panel.
      values: everything that is drawn in it; the axis spans the finite, positive ones.
    """
    shown = values[np.isfinite(values) & (values > 0)]
    if not shown.size:
        return
    lowest, highest = float(shown.min()), float(shown.max())
    margin = max((highest / lowest) ** 0.06, 1.05)
    axes.set_yscale("log")
    axes.set_ylim(lowest / margin, highest * margin)
    if highest / lowest < 5:
        axes.yaxis.set_major_locator(ticker.MaxNLocator(6))
    else:
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if highest / lowest < 1000 else (1,), numticks=8))
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def finish(axes: Axes, title: str, label: str, percent: bool = False, legend: bool = True) -> None:
    """Add title, labels and legend to a panel whose lines are drawn, and style it.

    Args:
      axes: the panel.
      title: its title.
      label: the label of its y axis.
      percent: if true, the y axis shows shares as percentages.
      legend: if true, a legend stands above the panel.
    """
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=26)
    axes.set_xlabel("RL step", color=INK)
    axes.set_ylabel(label, color=INK)
    style_axis(axes, percent)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines["bottom"].set(visible=True, color=GREY)
    if not axes.get_legend_handles_labels()[0]:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color=GREY)
        axes.set(xticks=[], yticks=[])
    elif legend:
        above = axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 1),
            borderaxespad=0.2,
            ncols=4,
            handlelength=1.6,
            handletextpad=0.5,
            columnspacing=1.1,
            frameon=False,
            fontsize=8.5,
            labelcolor=INK,
        )
        above.set_in_layout(False)  # the title's padding leaves room for it, whatever its width


def style_axis(axes: Axes, percent: bool) -> None:
    """Hide the frame and the tick marks of a panel, and show the y axis in plain numbers or as percentages."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=9, colors=INK)
    axes.yaxis.set_major_formatter(number_formatter("%" if percent else None))


def number_formatter(percent_sign: str | None) -> ticker.Formatter:
    """Return a formatter of plain numbers, or of shares as percentages if a sign for them is given."""
    factor, unit = (1, "") if percent_sign is None else (100, percent_sign)
    return ticker.FuncFormatter(lambda value, _: f"{factor * value:g}{unit}")
