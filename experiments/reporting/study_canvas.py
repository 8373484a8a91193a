"""The canvas that the figures of a study are drawn on: panels in a row, their styles, labels, legend and note."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.ablation.grid import Level
from experiments.ablation.intervals import Estimate
from experiments.ablation.results import Results
from experiments.ablation.study import Style
from experiments.ablation.table import Row
from experiments.reporting.curves import (
    BLUE,
    DASHED,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    number_formatter,
)

ROW_HEIGHT, CURVE_HEIGHT = 0.34, 2.7
"""Heights in inches: of a row of dots, and of a panel of curves."""
_PANEL_WIDTH = 3.3
_LEVEL_COLOURS = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, INK)
_WORDS = {
    "test_sampled": "test solve rate, sampled",
    "test_greedy": "test solve rate, greedy",
    "eval_sampled": "validation solve rate, sampled",
    "eval_greedy": "validation solve rate, greedy",
    "test_sampled_reward": "test reward, sampled",
    "test_greedy_reward": "test reward, greedy",
    "eval_sampled_reward": "validation reward, sampled",
    "eval_greedy_reward": "validation reward, greedy",
    "solve_rate": "training solve rate",
    "late_solve_rate": "training solve rate, last 10 steps",
    "reward": "mean reward",
    "entropy": "token entropy (nats)",
    "gamma_mean": "mean γ per token",
    "gamma_floor_fraction": "share of tokens with γ at its floor",
    "clip_fraction": "share of tokens clipped",
    "clip_fraction_positive": "share clipped, good responses",
    "clip_fraction_negative": "share clipped, bad responses",
    "ratio_max": "largest importance ratio",
    "approx_kl": "divergence from the old policy (nats a token)",
    "route_stays": "share of tokens whose experts all stay",
    "max_violation": "busiest expert over its share, less 1",
    "effective_sample_size": "effective sample size of the ratios, a share",
}


class StudyCanvas:
    """Panels in a row, and what they have in common."""

    def __init__(self, figure: Figure, results: Results) -> None:
        """Take an empty figure, and the results to draw."""
        self.figure, self.results = figure, results
        self.axes: list[Axes] = []
        self.drawn: list[tuple[Axes, list[Row]]] = []
        """The panels of `panels`, each with its rows."""

    def word(self, name: Any) -> str:
        """Return the label of a factor, a level or a metric."""
        return self.results.study.labels.get(name) or _WORDS.get(name) or str(name)

    def title(self, factor: str | None, level: Level | None) -> str:
        """Return the title of a level: its label, after that of its factor if the level is not a word itself."""
        if factor is None:
            return ""
        return self.word(level) if isinstance(level, str) else f"{self.word(factor)}: {self.word(level)}"

    def style(self, level: Level, levels: Sequence[Level]) -> Style:
        """Return the study's style of a level, or the one that its place among all levels gives it."""
        if level in self.results.study.styles:
            return self.results.study.styles[level]
        place = list(levels).index(level)
        return Style(_LEVEL_COLOURS[place % len(_LEVEL_COLOURS)], place >= len(_LEVEL_COLOURS))

    def make_grid(self, columns: int, height: float) -> None:
        """Make empty panels that share their y axis; `height` is theirs in inches."""
        width = max(_PANEL_WIDTH * columns + 1.0, 5.5)
        self.figure.set_size_inches(width, height + 1.0)
        self.axes = list(np.ravel(self.figure.subplots(1, columns, sharey=True, squeeze=False)))
        for axes in self.axes:
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.spines["bottom"].set_color(GREY)
            axes.tick_params(which="both", length=0, labelsize=9, colors=INK)
            axes.set_axisbelow(True)

    def panels(self, factor: str | None, rows: list[Row], height: float) -> list[tuple[Axes, list[Row]]]:
        """Make a panel for each level of a factor; return each panel with its rows."""
        found = self.results.by_level(factor, rows)
        self.make_grid(len(found), height)
        self.drawn = []
        for axes, (level, panel) in zip(self.axes, found, strict=True):
            axes.set_title(self.title(factor, level), loc="left", fontsize=10, color=INK)
            self.drawn.append((axes, panel))
        return self.drawn

    def dots(
        self,
        panels: str | None,
        groups: str,
        rows: list[Row],
        draw: Callable[[Axes, int, list[Row], Style], None],
    ) -> None:
        """Draw panels with a line of dots for each group.

        Args:
          panels: the factor with a panel for each level.
          groups: the factor with a line of dots for each level.
          rows: the runs.
          draw: draws one line, given the panel, the line's place, its runs and its style.
        """
        levels = self.results.levels(groups, rows)
        for axes, panel in self.panels(panels, rows, ROW_HEIGHT * len(levels) + 0.9):
            for place, level in enumerate(levels):
                draw(axes, place, [row for row in panel if row[groups] == level], self.style(level, levels))
        self.name_lines([self.word(level) for level in levels])

    def name_lines(self, names: Sequence[str]) -> None:
        """Write the names of the lines of dots on the y axis."""
        for axes in self.axes:
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.grid(axis="y", color=GREY, alpha=0.18, linewidth=0.8)

    def legend(self, factor: str, levels: Sequence[Level]) -> None:
        """Draw the legend of a factor's levels above all panels."""
        handles = []
        for level in levels:
            style = self.style(level, levels)
            line = Line2D([], [], color=style.colour, linewidth=2, linestyle=DASHED if style.dashed else "-")
            line.set_label(self.title(factor, level))
            handles.append(line)
        columns = max(1, min(len(handles), int(self.figure.get_figwidth() / 1.5)))
        self.figure.legend(
            handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, labelcolor=INK
        )

    def note(self, text: str) -> None:
        """Write below all panels how to read the marks."""
        self.figure.supxlabel(text, x=0.99, ha="right", fontsize=8, color=GREY)


def draw_dot(axes: Axes, place: int, found: Estimate | None, style: Style) -> None:
    """Draw an estimate and its interval on the line at a place; nothing without an estimate."""
    if found is None:
        return
    axes.hlines(place, found.low, found.high, color=style.colour, linewidth=2.4, alpha=0.6)
    face = "white" if style.dashed else style.colour
    axes.plot(found.value, place, "o", color=style.colour, markerfacecolor=face, markersize=7, markeredgewidth=1.8)


def draw_runs(axes: Axes, place: int, values: Sequence[float], style: Style) -> None:
    """Draw a small dot for each run, beside the line at a place."""
    axes.plot(values, np.full(len(values), place + 0.22), "o", color=style.colour, alpha=0.35, markersize=3)


def format_numbers(axis: Any, metric: str, log: bool = False) -> None:
    """Show plain numbers on an axis, or percentages if the metric is a share."""
    is_held_out_rate = metric.startswith(("test_", "eval_")) and not metric.endswith("_reward")
    is_share = is_held_out_rate or "_fraction" in metric or metric.endswith("solve_rate")
    axis.set_major_formatter(number_formatter(" %" if is_share else None))
    if log:
        axis.set_minor_formatter(ticker.NullFormatter())
