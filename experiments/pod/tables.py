"""Tables of the TPU compiler's figures of a pod's programs."""

from typing import Any

import rich.console
import rich.table

from experiments.compilers.chips import GIBIBYTE, MEBIBYTE
from experiments.pod.advice import missing_bytes

_MEMORY = (
    ("parameters", "parameters"),
    ("optimizer", "optimizer"),
    ("activations", "activations"),
    ("KV cache", "kv_cache"),
    ("rest", "rest"),
    ("peak", "peak"),
)
BASELINE = "gmpo"
"""The objective that the others are compared with: RSPO's loss without the router shift."""


def name_of(figures: dict[str, Any]) -> str:
    """Return a program's name."""
    objective = f" {figures['objective']}" if figures["program"] in ("score", "update") else ""
    return f"{figures['program']}{objective}, {figures['layers']} layers"


def show(console: rich.console.Console, report: dict[str, Any]) -> None:
    """Print all tables of a report: memory, arithmetic, collectives, and comparisons of objectives and depths."""
    done = [figures for figures in report["programs"] if not figures["error"]]
    console.print(_memory_table(report, done))
    console.print(_work_table(report, done))
    # Collectives of one program of each kind, the deepest: the others move much the same, and the JSON has all.
    deepest = {figures["program"]: figures["layers"] for figures in done}
    of_kind = {f["program"]: f for f in reversed(done) if f["layers"] == deepest[f["program"]]}
    for figures in reversed(of_kind.values()):
        console.print(_collectives_table(figures))
    for figures in report["programs"]:
        if figures["error"]:
            console.print(f"{name_of(figures)} does not compile: {figures['error']}", style="bold red", soft_wrap=True)
    show_fit(console, report)
    show_comparison(console, report)
    show_compile_times(console, done)


def _table(title: str, columns: tuple[str, ...]) -> rich.table.Table:
    table = rich.table.Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=not number)
    return table


def _where(report: dict[str, Any]) -> str:
    mesh = " × ".join(f"{name} {size}" for name, size in report["mesh"].items() if size > 1)
    return f"{report['model']} on {report['topology']}, {report['devices']} devices: {mesh or 'one device'}"


def _memory_table(report: dict[str, Any], programs: list[dict[str, Any]]) -> rich.table.Table:
    columns = ("program", *(f"{column} GiB" for column, _ in _MEMORY), "route MiB", "% of HBM", "fits")
    table = _table(f"Bytes of one device · {_where(report)}", columns)
    for figures in programs:
        held = dict(figures["memory"])
        held["rest"] = held["other_arguments"] + held["results"] + held["constants"] + held["route"]
        table.add_row(
            name_of(figures),
            *(f"{held[key] / GIBIBYTE:.3f}" for _, key in _MEMORY),
            f"{held['route'] / MEBIBYTE:.2f}",
            f"{100 * held['peak'] / held['hbm']:.1f}",
            "yes" if figures["fits"] else "NO",
        )
    return table


def _work_table(report: dict[str, Any], programs: list[dict[str, Any]]) -> rich.table.Table:
    columns = ("program", "TFLOP", "matrix", "kernels", "elementwise", "model TFLOP", "÷ model", "÷ with remat")
    columns += ("s at peak", "moved GB", "G cycles", "optimal s", "compile s", "CPU s")
    table = _table(f"Work of one device in one run · {_where(report)}", columns)
    for figures in programs:
        flops, optimal = figures["flops"], figures["optimal_seconds_loops_once"]
        table.add_row(
            name_of(figures),
            *(f"{flops[key] / 1e12:.3f}" for key in ("total", "matrix", "kernels", "elementwise", "model")),
            f"{flops['total'] / flops['model']:.3f}",
            f"{flops['total'] / flops['model_with_remat']:.3f}",
            f"{flops['seconds_at_peak']:.3f}",
            f"{figures['collectives']['bytes'] / 1e9:.3f}",
            f"{figures['cycles'] / 1e9:.3f}" if figures["cycles"] else "",
            "" if optimal is None else f"{optimal:.3f}",
            f"{figures['compile_seconds']:.0f}",
            f"{figures['cpu_seconds']:.0f}",
        )
    return table


def _collectives_table(figures: dict[str, Any]) -> rich.table.Table:
    table = _table(
        f"What a device receives · {name_of(figures)}", ("collective", "over", "GB", "largest", "GB", "times")
    )
    largest = figures["collectives"]["largest"]
    for row in figures["collectives"]["by_kind"]:
        if row["bytes"] < 1e-3 * figures["collectives"]["bytes"]:
            continue
        of_kind = [moved for moved in largest if [moved["kind"], list(moved["axes"])] == [row["kind"], row["axes"]]]
        cells = ("", "", "")
        if of_kind:
            cells = (of_kind[0]["shape"], f"{of_kind[0]['bytes'] / 1e9:.3f}", f"{of_kind[0]['times']:.0f}")
        table.add_row(row["kind"], " × ".join(row["axes"]), f"{row['bytes'] / 1e9:.3f}", *cells)
    return table


def show_fit(console: rich.console.Console, report: dict[str, Any]) -> None:
    """Print a line for each program that does not fit, with advice and its largest buffers."""
    for figures in report["programs"]:
        if figures["fits"] or figures["error"]:
            continue
        held = figures["memory"]
        console.print(
            f"{name_of(figures)} does not fit: it needs {held['peak'] / GIBIBYTE:.2f} GiB a device, "
            f"{missing_bytes(figures) / GIBIBYTE:.2f} more than there is.",
            style="bold red",
            soft_wrap=True,
        )
        for sentence in figures["advice"]:
            console.print(f"  would help: {sentence}", soft_wrap=True)
        for buffer in held["largest"][:5]:
            console.print(
                f"  large: {buffer['size'] / GIBIBYTE:.2f} GiB {buffer['shape']} {buffer['op_name']}", style="dim"
            )


def compare(programs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the excess of each program over that of `BASELINE`, in percent; none if that is missing."""
    done = [figures for figures in programs if not figures["error"]]
    base = {(f["program"], f["layers"]): f for f in done if f["objective"] == BASELINE}
    rows = []
    for figures in done:
        other = base.get((figures["program"], figures["layers"]))
        if other is None or other is figures:
            continue
        held, base_held = figures["memory"], other["memory"]
        rows.append(
            {
                "program": figures["program"],
                "objective": figures["objective"],
                "layers": figures["layers"],
                "peak_percent": _percent(held["peak"], base_held["peak"]),
                "alive_percent": _percent(held["alive"], base_held["alive"]),
                "hbm_percent": 100 * (held["peak"] - base_held["peak"]) / held["hbm"],
                "flops_percent": _percent(figures["flops"]["total"], other["flops"]["total"]),
                "moved_percent": _percent(figures["collectives"]["bytes"], other["collectives"]["bytes"]),
                "route_bytes": held["route"],
            }
        )
    return rows


def _percent(value: float | None, base: float | None) -> float | None:
    return 100 * (value / base - 1) if value is not None and base else None


def show_comparison(console: rich.console.Console, report: dict[str, Any]) -> None:
    """Print the comparison of objectives, as made by `compare`."""
    rows = report["comparison"]
    if not rows:
        return
    keys = ("hbm_percent", "peak_percent", "alive_percent", "flops_percent", "moved_percent")
    columns = ("of the HBM %", "allocated %", "alive at the peak %", "FLOPs %", "moved bytes %")
    table = _table(f"More than {BASELINE}", ("program", *columns, "route MiB"))
    for row in rows:
        cells = ("" if row[key] is None else f"{row[key]:+.4f}" for key in keys)
        table.add_row(name_of(row), *cells, f"{row['route_bytes'] / MEBIBYTE:.2f}")
    console.print(table)


def show_compile_times(console: rich.console.Console, programs: list[dict[str, Any]]) -> None:
    """Print the ratio of compile times at the largest depth to those at the smallest."""
    depths = sorted({figures["layers"] for figures in programs})
    if len(depths) < 2:
        return
    table = _table(f"Compile time, {depths[-1]} layers ÷ {depths[0]}", ("program", "seconds", "CPU seconds"))
    by_name = {(f["program"], f["objective"], f["layers"]): f for f in programs}
    for (program, objective, layers), figures in by_name.items():
        shallow = by_name.get((program, objective, depths[0]))
        if layers == depths[-1] and shallow is not None:
            ratios = (figures[key] / shallow[key] for key in ("compile_seconds", "cpu_seconds"))
            table.add_row(f"{program} {objective}", *(f"{ratio:.2f}" for ratio in ratios))
    console.print(table)


NOTES = (
    "Activations: all temporaries, gradients and workspaces included. FLOPs: every loop's body as often as it runs; "
    "kernels as they declare them, with the empty places that the exchange between experts leaves. Model: matrix "
    "products and attention, three forward passes for an update; with remat, four. Moved: bytes that a device "
    "receives. G cycles: the compiler's estimate, loops multiplied, without kernels and collectives. Optimal: the "
    "compiler's estimate, loops once. A loop whose turns depend on the routing counts once, as if the loads were even."
)
