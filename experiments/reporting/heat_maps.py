"""Heat maps of arrays over the steps of a run: layers or bins upwards, steps to the right."""

from collections.abc import Sequence

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize

from experiments.reporting.curves import GREY, INK
from experiments.reporting.record import Series

_COLOUR_MAP = "viridis"  # perceptually uniform, and readable in grey


def draw_by_layer(axes: Axes, series: Series, low: float | None = None, high: float | None = None) -> None:
    """Draw a heat map of [steps, layers]; the colours span the values unless their ends are given."""
    values = np.where(np.isfinite(series.values), series.values, np.nan)
    finite = values[np.isfinite(values)]
    low = low if low is not None else float(finite.min()) if finite.size else 0.0
    high = high if high is not None else float(finite.max()) if finite.size else 1.0
    _draw_columns(axes, Series(series.steps, values), Normalize(low, max(high, low + 1e-9)))
    axes.set_ylabel("layer", color=INK)
    axes.yaxis.set_major_locator(ticker.MaxNLocator(6, integer=True, min_n_ticks=1))


def draw_histogram(axes: Axes, counts: Series, edges: Sequence[float], quantiles: Series | None, unit: str) -> None:
    """Draw a heat map of the shares of bins, with lines for quantiles if there are any.

    Args:
      axes: the panel.
      counts: counts of the bins, [steps, bins]; one bin more than edges.
      edges: edges between bins, in rising order.
      quantiles: quantiles in the unit of the edges, [steps, quantiles].
      unit: label of the values.
    """
    totals = counts.values.sum(axis=1, keepdims=True)
    shares = np.divide(counts.values, totals, out=np.full(counts.values.shape, np.nan), where=totals > 0)
    _draw_columns(axes, Series(counts.steps, np.where(shares > 0, shares, np.nan)), LogNorm(1e-4, 1.0))
    axes.set_facecolor("#20113b")  # below the scale's end
    places = np.arange(len(edges)) + 0.5
    if quantiles is not None:
        count = quantiles.values.shape[1]
        for index in range(count):
            line = np.interp(quantiles.values[:, index], edges, places)
            width = 1.6 if index == count // 2 else 0.7  # the line in the middle is the boldest
            axes.plot(quantiles.steps, line, color="#FEFEFE", linewidth=width, alpha=0.9)
    axes.set_ylim(-0.5, len(edges) + 0.5)
    # Ticks stand at powers of ten; with bins on both sides of 0, small powers are too close to it for a tick.
    two_sided = edges[0] < 0
    powers = np.log10(np.abs(edges))
    is_power = np.isclose(powers, np.rint(powers), atol=1e-3)
    shown = [at for at, edge in enumerate(edges) if is_power[at] and abs(edge) >= (1e-3 if two_sided else 0.0)]
    ticks = {places[at]: f"{edges[at]:g}" for at in shown} | ({len(edges) / 2: "0"} if two_sided else {})
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylabel(unit, color=INK)


def draw_load(axes: Axes, load: np.ndarray) -> None:
    """Draw the load of every expert of every layer, [L, E], relative to the mean."""
    relative = load * load.shape[1]
    image = axes.imshow(
        relative,
        aspect="auto",
        origin="lower",
        cmap=_COLOUR_MAP,
        norm=Normalize(0, max(2.0, float(np.nanmax(relative, initial=0.0)))),
        interpolation="nearest",
    )
    _add_scale(axes, image)
    axes.set(xlabel="expert", ylabel="layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.MaxNLocator(8, integer=True, min_n_ticks=1))


def _draw_columns(axes: Axes, series: Series, norm: Normalize) -> None:
    """Draw [steps, rows] with each column at its step; steps without a record stay empty."""
    gaps = np.diff(series.steps)
    pace = int(np.gcd.reduce(gaps)) if gaps.size else 1
    first, last = int(series.steps[0]), int(series.steps[-1])
    columns = np.full(((last - first) // pace + 1, series.values.shape[1]), np.nan)
    columns[(series.steps - first) // pace] = series.values
    extent = (first - pace / 2, last + pace / 2, -0.5, series.values.shape[1] - 0.5)
    image = axes.imshow(
        columns.T, aspect="auto", origin="lower", extent=extent, cmap=_COLOUR_MAP, norm=norm, interpolation="nearest"
    )
    _add_scale(axes, image)
    axes.set_xlabel("RL step", color=INK)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True, min_n_ticks=1))


def _add_scale(axes: Axes, image) -> None:
    """Add the scale of the colours, and style the panel."""
    figure = axes.get_figure()
    assert figure is not None
    scale = figure.colorbar(image, ax=axes, pad=0.02, aspect=30)
    scale.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    scale.ax.tick_params(length=0, labelsize=8, colors=INK)
    scale.ax.minorticks_off()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=2, labelsize=9, colors=INK, color=GREY)
