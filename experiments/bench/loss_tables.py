"""Tables and the picture of the loss benchmark, from its plain figures. This file must never measure anything."""

import io
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import rich.console
import rich.table
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rspo_jax.records import replace_file

# Told apart by people with any kind of colour vision (Okabe and Ito, "Color universal design", 2008).
_COLOURS = {"rspo_jax": "#0072B2", "tunix": "#009E73", "torch eager": "#D55E00", "torch compile": "#E69F00"}
_GREY = "#8A8A8A"


class _Figure(NamedTuple):
    """A column of the tables of the level "step"."""

    column: str
    key: str
    unit: float


_STEP_FIGURES = (
    _Figure("GFLOP", "flops", 1e9),
    _Figure("kernels MiB", "bytes_accessed", 2**20),
    _Figure("arguments MiB", "argument_bytes", 2**20),
    _Figure("temporary MiB", "temporary_bytes", 2**20),
    _Figure("peak MiB", "peak_bytes", 2**20),  # last, and for TPUs only: the CPU's compiler leaves temporaries out
)


def show_times(console: rich.console.Console, case: dict[str, Any]) -> None:
    """A table for each direction, one row a program: compile time, time, and its ratios."""
    columns = ("program", "compile s", "fastest ms", "median ms", "÷ first", "÷ ours", "fastest ÷ ours", "% of bound")
    for direction in dict.fromkeys(row["direction"] for row in case["programs"]):
        table = _table(f"{_title(case)} · {direction}", columns)
        for row in case["programs"]:
            if row["direction"] != direction:
                continue
            share = row["share_of_bound"]
            table.add_row(
                describe(row),
                f"{row['compile_seconds']:.2f}" if row["compile_seconds"] else "",
                f"{1e3 * row['fastest_seconds']:.3f}",
                _spread({name: 1e3 * value for name, value in row["seconds"].items()}, digits=3),
                _spread(row["ratio_to_first"]),
                _spread(row["ratio_to_ours"]),
                "" if row["ratio_to_ours"] is None else f"{row['fastest_ratio_to_ours']:.2f}",
                "" if share is None else f"{100 * share:.1f}",
            )
        console.print(table)
    console.print(
        "Medians (quartiles). “÷ first” and “÷ ours” are medians of the ratios of the same turn; “ours” is the same "
        "loss by rspo_jax, without metrics. The second of two calls counts, so caches are warm. Where "
        "other work shares the cores, the fastest says more than the median.",
        style="dim",
    )


def show_analyses(console: rich.console.Console, case: dict[str, Any], where: str = "") -> None:
    """A table for each direction, one row a program: what XLA says of it, and the bound of the device."""
    rows = [row for row in case["programs"] if row["analysis"]]
    optimal = any(row["analysis"]["optimal_seconds"] for row in rows)
    columns = ("program", "MFLOP", "k exp, log", "kernels MiB", "in + out MiB", "temporary MiB", "bound µs", "set by")
    columns += ("compiler's µs", "compile s") if optimal else ()
    for direction in dict.fromkeys(row["direction"] for row in rows):
        table = _table(" · ".join(filter(None, (_title(case), direction, where))), columns)
        for row in rows:
            if row["direction"] == direction:
                table.add_row(describe(row), *_analysis_cells(row, optimal))
        console.print(table)
    console.print(
        "kernels: what all kernels read and write. Bound: in + out bytes once, or the program's own FLOPs, at the "
        "device's peak; exp and log count as no FLOPs, a loop's body as run once, and needless arithmetic raises it.",
        style="dim",
    )
    for peak in dict.fromkeys(tuple(row["bound"]["peak"].values()) for row in rows if row["bound"]):
        console.print(f"Peak: {peak[0] / 1e9:,.0f} GFLOP/s, {peak[1] / 1e9:,.0f} GB/s; {peak[2]}.", style="dim")


def show_step(console: rich.console.Console, case: dict[str, Any], topology: str = "") -> None:
    """The level "step": times where there are any, what the compiler says, and what the route takes."""
    devices = case["route"]["devices"]
    where = f"{topology}, one of {devices} devices" if topology else ""
    for direction in dict.fromkeys(row["direction"] for row in case["programs"]):
        rows = [row for row in case["programs"] if row["direction"] == direction]
        title = " · ".join(filter(None, (_title(case), direction, where)))
        analysed = [row for row in rows if not row["is_control"]]
        console.print(_step_analyses(title, analysed, _STEP_FIGURES if topology else _STEP_FIGURES[:-1]))
        if "seconds" in rows[0]:
            console.print(_step_times(title, rows, case["shape"]["batch"] * case["shape"]["tokens"]))
            for row in rows[1:]:
                names = f"{rows[0]['objective']} : {row['objective']}"
                names += ", the same program again" if row["is_control"] else ""
                ratio = _spread(row["ratio_to_first"], digits=3)
                console.print(f"{direction}: throughput {names} = {ratio}", style="bold", soft_wrap=True)
    _show_route(console, case["route"])
    console.print(
        "Throughput ratios are medians (quartiles) of the ratios of the same turn. FLOPs and kernels count a loop's "
        "body once, however often it runs: one layer forward and backward, one block of the vocabulary, the whole "
        "optimizer. Memory is that of all layers. A program without γ is given "
        "no route and keeps none.",
        style="dim",
    )


def _step_analyses(title: str, rows: list[dict[str, Any]], figures: tuple[_Figure, ...]) -> rich.table.Table:
    table = _table(title, ("program", "compile s", *(figure.column for figure in figures)))
    for row in rows:
        table.add_row(describe(row), f"{row['compile_seconds']:.1f}", *_step_cells(row["analysis"], figures))
    for row in rows[1:]:
        name, excess = f"{rows[0]['objective']} − {row['objective']}", row["first_minus_this"]
        table.add_row(name, "", *_step_cells(excess, figures))
        percent = _percentages(rows[0]["analysis"], row["analysis"], figures)
        table.add_row(f"{name}, %", "", *percent)
    return table


def _step_times(title: str, rows: list[dict[str, Any]], tokens: int) -> rich.table.Table:
    table = _table(title, ("program", "fastest ms", "median ms", "places/s", "÷ first"))
    for row in rows:
        milliseconds = {name: 1e3 * value for name, value in row["seconds"].items()}
        table.add_row(
            describe(row),
            f"{1e3 * row['fastest_seconds']:.1f}",
            _spread(milliseconds, digits=1),
            f"{tokens / row['seconds']['median']:,.0f}",
            _spread(row["ratio_to_first"], digits=3),
        )
    return table


def _show_route(console: rich.console.Console, route: dict[str, Any]) -> None:
    a_token = route["devices"] * route["compiled_bytes"] / route["places"]
    console.print(
        f"Route: {route['bytes_a_token']} bytes a token meant, {a_token:.1f} as compiled; on each of "
        f"{route['devices']} devices {route['meant_bytes'] / 2**20:.3f} MiB meant, "
        f"{route['compiled_bytes'] / 2**20:.3f} MiB as compiled.",
        soft_wrap=True,
    )


def show_depths(console: rich.console.Console, cases: list[dict[str, Any]], topology: str = "") -> None:
    """Neighbouring depths of one model, as a line: what grows with the layers, and what is left at no layers."""
    figures = _STEP_FIGURES if topology else _STEP_FIGURES[:-1]
    for low, high in itertools.pairwise(cases):
        depths = low["shape"]["layers"], high["shape"]["layers"]
        title = f"{depths[0]} and {depths[1]} layers, as a line"
        table = _table(title, ("program", "a layer more, or at none", *(figure.column for figure in figures)))
        first: dict[str, dict[str, float]] = {}
        for one, other in zip(low["programs"], high["programs"], strict=True):
            if one["is_control"]:
                continue
            slope, rest = _line([row["analysis"] for row in (one, other)], depths)
            name = f"{describe(one)}, {one['direction']}"
            table.add_row(name, "a layer more", *_step_cells(slope, figures))
            table.add_row("", "at no layers", *_step_cells(rest, figures))
            base = first.setdefault(one["direction"], rest)
            if base is not rest:
                table.add_row("", "first − this, at none, %", *_percentages(base, rest, figures))
        console.print(table)
    console.print(
        "A loop's body counts once whatever the depth. So FLOPs and kernels at no layers are one layer of the model, "
        "with embedding and head; those of a layer more are its share of the optimizer. Memory is simply a line.",
        style="dim",
    )


def _line(analyses: list[dict[str, float]], depths: tuple[int, int]) -> tuple[dict[str, float], dict[str, float]]:
    """Slope and intercept of each figure over the depth."""
    keys = [figure.key for figure in _STEP_FIGURES]
    slope = {key: (analyses[1][key] - analyses[0][key]) / (depths[1] - depths[0]) for key in keys}
    return slope, {key: analyses[0][key] - depths[0] * slope[key] for key in keys}


def _percentages(base: dict[str, float], other: dict[str, float], figures: tuple[_Figure, ...]) -> list[str]:
    """How much more the first has than the other."""
    return [
        f"{100 * (base[figure.key] / other[figure.key] - 1):.4f}" if other[figure.key] else "" for figure in figures
    ]


def _step_cells(analysis: dict[str, float], figures: tuple[_Figure, ...]) -> list[str]:
    return [f"{analysis[figure.key] / figure.unit:,.3f}" for figure in figures]


def _analysis_cells(row: dict[str, Any], optimal: bool) -> list[str]:
    analysis, bound = row["analysis"], row["bound"]
    cells = [
        f"{analysis['flops'] / 1e6:.2f}",
        f"{analysis['transcendentals'] / 1e3:.0f}",
        f"{analysis['bytes_accessed'] / 2**20:.2f}",
        f"{analysis['compulsory_bytes'] / 2**20:.2f}",
        f"{analysis['temporary_bytes'] / 2**20:.2f}",
        f"{1e6 * bound['seconds']:.1f}" if bound else "unknown device",
        bound["limit"] if bound else "",
    ]
    if optimal:
        cells += [f"{1e6 * (analysis['optimal_seconds'] or 0):.1f}", f"{row['compile_seconds']:.1f}"]
    return cells


def describe(row: dict[str, Any]) -> str:
    """A program in a few words."""
    shift = " with γ" if row["router_shift"] else ""
    return f"{row['library']}: {row['objective']}{shift}, {row['returns']}"


def draw(figures: dict[str, Any], path: Path) -> None:
    """Median times with their quartiles on a log axis, a panel for each case and direction, and the bounds."""
    panels = [
        (f"{_title(case)} · {direction}", [row for row in case["programs"] if row["direction"] == direction])
        for case in figures["cases"]
        for direction in dict.fromkeys(row["direction"] for row in case["programs"])
    ]
    heights = [1.2 + 0.25 * len(rows) for _, rows in panels]
    figure = Figure(figsize=(11, sum(heights)), dpi=110, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    for axes, (title, rows) in zip(
        figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0], panels, strict=True
    ):
        _draw_times(axes, rows)
        axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("ms; dot: median, line: quartiles, grey mark: bound of the device")
    picture = io.BytesIO()
    canvas.print_png(picture)
    replace_file(path, picture.getvalue())


def _draw_times(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for height, row in enumerate(rows):
        low, median, high = (1e3 * row["seconds"][name] for name in ("low", "median", "high"))
        colour = _COLOURS[row["library"]]
        axes.plot([low, high], [height, height], "-", color=colour, linewidth=2)
        axes.plot(median, height, "o", color=colour)
        if row["bound"]:
            axes.plot(1e3 * row["bound"]["seconds"], height, "|", color=_GREY, markersize=10, markeredgewidth=2)
    axes.set_yticks(range(len(rows)), [describe(row) for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.grid(axis="x", which="both", alpha=0.25)
    axes.tick_params(axis="x", labelbottom=True)


def _title(case: dict[str, Any]) -> str:
    axes = ", ".join(f"{letter} {size}" for letter, size in zip("BTLKE", case["shape"].values(), strict=True))
    return f"level {case['level']} · {axes} · {case['dtype']}"


def _table(title: str, columns: tuple[str, ...]) -> rich.table.Table:
    table = rich.table.Table(title=title)
    for column in columns:
        table.add_column(
            column, justify="left" if column in ("program", "set by") else "right", no_wrap=column == "program"
        )
    return table


def _spread(values: dict[str, float] | None, digits: int = 2) -> str:
    if values is None:
        return ""
    low, median, high = (f"{values[name]:.{digits}f}" for name in ("low", "median", "high"))
    return f"{median} ({low} – {high})"
