"""The figures of a study: learning curves, final scores, collapse rates, probabilities of improvement, sensitivities.

A figure is declared as a frozen dataclass that names factors, and drawn from the table alone. Factors that it does not
name are held at the study's defaults. This file must never read a run's folder or make a statistic of its own.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from experiments.ablation.comparison import Results, Where, collapse_rate, flat
from experiments.ablation.grid import Level
from experiments.ablation.statistics import Estimate
from experiments.ablation.study import Style
from experiments.ablation.table import LATE_STEPS, Row
from experiments.reporting.curves import BLUE, DASHED, GREEN, GREY, INK, ORANGE, RED, running_mean

PURPLE, SKY = "#CC79A7", "#56B4E9"  # of the same palette as the others
_COLOURS = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, INK)
_TINY = 1e-30  # for logarithms
_WINDOW, _FEWEST_TO_SMOOTH = 5, 40
_PANEL_WIDTH, _ROW_HEIGHT, _CURVE_HEIGHT = 3.3, 0.34, 2.7
_WORDS = {
    "test_sampled": "test solve rate, sampled",
    "test_greedy": "test solve rate, greedy",
    "eval_sampled": "validation solve rate, sampled",
    "eval_greedy": "validation solve rate, greedy",
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


@dataclass(frozen=True)
class StudyFigure:
    """What all figures have."""

    name: str
    """Of the file."""
    panels: str | None = None
    """The factor with a panel for each level."""
    where: Where = field(default_factory=dict)
    """Levels to show of factors, one or a tuple; those not named here or elsewhere are at the study's default."""
    title: str = ""

    FREE: ClassVar[tuple[str, ...]] = ("panels",)

    @property
    def free(self) -> tuple[str, ...]:
        """The factors of which the figure shows all levels."""
        return tuple(factor for name in self.FREE if (factor := getattr(self, name)) is not None)

    def check(self, factors: Sequence[str], defaults: Mapping[str, Level]) -> None:
        """Raises ValueError if a factor is unknown, or is neither named nor has a default."""
        named = {*self.free, *self.where}
        for factor in named - set(factors):
            raise ValueError(f"figure {self.name}: no cell has the factor {factor}; there are {', '.join(factors)}")
        for factor in factors:
            if factor not in named and factor not in defaults:
                raise ValueError(
                    f"figure {self.name}: the factor {factor} has no default in the study: name it in the figure"
                )

    def draw(self, results: Results) -> bytes | None:
        """The picture as PNG; None while no run that it shows is done."""
        rows = results.runs(self.free, self.where)
        if not rows:
            return None
        figure = Figure(dpi=110, facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
        canvas = FigureCanvasAgg(figure)
        self.draw_rows(_Canvas(figure, results), rows)
        if self.title:
            figure.suptitle(self.title, x=0.012, ha="left", fontsize=12, fontweight="bold", color=INK)
        picture = io.BytesIO()
        canvas.print_png(picture)
        return picture.getvalue()

    def draw_rows(self, canvas: "_Canvas", rows: list[Row]) -> None:
        raise NotImplementedError

    def numbers(self, results: Results) -> list[dict[str, Any]]:
        """The comparisons that it shows, for the summary."""
        return []

    def means(self, results: Results) -> list[dict[str, Any]]:
        """The means over steps that it shows, or that its curves end with, for the summary."""
        return []


@dataclass(frozen=True)
class LearningCurves(StudyFigure):
    """A metric over steps: mean over seeds, and the range that 95 % of the bootstrap's means lie in."""

    metric: str = "eval_sampled"
    lines: str = "method"
    log: bool = False
    """Of the metric: its axis and its means."""

    FREE: ClassVar[tuple[str, ...]] = ("panels", "lines")

    def draw_rows(self, canvas: "_Canvas", rows: list[Row]) -> None:
        levels = canvas.results.levels(self.lines, rows)
        note = "mean over seeds, 95 % bootstrap interval"
        for axes, panel in canvas.panels(self.panels, rows, _CURVE_HEIGHT, share_y=True):
            for level in levels:
                steps, values = canvas.curves([row for row in panel if row[self.lines] == level], self.metric)
                if not steps.size:
                    continue
                style = canvas.style(self.lines, level, levels)
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
            _format(axes.yaxis, self.metric, self.log)
        canvas.first.set_ylabel(canvas.word(self.metric), color=INK)
        canvas.legend(self.lines, levels, note)

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
    """What they have in common: the name of the axis."""

    def draw_rows(self, canvas: "_Canvas", rows: list[Row]) -> None:
        results = canvas.results
        for axes, panel in canvas.panels(self.panels, rows, _ROW_HEIGHT * len(self.metrics) + 0.9, share_y=True):
            for place, metric in enumerate(self.metrics):
                style = canvas.style(None, metric, self.metrics)
                for run in panel:
                    alone = results.mean_of_steps(metric, [run])
                    if alone is not None:
                        axes.plot(alone.value, place + 0.22, "o", color=style.colour, alpha=0.35, markersize=3)
                _dot(axes, place, results.mean_of_steps(metric, panel), style)
            axes.set_xlabel(self.what, color=INK, fontsize=9)
        canvas.name_rows([canvas.word(metric) for metric in self.metrics])
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
    metric: str | None = None
    """Of the table of runs; the study's score if none is given."""

    FREE: ClassVar[tuple[str, ...]] = ("panels", "groups")

    def draw_rows(self, canvas: "_Canvas", rows: list[Row]) -> None:
        results, score = canvas.results, self.metric or canvas.results.study.score

        def draw(axes: Axes, place: int, runs: list[Row], style: Style) -> None:
            values = list(results.table.scores(score, runs).values())
            axes.plot(values, np.full(len(values), place + 0.22), "o", color=style.colour, alpha=0.35, markersize=3)
            _dot(axes, place, results.score(runs, score), style)

        canvas.dots(self.panels, self.groups, rows, draw)
        for axes, panel in canvas.drawn:
            starts = list(results.table.scores(f"start_{score}", panel).values())
            if starts:
                axes.axvline(float(np.mean(starts)), color=GREY, linestyle=":", linewidth=1.2, zorder=1)
            axes.set_xlabel(canvas.word(score), color=INK, fontsize=9)
            _format(axes.xaxis, score)
        canvas.note("large: interquartile mean, 95 % bootstrap interval; small: runs; dotted line: before training")

    def means(self, results: Results) -> list[dict[str, Any]]:
        if self.metric is None:  # the summary holds it for each cell
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

    FREE: ClassVar[tuple[str, ...]] = ("panels", "groups")

    def draw_rows(self, canvas: "_Canvas", rows: list[Row]) -> None:
        def draw(axes: Axes, place: int, runs: list[Row], style: Style) -> None:
            found = collapse_rate(runs)
            _dot(axes, place, found, style)
            if found is not None:
                text = f"{round(found.value * found.runs)}/{found.runs}"
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
                axes.text(1.06, place, text, va="center", fontsize=8.5, color=INK, bbox=box)

        canvas.dots(self.panels, self.groups, rows, draw)
        for axes, _ in canvas.drawn:
            axes.set_xlim(-0.03, 1.22)
            axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
            axes.set_xlabel("share of runs that collapsed", color=INK, fontsize=9)
            _format(axes.xaxis, "collapse_fraction")
        canvas.note("with 95 % Wilson interval, and collapsed runs of all")


@dataclass(frozen=True)
class Improvement(StudyFigure):
    """How likely a run of one level has a better final score than a run of another, in each panel and over all."""

    factor: str = "method"
    pairs: tuple[tuple[Level, Level], ...] = ()

    FREE: ClassVar[tuple[str, ...]] = ("panels", "factor")

    def draw_rows(self, canvas: "_Canvas", rows: list[Row]) -> None:
        results, columns = canvas.results, self._columns(canvas.results, rows)
        canvas.grid(len(columns), _ROW_HEIGHT * len(self.pairs) + 0.9, share_y=True)
        for axes, (level, strata) in zip(canvas.axes, columns, strict=True):
            for place, (ours, theirs) in enumerate(self.pairs):
                style = canvas.style(self.factor, ours, [first for first, _ in self.pairs])
                _dot(axes, place, results.improvement(self._sides(strata, ours, theirs)), style)
            axes.axvline(0.5, color=GREY, linestyle=":", linewidth=1.2, zorder=1)
            axes.set_xlim(-0.04, 1.04)
            axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
            axes.set_xlabel("P(first better)", color=INK, fontsize=9)
            title = canvas.title(self.panels, level) if level is not None else "all together"
            axes.set_title(title if self.panels else "", loc="left", fontsize=10, color=INK)
            _format(axes.xaxis, "improvement_fraction")
        labels = [f"{canvas.word(ours)} over {canvas.word(theirs)}" for ours, theirs in self.pairs]
        canvas.name_rows(labels)
        canvas.note("probability of improvement, 95 % bootstrap interval stratified by panel")

    def numbers(self, results: Results) -> list[dict[str, Any]]:
        rows = results.runs(self.free, self.where)
        found = []
        for level, strata in self._columns(results, rows):
            for ours, theirs in self.pairs:
                sides = self._sides(strata, ours, theirs)
                who = {str(self.panels): level} if level is not None else {}
                found.append({"first": ours, "second": theirs, **who, **results.comparison(sides)})
        return found

    def _columns(self, results: Results, rows: list[Row]) -> list[tuple[Level, list[list[Row]]]]:
        """For each panel its level and its strata; the last, of level None, has all of them."""
        found = results.by_level(self.panels, rows)
        alone = [(level, [runs]) for level, runs in found]
        return [*alone, (None, [runs for _, runs in found])] if len(alone) > 1 else alone

    def _sides(self, strata: list[list[Row]], ours: Level, theirs: Level) -> list[tuple[list[Row], list[Row]]]:
        return [
            ([row for row in runs if row[self.factor] == ours], [row for row in runs if row[self.factor] == theirs])
            for runs in strata
        ]


@dataclass(frozen=True)
class Sensitivity(StudyFigure):
    """The study's score against the levels of a numeric factor."""

    factor: str = ""
    lines: str | None = None
    log: bool = False
    """The factor's axis."""

    FREE: ClassVar[tuple[str, ...]] = ("panels", "factor", "lines")

    def draw_rows(self, canvas: "_Canvas", rows: list[Row]) -> None:
        results, score = canvas.results, canvas.results.study.score
        levels = results.levels(self.lines, rows) if self.lines else [None]
        for axes, panel in canvas.panels(self.panels, rows, _CURVE_HEIGHT, share_y=True):
            for index, level in enumerate(levels):
                runs = [row for row in panel if self.lines is None or row[self.lines] == level]
                style = canvas.style(self.lines, level, levels)
                self._draw_line(axes, results, runs, style, index - (len(levels) - 1) / 2)
            if self.log:
                axes.set_xscale("log")
            ticks = [float(level) for level in results.levels(self.factor, rows) if isinstance(level, int | float)]
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.xaxis.set_minor_locator(ticker.NullLocator())
            axes.set_xlabel(canvas.word(self.factor), color=INK)
            axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.8)
            _format(axes.yaxis, score)
        canvas.first.set_ylabel(canvas.word(score), color=INK)
        note = "interquartile mean, 95 % bootstrap interval"
        canvas.legend(self.lines, levels, note) if self.lines else canvas.note(note)

    def _draw_line(self, axes: Axes, results: Results, runs: list[Row], style: Style, shift: float) -> None:
        """One line, its dots a little to the side of their level so that intervals do not hide each other."""
        levels = [level for level in results.levels(self.factor, runs) if isinstance(level, int | float)]
        found = [(float(level), results.score([row for row in runs if row[self.factor] == level])) for level in levels]
        found = [(x, value) for x, value in found if value is not None]
        if not found:
            return
        x = np.array([x for x, _ in found])
        spread = np.ptp(np.log(x) if self.log else x) or 1.0
        x = x * np.exp(0.012 * shift * spread) if self.log else x + 0.012 * shift * spread
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


class _Canvas:
    """Panels in a row, and what they have in common."""

    def __init__(self, figure: Figure, results: Results) -> None:
        self.figure, self.results = figure, results
        self.axes: list[Axes] = []
        self.drawn: list[tuple[Axes, list[Row]]] = []

    @property
    def first(self) -> Axes:
        return self.axes[0]

    def word(self, name: Any) -> str:
        """What a factor, a level or a metric is called."""
        return self.results.study.labels.get(name) or _WORDS.get(name) or str(name)

    def title(self, factor: str | None, level: Level | None) -> str:
        if factor is None:
            return ""
        return self.word(level) if isinstance(level, str) else f"{self.word(factor)}: {self.word(level)}"

    def style(self, factor: str | None, level: Level, levels: Sequence[Level]) -> Style:
        if level in self.results.study.styles:
            return self.results.study.styles[level]
        place = list(levels).index(level)
        return Style(_COLOURS[place % len(_COLOURS)], place >= len(_COLOURS))

    def grid(self, columns: int, height: float, share_y: bool) -> None:
        width = max(_PANEL_WIDTH * columns + 1.0, 5.5)
        self.figure.set_size_inches(width, height + 1.0)
        self.axes = list(np.ravel(self.figure.subplots(1, columns, sharey=share_y, squeeze=False)))
        for axes in self.axes:
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.spines["bottom"].set_color(GREY)
            axes.tick_params(which="both", length=0, labelsize=9, colors=INK)
            axes.set_axisbelow(True)

    def panels(self, factor: str | None, rows: list[Row], height: float, share_y: bool) -> list[tuple[Axes, list[Row]]]:
        """A panel for each level of a factor, with its rows."""
        found = self.results.by_level(factor, rows)
        self.grid(len(found), height, share_y)
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
        """A line of each panel for each group."""
        levels = self.results.levels(groups, rows)
        for axes, panel in self.panels(panels, rows, _ROW_HEIGHT * len(levels) + 0.9, share_y=True):
            for place, level in enumerate(levels):
                draw(axes, place, [row for row in panel if row[groups] == level], self.style(groups, level, levels))
        self.name_rows([self.word(level) for level in levels])

    def name_rows(self, names: Sequence[str]) -> None:
        for axes in self.axes:
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.grid(axis="y", color=GREY, alpha=0.18, linewidth=0.8)

    def curves(self, runs: list[Row], metric: str) -> tuple[np.ndarray, np.ndarray]:
        """The steps at which a metric was recorded, int [S], and its values, float64 [runs, S], NaN where missing."""
        found = [
            {
                row["step"]: row[metric]
                for row in self.results.table.steps.get(run["run"], [])
                if row.get(metric) is not None
            }
            for run in runs
        ]
        steps = sorted({step for values in found for step in values})
        values = [[values.get(step, np.nan) for step in steps] for values in found]
        return np.array(steps, np.int64), np.array(values, np.float64).reshape(len(runs), len(steps))

    def legend(self, factor: str, levels: Sequence[Level], note: str) -> None:
        handles = []
        for level in levels:
            style = self.style(factor, level, levels)
            line = Line2D([], [], color=style.colour, linewidth=2, linestyle=DASHED if style.dashed else "-")
            line.set_label(self.title(factor, level))
            handles.append(line)
        columns = max(1, min(len(handles), int(self.figure.get_figwidth() / 1.5)))
        self.figure.legend(
            handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, labelcolor=INK
        )
        self.note(note)

    def note(self, text: str) -> None:
        """What the marks mean, below all panels."""
        self.figure.supxlabel(text, x=0.99, ha="right", fontsize=8, color=GREY)


def _mean_band(values: np.ndarray, resamples: int = 1000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over runs at each step, [S], and the bounds of its bootstrap interval; runs without a value are left out."""
    drawn = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    weights = np.stack([np.bincount(row, minlength=len(values)) for row in drawn]).astype(np.float64)
    there = np.isfinite(values).astype(np.float64)
    totals, counts = weights @ np.where(there > 0, values, 0.0), weights @ there
    means = np.divide(totals, counts, out=np.full(totals.shape, np.nan), where=counts > 0)
    low, high = np.nanquantile(means, [0.025, 0.975], axis=0)
    return np.nanmean(values, axis=0), low, high


def _dot(axes: Axes, place: int, found: Estimate | None, style: Style) -> None:
    if found is None:
        return
    axes.hlines(place, found.low, found.high, color=style.colour, linewidth=2.4, alpha=0.6)
    face = "white" if style.dashed else style.colour
    axes.plot(found.value, place, "o", color=style.colour, markerfacecolor=face, markersize=7, markeredgewidth=1.8)


def _format(axis: Any, metric: str, log: bool = False) -> None:
    """Plain numbers, or per cent for a share."""
    is_share = metric.startswith(("test_", "eval_")) or "_fraction" in metric or metric.endswith("solve_rate")
    factor, unit = (100, " %") if is_share else (1, "")
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{factor * value:g}{unit}"))
    if log:
        axis.set_minor_formatter(ticker.NullFormatter())
