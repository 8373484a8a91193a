"""Tables and the picture of the loss benchmark, from its plain figures."""

import io
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import rich.console
import rich.table
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.bench.timing import Quartiles
from experiments.reporting.curves import BLUE, GREEN, GREY, ORANGE, RED
from rspo_jax.records import replace_file

_COLOURS = {"rspo_jax": BLUE, "tunix": GREEN, "torch eager": RED, "torch compile": ORANGE}


class _Column(NamedTuple):
    """A column of the tables of the level "step"."""

    title: str
    key: str
    """A field of `Costs`."""
    unit: float


_STEP_COLUMNS = (
    _Column("GFLOP", "flops", 1e9),
    _Column("kernels MiB", "bytes_accessed", 2**20),
    _Column("arguments MiB", "argument_bytes", 2**20),
    _Column("temporary MiB", "temporary_bytes", 2**20),
    _Column("peak MiB", "peak_bytes", 2**20),  # last, and for TPUs only: the CPU's compiler leaves temporaries out
)


def show_times(console: rich.console.Console, case: dict[str, Any]) -> None:
    """Print a table for each direction with a row for each candidate: compile time, time, and its ratios."""
    columns = ("program", "compile s", "fastest ms", "median ms", "÷ first", "÷ ours", "fastest ÷ ours", "% of bound")
    for direction in dict.fromkeys(row["direction"] for row in case["programs"]):
        table = _table(f"{_title(case)} · {direction}", columns)
        for row in case["programs"]:
            if row["direction"] != direction:
                continue
            share = row["share_of_bound"]
            table.add_row(
                name_of(row),
                f"{row['compile_seconds']:.2f}" if row["compile_seconds"] else "",
                f"{1e3 * row['fastest_seconds']:.3f}",
                _median_and_range(row["seconds"], digits=3, scale=1e3),
                _median_and_range(row["ratio_to_first"]),
                _median_and_range(row["ratio_to_ours"]),
                "" if row["ratio_to_ours"] is None else f"{row['fastest_ratio_to_ours']:.2f}",
                "" if share is None else f"{100 * share:.1f}",
            )
        console.print(table)
    console.print(
        "Medians (quartiles). “÷ first” and “÷ ours” are medians of the ratios of the same turn; “ours” is the same "
        "loss by rspo_jax, without metrics. The second of two calls counts, so caches are warm. If other work shares "
        "the cores, the fastest time is more telling than the median.",
        style="dim",
    )


def show_costs(console: rich.console.Console, case: dict[str, Any], where: str = "") -> None:
    """Print a table for each direction with a row for each candidate: XLA's costs, and the bound of the device."""
    rows = [row for row in case["programs"] if row["analysis"]]
    optimal = any(row["analysis"]["optimal_seconds"] for row in rows)
    columns = ("program", "MFLOP", "k exp, log", "kernels MiB", "in + out MiB", "temporary MiB", "bound µs", "set by")
    columns += ("compiler's µs", "compile s") if optimal else ()
    for direction in dict.fromkeys(row["direction"] for row in rows):
        table = _table(" · ".join(filter(None, (_title(case), direction, where))), columns)
        for row in rows:
            if row["direction"] == direction:
                table.add_row(name_of(row), *_cost_cells(row, optimal))
        console.print(table)
    console.print(
        "kernels: bytes read and written by all kernels. Bound: in + out bytes once, or the program's own FLOPs, at "
        "the device's peak; exp and log count as no FLOPs, a loop's body once, and needless arithmetic raises it.",
        style="dim",
    )
    for peak in dict.fromkeys(tuple(row["bound"]["peak"].values()) for row in rows if row["bound"]):
        console.print(f"Peak: {peak[0] / 1e9:,.0f} GFLOP/s, {peak[1] / 1e9:,.0f} GB/s; {peak[2]}.", style="dim")


def show_step(console: rich.console.Console, case: dict[str, Any], topology: str = "") -> None:
    """Print the level "step": XLA's costs, times if there are any, and the bytes of the route."""
    devices = case["route"]["devices"]
    where = f"{topology}, one of {devices} devices" if topology else ""
    for direction in dict.fromkeys(row["direction"] for row in case["programs"]):
        rows = [row for row in case["programs"] if row["direction"] == direction]
        title = " · ".join(filter(None, (_title(case), direction, where)))
        programs = [row for row in rows if not row["is_control"]]
        columns = _STEP_COLUMNS if topology else _STEP_COLUMNS[:-1]
        table = _table(title, ("program", "compile s", *(column.title for column in columns)))
        for row in programs:
            table.add_row(name_of(row), f"{row['compile_seconds']:.1f}", *_step_cells(row["analysis"], columns))
        for row in programs[1:]:
            name, excess = f"{programs[0]['objective']} − {row['objective']}", row["first_minus_this"]
            table.add_row(name, "", *_step_cells(excess, columns))
            table.add_row(f"{name}, %", "", *_percentages(programs[0]["analysis"], row["analysis"], columns))
        console.print(table)
        if "seconds" in rows[0]:
            console.print(_step_times(title, rows, case["shape"]["batch"] * case["shape"]["tokens"]))
            for row in rows[1:]:
                names = f"{rows[0]['objective']} : {row['objective']}"
                names += ", the same program again" if row["is_control"] else ""
                ratio = _median_and_range(row["ratio_to_first"], digits=3)
                console.print(f"{direction}: throughput {names} = {ratio}", style="bold", soft_wrap=True)
    route = case["route"]
    bytes_a_token = devices * route["compiled_bytes"] / route["places"]
    console.print(
        f"Route: {route['bytes_a_token']} bytes a token meant, {bytes_a_token:.1f} as compiled; on each of {devices} "
        f"devices {route['meant_bytes'] / 2**20:.3f} MiB meant, {route['compiled_bytes'] / 2**20:.3f} MiB as compiled.",
        soft_wrap=True,
    )
    console.print(
        "Throughput ratios are medians (quartiles) of the ratios of the same turn. FLOPs and kernels count a loop's "
        "body once, however often it runs: one layer forward and backward, one block of the vocabulary, the whole "
        "optimizer. Memory is that of all layers. A program without γ is given no route and keeps none.",
        style="dim",
    )


def _step_times(title: str, rows: list[dict[str, Any]], tokens: int) -> rich.table.Table:
    table = _table(title, ("program", "fastest ms", "median ms", "places/s", "÷ first"))
    for row in rows:
        table.add_row(
            name_of(row),
            f"{1e3 * row['fastest_seconds']:.1f}",
            _median_and_range(row["seconds"], digits=1, scale=1e3),
            f"{tokens / row['seconds']['median']:,.0f}",
            _median_and_range(row["ratio_to_first"], digits=3),
        )
    return table


def show_depths(console: rich.console.Console, cases: list[dict[str, Any]], topology: str = "") -> None:
    """Print the line through neighbouring depths of one model: the costs of a layer more, and those at no layers."""
    columns = _STEP_COLUMNS if topology else _STEP_COLUMNS[:-1]
    for low, high in itertools.pairwise(cases):
        depths = low["shape"]["layers"], high["shape"]["layers"]
        title = f"{depths[0]} and {depths[1]} layers, as a line"
        table = _table(title, ("program", "a layer more, or at none", *(column.title for column in columns)))
        first: dict[str, dict[str, float]] = {}
        for one, other in zip(low["programs"], high["programs"], strict=True):
            if one["is_control"]:
                continue
            slope, rest = line_through([row["analysis"] for row in (one, other)], depths)
            name = f"{name_of(one)}, {one['direction']}"
            table.add_row(name, "a layer more", *_step_cells(slope, columns))
            table.add_row("", "at no layers", *_step_cells(rest, columns))
            base = first.setdefault(one["direction"], rest)
            if base is not rest:
                table.add_row("", "first − this, at none, %", *_percentages(base, rest, columns))
        console.print(table)
    console.print(
        "A loop's body counts once whatever the depth. So FLOPs and kernels at no layers are one layer of the model, "
        "with embedding and head; those of a layer more are its share of the optimizer. Memory is simply a line.",
        style="dim",
    )


def line_through(costs: list[dict[str, float]], depths: tuple[int, int]) -> tuple[dict[str, float], dict[str, float]]:
    """Return slope and intercept of each cost over the depth, from its values at two depths."""
    keys = [column.key for column in _STEP_COLUMNS]
    slope = {key: (costs[1][key] - costs[0][key]) / (depths[1] - depths[0]) for key in keys}
    return slope, {key: costs[0][key] - depths[0] * slope[key] for key in keys}


def _percentages(base: dict[str, float], other: dict[str, float], columns: tuple[_Column, ...]) -> list[str]:
    """Return the excess of `base` over `other` in each column, in percent."""
    keys = [column.key for column in columns]
    return [f"{100 * (base[key] / other[key] - 1):.4f}" if other[key] else "" for key in keys]


def _step_cells(costs: dict[str, float], columns: tuple[_Column, ...]) -> list[str]:
    return [f"{costs[column.key] / column.unit:,.3f}" for column in columns]


def _cost_cells(row: dict[str, Any], optimal: bool) -> list[str]:
    costs, bound = row["analysis"], row["bound"]
    cells = [
        f"{costs['flops'] / 1e6:.2f}",
        f"{costs['transcendentals'] / 1e3:.0f}",
        f"{costs['bytes_accessed'] / 2**20:.2f}",
        f"{costs['compulsory_bytes'] / 2**20:.2f}",
        f"{costs['temporary_bytes'] / 2**20:.2f}",
        f"{1e6 * bound['seconds']:.1f}" if bound else "unknown device",
        bound["limit"] if bound else "",
    ]
    if optimal:
        cells += [f"{1e6 * (costs['optimal_seconds'] or 0):.1f}", f"{row['compile_seconds']:.1f}"]
    return cells


def name_of(row: dict[str, Any]) -> str:
    """Return a candidate's name."""
    shift = " with γ" if row["router_shift"] else ""
    return f"{row['library']}: {row['objective']}{shift}, {row['returns']}"


def draw_times(figures: dict[str, Any], path: Path) -> None:
    """Draw median times with quartiles and bounds on a log axis, in a panel for each case and direction."""
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
        _draw_panel(axes, rows)
        axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("ms; dot: median, line: quartiles, grey mark: bound of the device")
    picture = io.BytesIO()
    canvas.print_png(picture)
    replace_file(path, picture.getvalue())


def _draw_panel(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for height, row in enumerate(rows):
        low, median, high = (1e3 * row["seconds"][name] for name in ("low", "median", "high"))
        colour = _COLOURS[row["library"]]
        axes.plot([low, high], [height, height], "-", color=colour, linewidth=2)
        axes.plot(median, height, "o", color=colour)
        if row["bound"]:
            axes.plot(1e3 * row["bound"]["seconds"], height, "|", color=GREY, markersize=10, markeredgewidth=2)
    axes.set_yticks(range(len(rows)), [name_of(row) for row in rows], fontsize=8)
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


def _median_and_range(values: dict[str, float] | None, digits: int = 2, scale: float = 1.0) -> str:
    """Return "median (low – high)" of quartiles as they stand in the JSON; nothing for None."""
    if values is None:
        return ""
    spread = Quartiles(**{name: scale * value for name, value in values.items()})
    return f"{spread.median:.{digits}f} ({spread.range(digits)})"
