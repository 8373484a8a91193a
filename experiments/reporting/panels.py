"""The panels of a run's report: title, caption, the metrics or arrays that each needs, and how it is drawn."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from experiments.reporting import heat_maps, probes
from experiments.reporting.curves import (
    BLUE,
    BROWN,
    DASHED,
    DOTTED,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    RED,
    column,
    finish,
    plot,
    plot_with_mean,
    steps_of,
    use_log_scale,
)
from experiments.reporting.record import Rows, RunRecord, Series
from experiments.reporting.training_curves import (
    draw_clip_fraction,
    draw_entropy,
    draw_held_out,
    draw_importance_ratio,
    draw_reward,
    draw_router_shift,
)
from rspo_jax.stopwatch import Stage

Lines = Mapping[str, tuple[str, str]]
"""Metrics that are drawn as lines: name -> colour and label."""


@dataclass(frozen=True)
class Panel:
    """One picture of a report."""

    title: str
    caption: str
    draw: Callable[[Axes, RunRecord], None]
    metrics: tuple[str, ...] = ()
    """Metrics of which at least one must have been recorded."""
    arrays: tuple[str, ...] = ()
    """Arrays that must all have been recorded."""
    needs_rewards: bool = False
    """True for a panel of the rewards that a task names."""

    def missing(self, record: RunRecord) -> str:
        """Return what keeps the panel from being drawn, as half a sentence; an empty string if nothing does."""
        for name in self.arrays:
            if record.series(name) is None:
                return f"diagnostics.jsonl has no {name}"
        if self.needs_rewards and not record.reward_names:
            return "the task does not name its rewards"
        if self.metrics and not any(map(record.recorded, self.metrics)):
            return f"metrics.jsonl has no {' or '.join(self.metrics)}"
        return ""


class Section(NamedTuple):
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


def mark_events(axes: Axes, record: RunRecord) -> None:
    """Mark alarm and collapse by upright lines over the steps."""
    for step, colour in ((record.warned.alarm, ORANGE), (record.warned.collapse, RED)):
        if step is not None:
            axes.axvline(step, color=colour, linestyle=DASHED, linewidth=1.4, zorder=6)


def _rows_panel(title: str, caption: str, metrics: tuple[str, ...], draw: Callable[[Axes, Rows], None]) -> Panel:
    """Return a panel that is drawn from the rows of the "rl" phase."""
    return Panel(title, caption, lambda axes, record: draw(axes, record.rl), metrics)


def _draw_rewards(axes: Axes, record: RunRecord) -> None:
    colours = itertools.cycle((BLUE, ORANGE, GREEN, RED, PURPLE, INK))
    for name, colour in zip(record.reward_names, colours, strict=False):
        plot_with_mean(axes, record.rl, f"rewards/{name}/mean", colour, name)
    finish(axes, "Rewards by name", "mean")


def _lines_panel(title: str, label: str, caption: str, lines: Lines, log: bool = False) -> Panel:
    """Return a panel of metrics over the steps; `label` names the y axis, which is logarithmic if `log` is true."""

    def draw(axes: Axes, record: RunRecord) -> None:
        for name, (colour, words) in lines.items():
            plot_with_mean(axes, record.rl, name, colour, words)
        if log:
            use_log_scale(axes, np.concatenate([column(record.rl, name) for name in lines]))
        finish(axes, title, label)

    return Panel(title, caption, draw, tuple(lines))


def _shares_panel(title: str, label: str, caption: str, lines: Lines) -> Panel:
    """Return a panel of shares near 1; `label` names the y axis, which shows percentages."""

    def draw(axes: Axes, record: RunRecord) -> None:
        steps = steps_of(record.rl)
        for name, (colour, words) in lines.items():
            plot(axes, steps, column(record.rl, name), colour, words)
        axes.set_ylim(max(0.0, min(axes.get_ylim()[0], 0.9)), 1.01)
        finish(axes, title, label, percent=True)

    return Panel(title, caption, draw, tuple(lines))


def _layers_panel(title: str, name: str, caption: str, low: float | None = None, high: float | None = None) -> Panel:
    """Return a heat map of an array [steps, layers]; its colours span the values unless their ends are given."""

    def draw(axes: Axes, record: RunRecord) -> None:
        heat_maps.draw_by_layer(axes, _series(record, name), low, high)

    return Panel(title, caption, draw, arrays=(name,))


def _histogram_panel(title: str, counts: str, edges: str, quantiles: str | None, unit: str, caption: str) -> Panel:
    """Return a heat map of a histogram over the steps.

    Args:
      title: the panel's title.
      counts: the name of the array of counts, [steps, bins].
      edges: the name of the array of edges between bins, [steps, bins - 1].
      quantiles: the name of an array of quantiles, [steps, n], drawn as lines if it was recorded.
      unit: the label of the values.
      caption: the panel's caption.
    """

    def draw(axes: Axes, record: RunRecord) -> None:
        lines = None if quantiles is None else record.series(quantiles)
        bins = _series(record, edges).values[-1].tolist()
        heat_maps.draw_histogram(axes, _series(record, counts), bins, lines, unit)

    return Panel(title, caption, draw, arrays=(counts, edges))


def _series(record: RunRecord, name: str) -> Series:
    """Return an array that `Panel.missing` has found to be there."""
    series = record.series(name)
    assert series is not None
    return series


_STAGES: dict[Stage, tuple[str, str]] = {
    "judge": (ORANGE, "judge"),
    "write": (BROWN, "write"),
    "draw": (BLUE, "draw"),
    "score": (GREEN, "score"),
    "update": (RED, "update"),
    "probe": (INK, "probe"),
    "evaluate": (PURPLE, "evaluate"),
    "other": (GREY, "other"),
}
"""Stage of a step -> its colour and label, from the bottom of the stack; those that may overlap with others first."""


def _draw_seconds(axes: Axes, rows: Rows) -> None:
    """Stack the seconds of each stage over the steps; the scale is that of the steps that compiled little."""
    rows = [row for row in rows if "step_seconds" in row]
    steps, total = steps_of(rows), column(rows, "step_seconds")
    edges = np.append(steps - 0.5, steps[-1:] + 0.5)
    below = np.zeros(len(rows))
    for stage, (colour, label) in _STAGES.items():
        seconds = np.nan_to_num(column(rows, f"seconds_{stage}"))
        if seconds.any():
            low, high = (np.append(bound, bound[-1:]) for bound in (below, below + seconds))
            axes.fill_between(edges, low, high, step="post", color=colour, linewidth=0, alpha=0.85, label=label)
            below = below + seconds
    overlapped = np.nan_to_num(column(rows, "overlapped_seconds"))
    if overlapped.any():
        plot(axes, steps, overlapped, INK, "overlapped", linewidth=1.0, linestyle=DOTTED)
    compiling = np.nan_to_num(column(rows, "compile_seconds"))
    steady = total[compiling < 0.1 * total]
    top = 1.1 * float(np.nanmax(steady if steady.size else total))
    axes.set_ylim(0, top)
    for step, whole, part in zip(steps, total, compiling, strict=True):
        if whole > top:
            words = f"{whole:.0f} s, of which {part:.0f} s compiling"
            axes.annotate(
                words, (step, 0.97 * top), (5, 0), textcoords="offset points", va="top", fontsize=8, color=INK
            )
    finish(axes, "Seconds of a step", "seconds", legend=False)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), reverse=True, frameon=False, fontsize=8.5, labelcolor=INK)


_QUANTILES = "Colour: share of tokens; lines: median (bold), 1st, 10th, 90th and 99th percentile."

SECTIONS = (
    Section(
        "Learning",
        (
            _rows_panel("Reward", "Mean reward of the training samples.", ("reward",), draw_reward),
            Panel(
                "Held-out problems",
                "Training samples, and held-out problems with 95 % intervals: the share solved, or the mean reward.",
                lambda axes, record: draw_held_out(axes, record.rl, record.warm_start),
                ("solve_rate", "eval_greedy", "eval_sampled", "eval_greedy_reward", "eval_sampled_reward"),
            ),
            Panel(
                "Rewards by name",
                "Mean of each reward over the training samples that it applies to, before weighting.",
                _draw_rewards,
                needs_rewards=True,
            ),
            _rows_panel(
                "Token entropy",
                "Entropy of the policy that drew the responses.",
                ("entropy",),
                draw_entropy,
            ),
            _lines_panel(
                "Length",
                "tokens",
                "Length of the responses of a rollout.",
                {"response_length": (BLUE, "mean"), "longest_response": (GREY, "longest")},
            ),
        ),
    ),
    Section(
        "Stability",
        (
            _rows_panel(
                "Importance ratio",
                "New over old probability of a token.",
                ("ratio_max", "ratio_mean"),
                draw_importance_ratio,
            ),
            _histogram_panel(
                "Log-ratios",
                "log_ratio_histogram",
                "log_ratio_edges",
                "log_ratio_quantiles",
                "log-ratio, nats",
                _QUANTILES,
            ),
            _rows_panel(
                "Router shift γ",
                "γ = 1 means the same route.",
                ("gamma_mean", "gamma_p10", "gamma_min"),
                draw_router_shift,
            ),
            _histogram_panel(
                "Drift, −log γ",
                "drift_histogram",
                "drift_edges",
                "drift_quantiles",
                "−log γ, nats",
                f"Lowest bin: below 0.0001, no drift. {_QUANTILES}",
            ),
            _rows_panel(
                "Clip fraction",
                "Tokens without gradient, by the sign of their advantage.",
                ("clip_fraction", "clip_fraction_positive", "clip_fraction_negative"),
                draw_clip_fraction,
            ),
            _shares_panel(
                "Effective sample size",
                "share of the tokens",
                "(Σw)² / (n Σw²) over tokens.",
                {"effective_sample_size": (BLUE, "ratios w"), "shifted_sample_size": (ORANGE, "w · max(γ, floor)")},
            ),
            _lines_panel(
                "Gradient norm",
                "before clipping",
                "Mean over the updates of a step.",
                {"grad_norm": (INK, "norm")},
                log=True,
            ),
            _lines_panel(
                "KL of an update",
                "nats per token",
                "Estimated divergence of the old policy from the new one.",
                {"approx_kl": (BLUE, "old to new")},
                log=True,
            ),
        ),
    ),
    Section(
        "Routing",
        (
            _layers_panel(
                "Drift by layer", "layer_drift", "Mean |log r − log r_old| of the old experts, nats.", low=0.0
            ),
            _layers_panel("Overlap by layer", "layer_overlap", "Mean share of the experts that stay.", high=1.0),
            _layers_panel(
                "Routes that stay, by layer", "layer_stays", "Share of tokens that keep all their experts.", high=1.0
            ),
            _shares_panel(
                "Routes that stay",
                "share",
                "Tokens that keep all their experts in all layers, and experts that stay.",
                {"route_stays": (BLUE, "whole routes"), "overlap": (ORANGE, "experts")},
            ),
            _layers_panel("Router entropy by layer", "layer_router_entropy", "Mean entropy of a layer's router, nats."),
            _layers_panel(
                "Load violation by layer",
                "layer_max_violation",
                "Load of the busiest expert over the mean, − 1.",
                low=0.0,
            ),
            Panel(
                "Expert load, last step",
                "Relative to the mean: 1 is even.",
                lambda axes, record: heat_maps.draw_load(axes, _series(record, "expert_load").values[-1]),
                arrays=("expert_load",),
            ),
        ),
    ),
    Section(
        "Objectives on the same batch",
        (
            _rows_panel(
                "Cosine to the on-policy gradient",
                "All objectives at the same parameters, on the responses of the step; 1 means the same direction as "
                "on-policy. Grey: between two halves of the on-policy rollout, which are noisy too.",
                (probes.NEEDED,),
                probes.draw_cosine,
            ),
            _rows_panel(
                "Signal-to-noise ratio of gradients",
                "All objectives at the same parameters, over parts of the same responses. Noise alone gives about 1.",
                (probes.NEEDED,),
                probes.draw_signal,
            ),
        ),
    ),
    Section(
        "Time",
        (
            _rows_panel(
                "Seconds of a step",
                "By what the host worked for or waited for. Each second counts once; a checkpoint's in the step after. "
                "Dotted: judging and writing while the device was drawing, at least. Steps that compile may reach "
                "beyond the scale.",
                ("seconds_update",),
                _draw_seconds,
            ),
        ),
    ),
    Section(
        "Sampler and trainer",
        (
            _lines_panel(
                "Mismatch",
                "nats per token",
                "Sampler's and trainer's log-probabilities under the same parameters.",
                {
                    "mismatch_mean": (BLUE, "mean |difference|"),
                    "mismatch_max": (RED, "largest"),
                    "sampler_kl": (GREY, "KL"),
                },
                log=True,
            ),
            _histogram_panel(
                "Mismatch, trainer − sampler",
                "mismatch_histogram",
                "log_ratio_edges",
                None,
                "difference, nats",
                "Colour: share of tokens.",
            ),
        ),
    ),
)
"""The sections of a report, in their order."""
