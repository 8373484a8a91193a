"""Figures of a study: learning curves, final scores, collapse rates, probabilities of improvement, sensitivities.

A figure is declared as a frozen dataclass that names factors, and drawn from the study's table alone. Factors that it
does not name are held at the study's defaults.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from experiments.ablation.grid import Level
from experiments.ablation.results import Results, Where, collapse_rate, flat
from experiments.ablation.study import Style
from experiments.ablation.table import LATE_STEPS, Row
from experiments.reporting.curves import DASHED, GREY, INK, running_mean
from experiments.reporting.study_canvas import (
    CURVE_HEIGHT,
    ROW_HEIGHT,
    StudyCanvas,
    draw_dot,
    draw_runs,
    format_numbers,
)

_TINY = 1e-30  # in place of 0 under a logarithm
_WINDOW, _FEWEST_TO_SMOOTH = 5, 40


@dataclass(frozen=True)
class StudyFigure:
    """Fields and methods common to all figures."""

    name: str
    """The name of the file, without its ending."""
    panels: str | None = None
    """The factor with a panel for each level."""
    where: Where = field(default_factory=dict)
    """The levels of factors to show, one or a tuple. Factors named nowhere in the figure are at the study's default."""
    title: str = ""

    FREE: ClassVar[tuple[str, ...]] = ("panels",)
    """Fields that name a factor of which all levels are shown."""

    @property
    def free(self) -> tuple[str, ...]:
        """The factors of which the figure shows all levels."""
        return tuple(factor for name in self.FREE if (factor := getattr(self, name)) is not None)

    def check(self, factors: Sequence[str], defaults: Mapping[str, Level]) -> None:
        """Check the figure's factors against those of the study.

        Raises:
          ValueError: if a factor is unknown, or one of the study's is neither named in the figure nor has a default.
        """
        named = {*self.free, *self.where}
        for factor in named - set(factors):
            raise ValueError(f"figure {self.name}: no cell has the factor {factor}; there are {', '.join(factors)}")
        for factor in factors:
            if factor not in named and factor not in defaults:
                raise ValueError(
                    f"figure {self.name}: the factor {factor} has no default in the study: name it in the figure"
                )

    def draw(self, results: Results) -> bytes | None:
        """Return the picture as PNG, or None as long as none of its runs is done."""
        rows = results.runs(self.free, self.where)
        if not rows:
            return None
        figure = Figure(dpi=110, facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
        canvas = FigureCanvasAgg(figure)
        self.draw_rows(StudyCanvas(figure, results), rows)
        if self.title:
            figure.suptitle(self.title, x=0.012, ha="left", fontsize=12, fontweight="bold", color=INK)
        picture = io.BytesIO()
        canvas.print_png(picture)
        return picture.getvalue()

    def draw_rows(self, canvas: StudyCanvas, rows: list[Row]) -> None:
        """Draw the runs on a canvas."""
        raise NotImplementedError

    def comparisons(self, results: Results) -> list[dict[str, Any]]:
        """Return the comparisons that the figure shows, for the summary."""
        return []

    def means(self, results: Results) -> list[dict[str, Any]]:
        """Return the means over steps that the figure shows, or that its curves end with, for the summary."""
        return []


@dataclass(frozen=True)
class LearningCurves(StudyFigure):
    """A metric over steps: mean over seeds, with its 95 % bootstrap interval."""

    metric: str = "eval_sampled"
    lines: str = "method"
    """The factor with a line for each level."""
    log: bool = False
    """If true, the metric's axis is logarithmic and its means are geometric."""

    FREE: ClassVar[tuple[str, ...]] = ("panels", "lines")

    def draw_rows(self, canvas: StudyCanvas, rows: list[Row]) -> None:
        levels = canvas.results.levels(self.lines, rows)
        note = "mean over seeds, 95 % bootstrap interval"
        for axes, panel in canvas.panels(self.panels, rows, CURVE_HEIGHT):
            for level in levels:
                runs = [row for row in panel if row[self.lines] == level]
                steps, values = canvas.results.curves(runs, self.metric)
                if not steps.size:
                    continue
                style = canvas.style(level, levels)
                values = np.log(np.maximum(values, _TINY)) if self.log else values
                if steps.size > _FEWEST_TO_SMOOTH:
                    values = np.stack([running_mean(run, _WINDOW) for run in values])
                    note = f"running mean of {_WINDOW} recorded steps, then mean over seeds, 95 % bootstrap interval"
                mean, low, high = (np.exp(line) if self.log else line for line in _mean_band(values))
                axes.plot(steps, mean, color=style.colour, linestyle=DASHED if style.dashed else "-", linewidth=1.7)
                axes.fill_between(steps, low, high, color=style.colour, alpha=0.13, linewidth=0)
            if self.log:
                axes.set_yscale("log")
            axes.set_xlabel("step", color=INK)
            axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
            axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.8)
            format_numbers(axes.yaxis, self.metric, self.log)
        canvas.axes[0].set_ylabel(canvas.word(self.metric), color=INK)
        canvas.legend(self.lines, levels)
        canvas.note(note)

    def means(self, results: Results) -> list[dict[str, Any]]:
        rows = results.runs(self.free, self.where)
        found = []
        for panel, runs in results.by_level(self.panels, rows):
            for line in results.levels(self.lines, rows):
                ours = [row for row in runs if row[self.lines] == line]
                mean = flat("mean", results.mean_of_steps(self.metric, ours, self.log, LATE_STEPS))
                what = f"{self.metric} in the last {LATE_STEPS} steps"
                found.append({"what": what, "panel": panel, "line": line, **mean})
        return found


@dataclass(frozen=True)
class MeansOfSteps(StudyFigure):
    """Several metrics side by side, each as its mean over all steps that recorded it."""

    metrics: tuple[str, ...] = ()
    what: str = ""
    """The quantity that the metrics have in common: the label of the x axis."""

    def draw_rows(self, canvas: StudyCanvas, rows: list[Row]) -> None:
        results = canvas.results
        for axes, panel in canvas.panels(self.panels, rows, ROW_HEIGHT * len(self.metrics) + 0.9):
            for place, metric in enumerate(self.metrics):
                style = canvas.style(metric, self.metrics)
                for run in panel:
                    alone = results.mean_of_steps(metric, [run])
                    if alone is not None:
                        draw_runs(axes, place, [alone.value], style)
                draw_dot(axes, place, results.mean_of_steps(metric, panel), style)
            axes.set_xlabel(self.what, color=INK, fontsize=9)
        canvas.name_lines([canvas.word(metric) for metric in self.metrics])
        canvas.note("large: interquartile mean over runs, 95 % bootstrap interval; small: runs")

    def means(self, results: Results) -> list[dict[str, Any]]:
        return [
            {"what": self.what, "panel": panel, "line": metric} | flat("mean", results.mean_of_steps(metric, runs))
            for panel, runs in results.by_level(self.panels, results.runs(self.free, self.where))
            for metric in self.metrics
        ]


@dataclass(frozen=True)
class FinalScores(StudyFigure):
    """A score of each run: a dot for each run, and interquartile means with their 95 % intervals."""

    groups: str = "method"
    """The factor with a line of dots for each level."""
    metric: str | None = None
    """A column of the table of runs; the study's score by default."""

    FREE: ClassVar[tuple[str, ...]] = ("panels", "groups")

    def draw_rows(self, canvas: StudyCanvas, rows: list[Row]) -> None:
        results, score = canvas.results, self.metric or canvas.results.study.score

        def draw(axes: Axes, place: int, runs: list[Row], style: Style) -> None:
            draw_runs(axes, place, list(results.table.scores(score, runs).values()), style)
            draw_dot(axes, place, results.score(runs, score), style)

        canvas.dots(self.panels, self.groups, rows, draw)
        for axes, panel in canvas.drawn:
            starts = list(results.table.scores(f"start_{score}", panel).values())
            if starts:
                axes.axvline(float(np.mean(starts)), color=GREY, linestyle=":", linewidth=1.2, zorder=1)
            axes.set_xlabel(canvas.word(score), color=INK, fontsize=9)
            format_numbers(axes.xaxis, score)
        canvas.note("large: interquartile mean, 95 % bootstrap interval; small: runs; dotted line: before training")

    def means(self, results: Results) -> list[dict[str, Any]]:
        if self.metric is None:  # the summary has the study's score for each cell
            return []
        found, rows = [], results.runs(self.free, self.where)
        for panel, runs in results.by_level(self.panels, rows):
            groups = results.by_level(self.groups, runs)
            sides = [(line, ours, self.metric) for line, ours in groups]
            sides.append(("before training", groups[0][1], f"start_{self.metric}"))
            for line, ours, metric in sides:
                mean = flat("mean", results.score(ours, metric))
                found.append({"what": self.metric, "panel": panel, "line": line, **mean})
        return found


@dataclass(frozen=True)
class CollapseRates(StudyFigure):
    """The share of runs that collapsed, with Wilson intervals."""

    groups: str = "method"
    """The factor with a line of dots for each level."""

    FREE: ClassVar[tuple[str, ...]] = ("panels", "groups")

    def draw_rows(self, canvas: StudyCanvas, rows: list[Row]) -> None:
        def draw(axes: Axes, place: int, runs: list[Row], style: Style) -> None:
            found = collapse_rate(runs)
            draw_dot(axes, place, found, style)
            if found is not None:
                text = f"{round(found.value * found.runs)}/{found.runs}"
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
                axes.text(1.06, place, text, va="center", fontsize=8.5, color=INK, bbox=box)

        canvas.dots(self.panels, self.groups, rows, draw)
        for axes, _ in canvas.drawn:
            axes.set_xlim(-0.03, 1.22)
            axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
            axes.set_xlabel("share of runs that collapsed", color=INK, fontsize=9)
            format_numbers(axes.xaxis, "collapse_fraction")
        canvas.note("with 95 % Wilson interval, and collapsed runs of all")


@dataclass(frozen=True)
class Improvement(StudyFigure):
    """The probability that a run of one level scores better than a run of another, in each panel and over all."""

    factor: str = "method"
    """The factor whose levels are compared."""
    pairs: tuple[tuple[Level, Level], ...] = ()
    """Pairs of levels; the first is the one that may be better."""

    FREE: ClassVar[tuple[str, ...]] = ("panels", "factor")

    def draw_rows(self, canvas: StudyCanvas, rows: list[Row]) -> None:
        results, columns = canvas.results, self._columns(canvas.results, rows)
        canvas.make_grid(len(columns), ROW_HEIGHT * len(self.pairs) + 0.9)
        for axes, (level, strata) in zip(canvas.axes, columns, strict=True):
            for place, (ours, theirs) in enumerate(self.pairs):
                style = canvas.style(ours, [first for first, _ in self.pairs])
                draw_dot(axes, place, results.improvement(self._sides(strata, ours, theirs)), style)
            axes.axvline(0.5, color=GREY, linestyle=":", linewidth=1.2, zorder=1)
            axes.set_xlim(-0.04, 1.04)
            axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
            axes.set_xlabel("P(first better)", color=INK, fontsize=9)
            title = canvas.title(self.panels, level) if level is not None else "all together"
            axes.set_title(title if self.panels else "", loc="left", fontsize=10, color=INK)
            format_numbers(axes.xaxis, "improvement_fraction")
        canvas.name_lines([f"{canvas.word(ours)} over {canvas.word(theirs)}" for ours, theirs in self.pairs])
        canvas.note("probability of improvement, 95 % bootstrap interval stratified by panel")

    def comparisons(self, results: Results) -> list[dict[str, Any]]:
        rows = results.runs(self.free, self.where)
        found = []
        for level, strata in self._columns(results, rows):
            for ours, theirs in self.pairs:
                sides = self._sides(strata, ours, theirs)
                who = {str(self.panels): level} if level is not None else {}
                found.append({"first": ours, "second": theirs, **who, **results.comparison(sides)})
        return found

    def _columns(self, results: Results, rows: list[Row]) -> list[tuple[Level, list[list[Row]]]]:
        """Return the level and the strata of each panel; several panels are followed by all strata, of level None."""
        found = results.by_level(self.panels, rows)
        alone = [(level, [runs]) for level, runs in found]
        return [*alone, (None, [runs for _, runs in found])] if len(alone) > 1 else alone

    def _sides(self, strata: list[list[Row]], ours: Level, theirs: Level) -> list[tuple[list[Row], list[Row]]]:
        """Return the runs of both levels in each stratum."""
        return [
            ([row for row in runs if row[self.factor] == ours], [row for row in runs if row[self.factor] == theirs])
            for runs in strata
        ]


@dataclass(frozen=True)
class Sensitivity(StudyFigure):
    """The study's score against the levels of a numeric factor."""

    factor: str = ""
    """The factor of the x axis."""
    lines: str | None = None
    """The factor with a line for each level."""
    log: bool = False
    """If true, the x axis is logarithmic."""

    FREE: ClassVar[tuple[str, ...]] = ("panels", "factor", "lines")

    def draw_rows(self, canvas: StudyCanvas, rows: list[Row]) -> None:
        results, score = canvas.results, canvas.results.study.score
        levels = results.levels(self.lines, rows) if self.lines else [None]
        for axes, panel in canvas.panels(self.panels, rows, CURVE_HEIGHT):
            for index, level in enumerate(levels):
                runs = [row for row in panel if self.lines is None or row[self.lines] == level]
                self._draw_line(axes, results, runs, canvas.style(level, levels), index - (len(levels) - 1) / 2)
            if self.log:
                axes.set_xscale("log")
            ticks = [float(level) for level in results.levels(self.factor, rows) if isinstance(level, int | float)]
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.xaxis.set_minor_locator(ticker.NullLocator())
            axes.set_xlabel(canvas.word(self.factor), color=INK)
            axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.8)
            format_numbers(axes.yaxis, score)
        canvas.axes[0].set_ylabel(canvas.word(score), color=INK)
        if self.lines:
            canvas.legend(self.lines, levels)
        canvas.note("interquartile mean, 95 % bootstrap interval")

    def _draw_line(self, axes: Axes, results: Results, runs: list[Row], style: Style, shift: float) -> None:
        """Draw one line, its dots shifted a little to the side so that intervals do not hide each other.

        Args:
          axes: the panel.
          results: the results of the study.
          runs: the runs of the line.
          style: its style.
          shift: the place of the line among all lines, from the middle one.
        """
        levels = [level for level in results.levels(self.factor, runs) if isinstance(level, int | float)]
        found = [(float(level), results.score([row for row in runs if row[self.factor] == level])) for level in levels]
        found = [(x, value) for x, value in found if value is not None]
        if not found:
            return
        x = np.array([x for x, _ in found])
        extent = np.ptp(np.log(x) if self.log else x) or 1.0
        x = x * np.exp(0.012 * shift * extent) if self.log else x + 0.012 * shift * extent
        values, low, high = (
            np.array([getattr(value, name) for _, value in found]) for name in ("value", "low", "high")
        )
        axes.plot(
            x,
            values,
            marker="o",
            markersize=4.5,
            color=style.colour,
            linestyle=DASHED if style.dashed else "-",
            linewidth=1.6,
        )
        axes.vlines(x, low, high, color=style.colour, linewidth=1.4, alpha=0.7)


def _mean_band(values: np.ndarray, resamples: int = 1000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return means over runs at each step, and the bounds of their bootstrap intervals.

    Args:
      values: float64 [runs, steps]; NaN where a run has no value, which leaves it out at that step.
      resamples: number of times that the runs are drawn again.

    Returns:
      Three arrays, float64 [steps].
    """
    drawn = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    weights = np.stack([np.bincount(row, minlength=len(values)) for row in drawn]).astype(np.float64)
    there = np.isfinite(values).astype(np.float64)
    totals, counts = weights @ np.where(there > 0, values, 0.0), weights @ there
    means = np.divide(totals, counts, out=np.full(totals.shape, np.nan), where=counts > 0)
    low, high = np.nanquantile(means, [0.025, 0.975], axis=0)
    return np.nanmean(values, axis=0), low, high
