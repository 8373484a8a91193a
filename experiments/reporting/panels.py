"""The panels of a run's report: what each shows, what it needs, and how it is drawn.

A panel whose data is missing says what is missing instead. This file must never read a file.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from experiments.reporting import heat_maps, probes
from experiments.reporting import training_curves as plots
from experiments.reporting.curves import (
    BLUE,
    DASHED,
    GREY,
    INK,
    ORANGE,
    RED,
    column,
    finish,
    plot,
    plot_with_mean,
    steps_of,
    use_log_scale,
)
from experiments.reporting.record import RunRecord, Series

Draw = Callable[[Axes, RunRecord], None]


class Panel(NamedTuple):
    """One picture."""

    title: str
    caption: str
    needs: tuple[str, ...]
    """Metrics, of which one must have been recorded; or arrays, of which all must."""
    arrays: bool
    draw: Draw

    def missing(self, record: RunRecord) -> str:
        """What keeps it from being drawn, as half a sentence; nothing if it can be."""
        if self.arrays:
            absent = [name for name in self.needs if record.series(name) is None]
            return f"diagnostics.jsonl has no {absent[0]}" if absent else ""
        return "" if any(map(record.recorded, self.needs)) else f"metrics.jsonl has no {' or '.join(self.needs)}"


class Section(NamedTuple):
    """Panels that belong together."""

    title: str
    panels: tuple[Panel, ...]


def _series(record: RunRecord, name: str) -> Series:
    series = record.series(name)
    assert series is not None  # Panel.missing was asked
    return series


def _lines(title: str, label: str, lines: dict[str, tuple[str, str]], log: bool, axes: Axes, record: RunRecord) -> None:
    """Metrics as lines: name -> colour and label."""
    for name, (colour, words) in lines.items():
        plot_with_mean(axes, record.rl, name, colour, words)
    values = np.concatenate([column(record.rl, name) for name in lines])
    positive = values[np.isfinite(values) & (values > 0)]
    if log and positive.size:
        use_log_scale(axes, float(positive.min()), float(positive.max()))
    finish(axes, title, label)


def _lines_panel(title: str, label: str, caption: str, lines: dict[str, tuple[str, str]], log: bool = False) -> Panel:
    return Panel(title, caption, tuple(lines), False, functools.partial(_lines, title, label, lines, log))


def _share(title: str, label: str, lines: dict[str, tuple[str, str]], axes: Axes, record: RunRecord) -> None:
    steps = steps_of(record.rl)
    for name, (colour, words) in lines.items():
        plot(axes, steps, column(record.rl, name), colour, words)
    axes.set_ylim(max(0.0, min(axes.get_ylim()[0], 0.9)), 1.01)
    finish(axes, title, label, percent=True)


def _share_panel(title: str, label: str, caption: str, lines: dict[str, tuple[str, str]]) -> Panel:
    return Panel(title, caption, tuple(lines), False, functools.partial(_share, title, label, lines))


def _by_layer(name: str, low: float | None, high: float | None, axes: Axes, record: RunRecord) -> None:
    heat_maps.draw_by_layer(axes, _series(record, name), low, high)


def _layer_panel(title: str, name: str, caption: str, low: float | None = None, high: float | None = None) -> Panel:
    return Panel(title, caption, (name,), True, functools.partial(_by_layer, name, low, high))


def _histogram(name: str, edges: str, quantiles: str | None, unit: str, axes: Axes, record: RunRecord) -> None:
    lines = None if quantiles is None else record.series(quantiles)
    heat_maps.draw_histogram(axes, _series(record, name), _series(record, edges).values[-1].tolist(), lines, unit)


def _histogram_panel(title: str, name: str, edges: str, quantiles: str | None, unit: str, caption: str) -> Panel:
    return Panel(title, caption, (name, edges), True, functools.partial(_histogram, name, edges, quantiles, unit))


def _of_rows(draw: Callable[[Axes, list], None]) -> Draw:
    return lambda axes, record: draw(axes, record.rl)


def _last_load(axes: Axes, record: RunRecord) -> None:
    heat_maps.draw_load(axes, _series(record, "expert_load").values[-1])


def mark(axes: Axes, record: RunRecord) -> None:
    """Alarm and collapse, as upright lines over the steps."""
    for step, colour in ((record.warned.alarm, ORANGE), (record.warned.collapse, RED)):
        if step is not None:
            axes.axvline(step, color=colour, linestyle=DASHED, linewidth=1.4, zorder=6)


_QUANTILES = "Colour: share of tokens; lines: median (bold), 1st, 10th, 90th and 99th percentile."

SECTIONS = (
    Section(
        "Learning",
        (
            Panel("Reward", "Mean reward of the training samples.", ("reward",), False, _of_rows(plots.draw_reward)),
            Panel(
                "Solve rate",
                "Training samples, and held-out problems with 95 % intervals.",
                ("solve_rate", "eval_greedy", "eval_sampled"),
                False,
                lambda axes, record: plots.draw_solve_rate(axes, record.rl, record.warm_start),
            ),
            Panel(
                "Token entropy",
                "Of the policy that drew the responses.",
                ("entropy",),
                False,
                _of_rows(plots.draw_entropy),
            ),
            _lines_panel(
                "Length",
                "tokens",
                "Of the responses of a rollout.",
                {"response_length": (BLUE, "mean"), "longest_response": (GREY, "longest")},
            ),
        ),
    ),
    Section(
        "Stability",
        (
            Panel(
                "Importance ratio",
                "New over old probability of a token.",
                ("ratio_max", "ratio_mean"),
                False,
                _of_rows(plots.draw_importance_ratio),
            ),
            _histogram_panel(
                "Log-ratios",
                "log_ratio_histogram",
                "log_ratio_edges",
                "log_ratio_quantiles",
                "log-ratio, nats",
                _QUANTILES,
            ),
            Panel(
                "Router shift γ",
                "1 means the same route.",
                ("gamma_mean", "gamma_p10", "gamma_min"),
                False,
                _of_rows(plots.draw_router_shift),
            ),
            _histogram_panel(
                "Drift, −log γ",
                "drift_histogram",
                "drift_edges",
                "drift_quantiles",
                "−log γ, nats",
                f"The lowest bin: below 0.0001, no drift. {_QUANTILES}",
            ),
            Panel(
                "Clip fraction",
                "Tokens without gradient, by the sign of their advantage.",
                ("clip_fraction", "clip_fraction_positive", "clip_fraction_negative"),
                False,
                _of_rows(plots.draw_clip_fraction),
            ),
            _share_panel(
                "Effective sample size",
                "share of the tokens",
                "(Σw)² / (n Σw²), by tokens.",
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
                "Of the old policy to the new one, estimated.",
                {"approx_kl": (BLUE, "old to new")},
                log=True,
            ),
        ),
    ),
    Section(
        "Routing",
        (
            _layer_panel(
                "Drift by layer", "layer_drift", "Mean |log r − log r_old| of the old experts, nats.", low=0.0
            ),
            _layer_panel("Overlap by layer", "layer_overlap", "Mean share of the experts that stay.", high=1.0),
            _layer_panel(
                "Routes that stay, by layer", "layer_stays", "Share of tokens that keep all their experts.", high=1.0
            ),
            _share_panel(
                "Routes that stay",
                "share",
                "Tokens that keep all their experts in all layers.",
                {"route_stays": (BLUE, "whole routes"), "overlap": (ORANGE, "experts")},
            ),
            _layer_panel("Router entropy by layer", "layer_router_entropy", "Mean, nats."),
            _layer_panel(
                "Load violation by layer", "layer_max_violation", "Busiest expert over the mean, − 1.", low=0.0
            ),
            Panel("Expert load, last step", "Times the mean: 1 is even.", ("expert_load",), True, _last_load),
        ),
    ),
    Section(
        "Objectives on the same batch",
        (
            Panel(
                "Cosine to the on-policy gradient",
                "All objectives at the same parameters, on the responses of the step. 1: as if they were on-policy. "
                "Grey: between two halves of the on-policy rollout, which are noisy too.",
                (probes.NEEDED,),
                False,
                _of_rows(probes.draw_cosine),
            ),
            Panel(
                "Signal-to-noise ratio of gradients",
                "All objectives at the same parameters, over parts of the same responses. Noise alone gives about 1.",
                (probes.NEEDED,),
                False,
                _of_rows(probes.draw_signal),
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
"""What a report shows, in its order."""
