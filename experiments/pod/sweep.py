"""Growth of a program's work per chip with the size of the pod: the batches of a sweep, its points and its picture."""

import io
from pathlib import Path
from typing import Any, Literal, get_args

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.compilers.chips import GIBIBYTE
from experiments.reporting.curves import BLUE, GREY, RED
from rspo_jax.records import replace_file

SweepMode = Literal["fixed-work-a-chip", "fixed-total-work"]
FIXED_PER_CHIP, FIXED_TOTAL = get_args(SweepMode)
_COLOURS = {FIXED_PER_CHIP: BLUE, FIXED_TOTAL: RED}
_PANELS = (
    ("TFLOP a chip", "flops", 1e12),
    ("GB received a chip", "moved", 1e9),
    ("GiB of HBM a chip", "peak", GIBIBYTE),
)
"""Title, key of a point, and unit of each panel."""


def batch_for(mode: SweepMode, batch: int, chips: int, base_chips: int) -> int:
    """Return the responses of a batch on a pod of `chips`, if a pod of `base_chips` has `batch`."""
    return batch * chips // base_chips if mode == FIXED_PER_CHIP else batch


def point(mode: SweepMode, report: dict[str, Any], chips: int) -> dict[str, Any]:
    """Return the figures of one chip that the picture shows, from a report with one program."""
    figures = report["programs"][0]
    found = {
        "mode": mode,
        "topology": report["topology"],
        "chips": chips,
        "batch": report["batch"],
        "mesh": report["mesh"],
    }
    if figures["error"]:
        return found | {"error": figures["error"]}
    a_chip = report["devices"] / chips
    return found | {
        "error": "",
        "fits": figures["fits"],
        "flops": a_chip * figures["flops"]["total"],
        "model_flops": a_chip * figures["flops"]["model"],
        "moved": a_chip * figures["collectives"]["bytes"],
        "by_kind": figures["collectives"]["by_kind"],
        "peak": a_chip * figures["memory"]["peak"],
        "hbm": a_chip * figures["memory"]["hbm"],
        "compile_seconds": figures["compile_seconds"],
    }


def draw_sweep(points: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw FLOPs, received bytes and HBM a chip over the chips of a pod, in three panels with a line for each mode."""
    figure = Figure(figsize=(14, 4.6), dpi=110, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    for axes, panel in zip(figure.subplots(1, 3), _PANELS, strict=True):
        _draw_panel(axes, [found for found in points if not found["error"]], *panel)
    picture = io.BytesIO()
    canvas.print_png(picture)
    replace_file(path, picture.getvalue())


def _draw_panel(axes: Axes, points: list[dict[str, Any]], label: str, key: str, unit: float) -> None:
    for mode, colour in _COLOURS.items():
        of_mode = [found for found in points if found["mode"] == mode]
        axes.plot([p["chips"] for p in of_mode], [p[key] / unit for p in of_mode], "-o", color=colour, label=mode)
        missing = [p for p in of_mode if not p["fits"]]
        axes.plot([p["chips"] for p in missing], [p[key] / unit for p in missing], "x", color="black", markersize=10)
        if key == "flops":
            axes.plot(
                [p["chips"] for p in of_mode],
                [p["model_flops"] / unit for p in of_mode],
                ":",
                color=colour,
                linewidth=1,
            )
    if key == "peak" and points:
        axes.axhline(points[0]["hbm"] / unit, color=GREY, linestyle="--", linewidth=1, label="a chip has")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
    axes.set_xticks(sorted({found["chips"] for found in points}))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("chips")
    axes.set_title(label + (" (dotted: the model's)" if key == "flops" else ""), loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8.5)
