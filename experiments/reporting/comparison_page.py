"""A comparison of several runs as one page of HTML: final numbers, metrics over the steps, differences of config."""

import collections
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from experiments.reporting import page
from experiments.reporting.curves import (
    BLUE,
    BROWN,
    FEWEST_FOR_A_MEAN,
    GREEN,
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
from experiments.reporting.record import Mode, RunRecord
from experiments.reporting.words import describe_bounds, describe_value

_RUN_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, BROWN, INK)
_DASHES = ((), (6, 3), (2, 2), (8, 2, 2, 2))
_COLUMNS = ("run", "objective", "steps", "sampled", "greedy", "before, sampled", "alarm", "collapse", "lead", "skipped")


class NamedRun(NamedTuple):
    """A run under its name in the comparison, with the look of its lines."""

    name: str
    record: RunRecord
    colour: str
    dashes: tuple[int, ...]
    """Lengths of dashes and gaps; empty for a solid line."""

    @property
    def line(self) -> object:
        """The line style in matplotlib's form."""
        return (0, self.dashes) if self.dashes else "-"


class Metric(NamedTuple):
    """A metric that has a panel of its own."""

    name: str
    title: str
    label: str
    caption: str = ""
    percent: bool = False
    log: bool = False


METRICS = (
    Metric("reward", "Reward", "mean reward", "Mean over training samples."),
    Metric("solve_rate", "Solve rate in training", "share solved", "Training samples.", percent=True),
    Metric("entropy", "Token entropy", "nats per token"),
    Metric("response_length", "Response length", "tokens"),
    Metric("ratio_max", "Largest importance ratio", "new over old probability", log=True),
    Metric("clip_fraction", "Clip fraction", "share of tokens clipped", percent=True),
    Metric("effective_sample_size", "Effective sample size", "share of the tokens", percent=True),
    Metric("approx_kl", "KL of an update", "nats per token", log=True),
    Metric("grad_norm", "Gradient norm", "before clipping", log=True),
    Metric("gamma_mean", "Router shift γ", "mean γ (1: same route)"),
    Metric(
        "route_stays",
        "Routes that stay",
        "share of tokens",
        "Tokens that keep all their experts in all layers.",
        percent=True,
    ),
    Metric("max_violation", "Load violation", "busiest over mean, − 1", "Mean over layers."),
    Metric("router_entropy", "Router entropy", "nats", "Mean over layers."),
    Metric("mismatch_mean", "Sampler–trainer mismatch", "mean |difference|, nats", log=True),
    Metric("step_seconds", "Time of a step", "seconds"),
)


def make_comparison(records: Sequence[RunRecord]) -> str:
    """Return the page."""
    runs = name_runs(records)
    body = ["<h1>Comparison</h1>"]
    body += [page.key((run.name, run.colour, " ".join(map(str, run.dashes))) for run in runs)]
    body += ["<h2>At the end</h2>", page.table(_COLUMNS, [final_row(run) for run in runs])]
    body += ['<p class="quiet">Rates are those of the last held-out evaluation, with 95 % intervals over problems.</p>']
    drawn = [
        _held_out_figure(runs, mode, suffix)
        for suffix in ("", "_reward")
        for mode in ("sampled", "greedy")
        if any(run.record.recorded(f"eval_{mode}{suffix}") for run in runs)
    ]
    left_out = []
    for metric in METRICS:
        lacking = [run.name for run in runs if not run.record.recorded(metric.name)]
        if len(lacking) == len(runs):
            left_out.append((metric.title, f"no run has recorded {metric.name}"))
            continue
        caption = metric.caption + (f" Not recorded by {', '.join(lacking)}." if lacking else "")
        drawn.append(page.figure(metric.title, caption.strip(), lambda axes, m=metric: _draw_metric(axes, runs, m)))
    body += ["<h2>Over the steps</h2>", page.grid(drawn)]
    if left_out:
        body += ["<h2>Left out</h2>", page.table(("panel", "why"), left_out, numbers=False)]
    body += ["<h2>Differences in configuration</h2>", _differences(runs)]
    return page.make_page(f"Comparison of {len(runs)} runs", body)


def name_runs(records: Sequence[RunRecord]) -> list[NamedRun]:
    """Return the runs under the names of their folders, or under their paths where folders share a name."""
    counts = collections.Counter(record.name for record in records)
    named = []
    for at, record in enumerate(records):
        name = record.name if counts[record.name] == 1 else os.fspath(record.path)
        dashes = _DASHES[at // len(_RUN_COLOURS) % len(_DASHES)]
        named.append(NamedRun(name, record, _RUN_COLOURS[at % len(_RUN_COLOURS)], dashes))
    return named


def final_row(run: NamedRun) -> tuple[str, ...]:
    """Return the row of a run in the table of final numbers."""
    record, warned = run.record, run.record.warned
    skipped = np.nansum([0.0, *column(record.rl, "skipped_updates")])
    return (
        run.name,
        str((record.config or {}).get("objective.objective", "–")),
        str(record.steps),
        *(_held_out_cell(record, mode, last=True) for mode in ("sampled", "greedy")),
        _held_out_cell(record, "sampled", last=False),
        *("–" if value is None else str(value) for value in (warned.alarm, warned.collapse, warned.lead)),
        f"{skipped:.0f}",
    )


def _held_out_cell(record: RunRecord, mode: Mode, last: bool) -> str:
    found = record.held_out(mode, last)
    if found is None:
        return "–"
    split, bounds = "" if found.split == "test" else f" ({found.split})", describe_bounds(found, ", ")
    return f"{describe_value(found)}{f' [{bounds}]' if bounds else ''}{split}"


def _held_out_figure(runs: Sequence[NamedRun], mode: Mode, suffix: str) -> str:
    """Return the figure of solve rates, or of mean rewards for the suffix "_reward"."""

    def draw(axes: Axes) -> None:
        for run in runs:
            rows = [row for row in run.record.rl if math.isfinite(row.get(f"eval_{mode}{suffix}", math.nan))]
            value, low, high = (column(rows, f"eval_{mode}{suffix}{bound}") for bound in ("", "_low", "_high"))
            plot(axes, steps_of(rows), value, run.colour, run.name, 1.6, linestyle=run.line)
            axes.fill_between(steps_of(rows), low, high, color=run.colour, alpha=0.12, linewidth=0)
        if not suffix:
            axes.set_ylim(bottom=0)
        finish(axes, mode, "mean reward" if suffix else "share solved", percent=not suffix, legend=False)

    caption = "Validation problems, with 95 % intervals." + (" Temperature 0." if mode == "greedy" else "")
    return page.figure(f"Held-out {'reward' if suffix else 'solve rate'}, {mode}", caption, draw)


def _draw_metric(axes: Axes, runs: Sequence[NamedRun], metric: Metric) -> None:
    """Draw one line a run: its running mean, as in its own report."""
    drawn = []
    for run in runs:
        rows = run.record.rl
        values = column(rows, metric.name)
        if len(rows) >= FEWEST_FOR_A_MEAN:
            # On a logarithmic axis the mean is geometric, so that the line runs through the middle of its values.
            values = np.log(np.where(values > 0, values, np.nan)) if metric.log else values
            values = running_mean(values, mean_window(rows))
            values = np.exp(values) if metric.log else values
        drawn.append(values)
        plot(axes, steps_of(rows), values, run.colour, run.name, 1.6, linestyle=run.line)
    if metric.log:
        use_log_scale(axes, np.concatenate(drawn))
    finish(axes, metric.title, metric.label, metric.percent, legend=False)


def _differences(runs: Sequence[NamedRun]) -> str:
    """Return a table of the fields that are not the same in all runs."""
    lacking = [run.name for run in runs if run.record.config is None]
    if lacking:
        return f'<p class="quiet">{page.escape(", ".join(lacking))}: no config.json.</p>'
    names = list(dict.fromkeys(name for run in runs for name in run.record.config or {}))
    rows = [(name, *((run.record.config or {}).get(name, "–") for run in runs)) for name in names]
    differing = [row for row in rows if any(value != row[1] for value in row[2:])]
    if not differing:
        return '<p class="quiet">None.</p>'
    return page.table(("", *(run.name for run in runs)), differing, numbers=False)
