"""How a program's work a chip changes with the size of the pod: which sizes there are, and the picture.

This file must never compile anything.
"""

import io
import math
from pathlib import Path
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rspo_jax.records import replace_file

FIXED_PER_CHIP, FIXED_TOTAL = "fixed-work-a-chip", "fixed-total-work"
# Told apart by people with any kind of colour vision (Okabe and Ito, "Color universal design", 2008).
_COLOURS = {FIXED_PER_CHIP: "#0072B2", FIXED_TOTAL: "#D55E00"}
_GREY = "#8A8A8A"
_PANELS = (("TFLOP a chip", "flops"), ("GB received a chip", "moved"), ("GiB of HBM a chip", "peak"))


def chips_of(topology: str) -> int:
    """Chips of a topology such as "v5p:4x4x4"."""
    return math.prod(int(size) for size in topology.partition(":")[2].split("x"))


def batch_for(mode: str, batch: int, chips: int, base_chips: int) -> int:
    """Responses of a batch on a pod of `chips`, where `base_chips` have `batch`."""
    return batch * chips // base_chips if mode == FIXED_PER_CHIP else batch


def point(mode: str, report: dict[str, Any], chips: int) -> dict[str, Any]:
    """What the picture shows of one report with one program."""
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


def draw(points: list[dict[str, Any]], title: str, path: Path) -> None:
    """Three panels over the chips of a pod: FLOPs, received bytes and HBM a chip; a line for each mode."""
    figure = Figure(figsize=(14, 4.6), dpi=110, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    for axes, (label, key) in zip(figure.subplots(1, 3), _PANELS, strict=True):
        _draw_panel(axes, [found for found in points if not found["error"]], label, key)
    picture = io.BytesIO()
    canvas.print_png(picture)
    replace_file(path, picture.getvalue())


def _draw_panel(axes: Axes, points: list[dict[str, Any]], label: str, key: str) -> None:
    unit = {"flops": 1e12, "moved": 1e9, "peak": 2**30}[key]
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
        axes.axhline(points[0]["hbm"] / unit, color=_GREY, linestyle="--", linewidth=1, label="a chip has")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
    axes.set_xticks(sorted({found["chips"] for found in points}))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("chips")
    axes.set_title(label + (" (dotted: the model's)" if key == "flops" else ""), loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8.5)
