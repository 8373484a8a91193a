"""Training curves of a run as one picture, drawn from its `metrics.jsonl` alone.

Matplotlib's objects and its Agg renderer are used directly: no display, no global state, safe in any thread. Any metric
may be missing.
"""

import io
import math
import os

import numpy as np
from etils import epath
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from experiments.reporting.curves import (
    BLUE,
    DASHED,
    FEWEST_FOR_A_MEAN,
    GREEN,
    GREY,
    INK,
    ORANGE,
    RED,
    column,
    finish,
    mean_window,
    plot,
    plot_with_mean,
    steps_of,
    style_axis,
    use_log_scale,
)
from experiments.reporting.record import Rows, held_out_suffix
from rspo_jax.records import files, metrics


def draw_curves(run_dir: str | os.PathLike[str]) -> epath.Path:
    """Draw a run's curves as `curves.png` in its folder, replacing an older picture.

    Six panels over the steps of the "rl" phase: reward, solve rate (held-out reward where the task does not tell what
    is solved), entropy, router shift γ, clip fraction and importance ratio. A metric that was not recorded has no line;
    NaN leaves a gap.

    Args:
      run_dir: the run's folder, which holds `metrics.jsonl`.

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
    note = f"faint: each step, bold: mean of {mean_window(rl)} steps" if len(rl) >= FEWEST_FOR_A_MEAN else ""
    figure.suptitle(f"{name}   {note}", x=0.012, ha="left", color=GREY, fontsize=10, parse_math=False)
    panels = figure.subplots(2, 3)
    draw_reward(panels[0, 0], rl)
    draw_held_out(panels[0, 1], rl, warm_start)
    draw_entropy(panels[0, 2], rl)
    draw_router_shift(panels[1, 0], rl)
    draw_clip_fraction(panels[1, 1], rl)
    draw_importance_ratio(panels[1, 2], rl)
    last = max([1, *(row["step"] for row in rl)])
    for axes in figure.axes:  # all panels span the same steps, whichever metrics were recorded
        axes.set_xlim(-0.02 * last, 1.02 * last)
    picture = io.BytesIO()
    canvas.print_png(picture)
    path = run_dir / "curves.png"
    files.replace_file(path, picture.getvalue())
    return path


def draw_reward(axes: Axes, rows: Rows) -> None:
    """Draw the mean reward of training samples."""
    plot_with_mean(axes, rows, "reward", BLUE, "training samples")
    finish(axes, "Reward", "mean reward")


def draw_held_out(axes: Axes, rows: Rows, warm_start: Rows) -> None:
    """Draw results in training and on held-out problems, with the last of the warm start as a baseline.

    They are solve rates, or mean rewards where the task does not tell what is solved.
    """
    suffix = held_out_suffix(rows)
    plot_with_mean(axes, rows, "reward" if suffix else "solve_rate", GREY, "training")
    baseline = False
    for kind, colour, marker in (("greedy", BLUE, "o"), ("sampled", ORANGE, "s")):
        # The held-out result with its interval, over the steps at which it was measured.
        measured = [row for row in rows if math.isfinite(row.get(f"eval_{kind}{suffix}", math.nan))]
        if measured:
            steps = steps_of(measured)
            value, low, high = (column(measured, f"eval_{kind}{suffix}{bound}") for bound in ("", "_low", "_high"))
            (line,) = axes.plot(steps, value, color=colour, marker=marker, label=f"held-out {kind}")
            line.set(markersize=4, linewidth=1.6, zorder=4)
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.vlines(steps, low, high, color=colour, alpha=0.4, linewidth=1)
        before = column(warm_start, f"eval_{kind}{suffix}")
        before = before[np.isfinite(before)]
        if before.size:
            baseline = True
            axes.axhline(before[-1], color=colour, linestyle=DASHED, linewidth=1.2, zorder=3)
            axes.plot(0, before[-1], marker, color="white", markeredgecolor=colour, markersize=5, zorder=5)
    if baseline:
        axes.plot([], [], color=INK, linestyle=DASHED, linewidth=1.2, label="warm start")
    if suffix:
        finish(axes, "Held-out reward", "mean reward")
    else:
        axes.set_ylim(bottom=0)
        finish(axes, "Solve rate", "share solved", percent=True)


def draw_entropy(axes: Axes, rows: Rows) -> None:
    """Draw the token entropy of the policy, in nats."""
    plot_with_mean(axes, rows, "entropy", BLUE, "training samples")
    finish(axes, "Token entropy", "nats per token")


def draw_router_shift(axes: Axes, rows: Rows) -> None:
    """Draw the router-shift ratio γ, and on a right axis the share of tokens at its floor."""
    steps, floored = steps_of(rows), column(rows, "gamma_floor_fraction")
    plot(axes, steps, column(rows, "gamma_mean"), BLUE, "mean", linewidth=2)
    plot(axes, steps, column(rows, "gamma_p10"), ORANGE, "10th percentile")
    plot(axes, steps, column(rows, "gamma_min"), RED, "smallest", linewidth=1)
    lowest = min(axes.get_ylim()[0], 0.95)
    axes.set_ylim(lowest, 1 + 0.03 * (1 - lowest))
    if np.isfinite(floored).any():
        right = axes.twinx()
        right.fill_between(steps, floored, color=GREY, alpha=0.25, linewidth=0)
        plot(right, steps, floored, GREY, "_at the floor", linewidth=0.8)
        # Confined to the lowest third of the panel where possible, so that γ stays readable.
        right.set_ylim(0, np.clip(3 * np.nanmax(floored), 0.01, 1))
        right.set_ylabel("share of tokens at the floor", color=GREY)
        style_axis(right, percent=True)
        right.yaxis.set_major_locator(ticker.MaxNLocator(4))
        right.tick_params(axis="y", colors=GREY)
        axes.set_zorder(right.get_zorder() + 1)
        axes.patch.set_visible(False)
        axes.fill_between([], [], color=GREY, alpha=0.4, linewidth=0, label="at the floor (right)")
    finish(axes, "Router shift γ", "γ per token (1: same route)")


def draw_clip_fraction(axes: Axes, rows: Rows) -> None:
    """Draw the share of clipped tokens, for all tokens and by the sign of their advantage."""
    plot_with_mean(axes, rows, "clip_fraction", INK, "all")
    plot_with_mean(axes, rows, "clip_fraction_positive", GREEN, "advantage > 0")
    plot_with_mean(axes, rows, "clip_fraction_negative", RED, "advantage < 0")
    axes.set_ylim(bottom=0)
    finish(axes, "Clip fraction", "share of tokens clipped", percent=True)


def draw_importance_ratio(axes: Axes, rows: Rows) -> None:
    """Draw mean and largest importance ratio on a logarithmic scale."""
    steps = steps_of(rows)
    mean, largest = (column(rows, f"ratio_{name}") for name in ("mean", "max"))
    # A logarithmic scale has no 0, and matplotlib's covers the range of float32 but not all of float64.
    mean, largest = (np.where((x > 1e-45) & (x < 1e39), x, np.nan) for x in (mean, largest))
    plot(axes, steps, largest, ORANGE, "largest")
    plot(axes, steps, mean, BLUE, "mean", linewidth=2)
    values = np.concatenate([mean, largest])
    if np.isfinite(values).any():
        axes.axhline(1, color=INK, linewidth=0.8, linestyle=":", zorder=1)
        use_log_scale(axes, np.append(values, 1.0))
    finish(axes, "Importance ratio", "new over old probability")
