"""The training curves of a run as one picture, drawn from its `metrics.jsonl` alone.

Uses matplotlib's objects and its Agg renderer directly: no display, no global state, safe in any thread. This file
must never know how a metric is computed, and never need a metric to be there.
"""

import io
import math
import os
from typing import Any

import numpy as np
from etils import epath
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from rspo_jax import files, metrics

Rows = list[dict[str, Any]]

# Told apart by people with any kind of colour vision (Okabe and Ito, "Color universal design", 2008).
_BLUE, _ORANGE, _GREEN, _RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_GREY, _INK = "#8A8A8A", "#333333"
_DASHED = (0, (4, 2))
_FEWEST_FOR_A_MEAN = 10


def draw_curves(run_dir: str | os.PathLike[str]) -> epath.Path:
    """Draws a run's curves into its `curves.png`, in place of an older one.

    Six panels over the steps of the "rl" phase: reward, solve rate, entropy, router shift γ, clip fraction and
    importance ratio. A metric that was not recorded leaves its line out, NaN leaves a gap.

    Args:
      run_dir: the run's folder, with `metrics.jsonl`.

    Returns:
      The path of the picture.

    Raises:
      FileNotFoundError: if there is no `metrics.jsonl`.
      ValueError: if `metrics.jsonl` is damaged.
    """
    run_dir = files.as_path(run_dir)
    rows = metrics.read_metrics(run_dir)
    warm_start, rl = ([row for row in rows if row["phase"] == phase] for phase in metrics.PHASES)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.02, hspace=0.04)
    figure = Figure(figsize=(16, 9), dpi=110, layout=layout, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    name = run_dir.resolve().name
    note = f"faint: each step, bold: mean of {_window(rl)} steps" if len(rl) >= _FEWEST_FOR_A_MEAN else ""
    figure.suptitle(f"{name}   {note}", x=0.012, ha="left", color=_GREY, fontsize=10, parse_math=False)
    panels = figure.subplots(2, 3)
    _draw_reward(panels[0, 0], rl)
    _draw_solve_rate(panels[0, 1], rl, warm_start)
    _draw_entropy(panels[0, 2], rl)
    _draw_router_shift(panels[1, 0], rl)
    _draw_clip_fraction(panels[1, 1], rl)
    _draw_importance_ratio(panels[1, 2], rl)
    last = max([1, *(row["step"] for row in rl)])
    for axes in figure.axes:  # the same steps in all panels, whatever was recorded at which
        axes.set_xlim(-0.02 * last, 1.02 * last)
    picture = io.BytesIO()
    canvas.print_png(picture)
    path = run_dir / "curves.png"
    files.replace_file(path, picture.getvalue())
    return path


def _draw_reward(axes: Axes, rows: Rows) -> None:
    _plot_with_mean(axes, rows, "reward", _BLUE, "training samples")
    _finish(axes, "Reward", "mean reward")


def _draw_solve_rate(axes: Axes, rows: Rows, warm_start: Rows) -> None:
    _plot_with_mean(axes, rows, "solve_rate", _GREY, "training")
    baseline = False
    for kind, colour, marker in (("greedy", _BLUE, "o"), ("sampled", _ORANGE, "s")):
        _plot_evaluations(axes, rows, kind, colour, marker)
        before = _column(warm_start, f"eval_{kind}")
        before = before[np.isfinite(before)]
        if before.size:
            baseline = True
            axes.axhline(before[-1], color=colour, linestyle=_DASHED, linewidth=1.2, zorder=3)
            axes.plot(0, before[-1], marker, color="white", markeredgecolor=colour, markersize=5, zorder=5)
    if baseline:
        axes.plot([], [], color=_INK, linestyle=_DASHED, linewidth=1.2, label="warm start")
    axes.set_ylim(bottom=0)
    _finish(axes, "Solve rate", "share solved", percent=True)


def _plot_evaluations(axes: Axes, rows: Rows, kind: str, colour: str, marker: str) -> None:
    """A held-out solve rate with its interval, over the steps at which it was measured."""
    rows = [row for row in rows if math.isfinite(row.get(f"eval_{kind}", math.nan))]
    if not rows:
        return
    steps, (rate, low, high) = _steps(rows), (_column(rows, f"eval_{kind}{bound}") for bound in ("", "_low", "_high"))
    (line,) = axes.plot(steps, rate, color=colour, marker=marker, label=f"held-out {kind}")
    line.set(markersize=4, linewidth=1.6, zorder=4)
    axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.vlines(steps, low, high, color=colour, alpha=0.4, linewidth=1)


def _draw_entropy(axes: Axes, rows: Rows) -> None:
    _plot_with_mean(axes, rows, "entropy", _BLUE, "training samples")
    _finish(axes, "Token entropy", "nats per token")


def _draw_router_shift(axes: Axes, rows: Rows) -> None:
    steps, floored = _steps(rows), _column(rows, "gamma_floor_fraction")
    _plot(axes, steps, _column(rows, "gamma_mean"), _BLUE, "mean", linewidth=2)
    _plot(axes, steps, _column(rows, "gamma_p10"), _ORANGE, "10th percentile")
    _plot(axes, steps, _column(rows, "gamma_min"), _RED, "smallest", linewidth=1)
    lowest = min(axes.get_ylim()[0], 0.95)
    axes.set_ylim(lowest, 1 + 0.03 * (1 - lowest))
    if np.isfinite(floored).any():
        right = axes.twinx()
        right.fill_between(steps, floored, color=_GREY, alpha=0.25, linewidth=0)
        _plot(right, steps, floored, _GREY, linewidth=0.8)
        # The lowest third of the panel where it can be: what happens to γ is the matter here.
        right.set_ylim(0, np.clip(3 * np.nanmax(floored), 0.01, 1))
        right.set_ylabel("share of tokens at the floor", color=_GREY)
        _style_axis(right, percent=True)
        right.yaxis.set_major_locator(ticker.MaxNLocator(4))
        right.tick_params(axis="y", colors=_GREY)
        axes.set_zorder(right.get_zorder() + 1)
        axes.patch.set_visible(False)
        axes.fill_between([], [], color=_GREY, alpha=0.4, linewidth=0, label="at the floor (right)")
    _finish(axes, "Router shift γ", "γ per token (1: same route)")


def _draw_clip_fraction(axes: Axes, rows: Rows) -> None:
    _plot_with_mean(axes, rows, "clip_fraction", _INK, "all")
    _plot_with_mean(axes, rows, "clip_fraction_positive", _GREEN, "advantage > 0")
    _plot_with_mean(axes, rows, "clip_fraction_negative", _RED, "advantage < 0")
    axes.set_ylim(bottom=0)
    _finish(axes, "Clip fraction", "share of tokens clipped", percent=True)


def _draw_importance_ratio(axes: Axes, rows: Rows) -> None:
    steps = _steps(rows)
    mean, largest = (_column(rows, f"ratio_{name}") for name in ("mean", "max"))
    # The scale has no 0, and can hold what float32 can but not all that float64 can.
    mean, largest = (np.where((x > 1e-45) & (x < 1e39), x, np.nan) for x in (mean, largest))
    _plot(axes, steps, largest, _ORANGE, "largest")
    _plot(axes, steps, mean, _BLUE, "mean", linewidth=2)
    values = np.concatenate([mean, largest])
    if np.isfinite(values).any():
        axes.axhline(1, color=_INK, linewidth=0.8, linestyle=":", zorder=1)
        _use_log_scale(axes, min(np.nanmin(values), 1.0), max(np.nanmax(values), 1.0))
    _finish(axes, "Importance ratio", "new over old probability")


def _steps(rows: Rows) -> np.ndarray:
    return np.array([row["step"] for row in rows], dtype=np.int64)


def _column(rows: Rows, name: str) -> np.ndarray:
    """A metric over the rows as float64; NaN where it is missing."""
    return np.array([row.get(name, np.nan) for row in rows], dtype=np.float64)


def _plot(
    axes: Axes,
    steps: np.ndarray,
    values: np.ndarray,
    colour: str,
    label: str | None = None,
    linewidth: float = 1.3,
    alpha: float = 1.0,
) -> None:
    """A line with gaps at NaN, and dots for the values that stand alone and would be no line. Nothing for no value."""
    finite = np.isfinite(values)
    if not finite.any():
        return
    padded = np.concatenate([[False], finite, [False]])
    alone = np.flatnonzero(finite & ~padded[:-2] & ~padded[2:])
    (line,) = axes.plot(steps, values, color=colour, label=label, linewidth=linewidth, alpha=alpha)
    if alone.size:
        line.set(marker="o", markersize=4, markevery=alone.tolist())


def _plot_with_mean(axes: Axes, rows: Rows, name: str, colour: str, label: str) -> None:
    """A metric, faint, under its running mean; a short one as it is."""
    steps, values = _steps(rows), _column(rows, name)
    if len(rows) < _FEWEST_FOR_A_MEAN:
        _plot(axes, steps, values, colour, label)
    else:
        _plot(axes, steps, values, colour, linewidth=0.8, alpha=0.3)
        _plot(axes, steps, _running_mean(values, _window(rows)), colour, label, linewidth=1.8)


def _window(rows: Rows) -> int:
    """How many steps a running mean is taken over: about 5 % of them, and odd so that it has a middle."""
    return min(max(len(rows) // 20, 5), 501) | 1


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the finite values in a window (odd) around each; NaN where there is none."""
    finite = np.isfinite(values)
    around = slice(window // 2, window // 2 + len(values))
    totals, counts = (np.convolve(x, np.ones(window))[around] for x in (np.where(finite, values, 0.0), finite))
    return np.divide(totals, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _use_log_scale(axes: Axes, lowest: float, highest: float) -> None:
    """A logarithmic y axis with plain numbers on it, a handful whatever the range."""
    margin = max((highest / lowest) ** 0.06, 1.05)
    axes.set_yscale("log")
    axes.set_ylim(lowest / margin, highest * margin)
    if highest / lowest < 5:
        axes.yaxis.set_major_locator(ticker.MaxNLocator(6))
    else:
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if highest / lowest < 1000 else (1,), numticks=8))
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def _finish(axes: Axes, title: str, label: str, percent: bool = False) -> None:
    """Title, labels, legend and the look of a panel once its lines are drawn."""
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=_INK, pad=26)
    axes.set_xlabel("RL step", color=_INK)
    axes.set_ylabel(label, color=_INK)
    _style_axis(axes, percent)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.grid(axis="y", color=_GREY, alpha=0.25, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines["bottom"].set(visible=True, color=_GREY)
    if axes.get_legend_handles_labels()[0]:
        legend = axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 1),
            borderaxespad=0.2,
            ncols=4,
            handlelength=1.6,
            handletextpad=0.5,
            columnspacing=1.1,
            frameon=False,
            fontsize=8.5,
            labelcolor=_INK,
        )
        legend.set_in_layout(False)  # the title's padding leaves room for it, whatever its width
    else:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color=_GREY)
        axes.set(xticks=[], yticks=[])


def _style_axis(axes: Axes, percent: bool) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=9, colors=_INK)
    factor, unit = (100, "%") if percent else (1, "")
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{factor * value:g}{unit}"))
