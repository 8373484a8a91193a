"""Self-contained pages of HTML: pictures as SVG in the page's own colours, nothing to fetch.

Pictures are drawn in the fixed colours of `curves`. Here these become variables of the page, so that they are light or
dark as the page is.
"""

import html
import io
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from etils import epath
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from experiments.reporting import pointer
from experiments.reporting.curves import BLUE, BROWN, GREEN, GREY, INK, ORANGE, PURPLE, RED
from rspo_jax.records import replace_file

_VARIABLES = {
    INK.lower(): ("ink", "#d6d9df"),
    GREY.lower(): ("grey", "#8f96a3"),
    "#ffffff": ("paper", "#1b1e24"),
    BLUE.lower(): ("blue", "#56b4e9"),
    ORANGE.lower(): ("orange", "#f0b73c"),
    GREEN.lower(): ("green", "#2fc49b"),
    RED.lower(): ("red", "#ff8a3d"),
    PURPLE.lower(): ("purple", "#e59cc4"),
    BROWN.lower(): ("brown", "#cf9f4a"),
}
"""Colour of a picture -> the page's variable for it, and its value on a dark page."""

_STYLE = """
:root { color-scheme: light dark; %(light)s --line: #e2e4e8; --soft: #f5f6f8; }
@media (prefers-color-scheme: dark) { :root { %(dark)s --line: #33373f; --soft: #23272e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 1500px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .3rem 0; } .quiet, figcaption { color: var(--grey); font-size: .87rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: .8rem; margin: 1.2rem 0; }
.tile { background: var(--soft); border-radius: 8px; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.2rem; } .tile span { color: var(--grey); font-size: .82rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%%), 1fr)); gap: 1.2rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; max-width: 720px; }
figure h3 { margin: 0 0 .2rem; font-size: .98rem; } svg { width: 100%%; height: auto; display: block; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .87rem; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
summary { cursor: pointer; margin: 2.2rem 0 .6rem; font-weight: 600; }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: 1rem 0; } .key svg { width: 34px; display: inline; }
"""


def make_page(title: str, body: Iterable[str], style: str = "") -> str:
    """Return a whole page.

    Args:
      title: the page's title, as text.
      body: the page's content, pieces of HTML.
      style: rules of CSS beside those of every page.
    """
    light = " ".join(f"--{name}: {colour};" for colour, (name, _) in _VARIABLES.items())
    dark = " ".join(f"--{name}: {colour};" for name, colour in _VARIABLES.values())
    style = _STYLE % {"light": light, "dark": dark} + pointer.STYLE + style
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    start = f'<!doctype html>\n<html lang="en"><head>{head}<style>{style}</style></head><body>\n'
    return start + "\n".join([*body, f"<script>{pointer.SCRIPT}</script></body></html>\n"])


def save_page(path: epath.Path, content: str) -> None:
    """Write a page to a folder that exists.

    Raises:
      FileNotFoundError: if the folder does not exist.
    """
    if "://" not in os.fspath(path) and not path.parent.exists():
        raise FileNotFoundError(f"{path.parent} does not exist: make that folder, or choose another --out")
    replace_file(path, content.encode())


def escape(text: object) -> str:
    """Return text as HTML."""
    return html.escape(str(text))


def figure(title: str, caption: str, draw: Callable[[Axes], None]) -> str:
    """Return a picture with its title and caption; `draw` draws it."""
    drawn = Figure(figsize=(6.4, 3.5), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06))
    drawn.patch.set_visible(False)
    axes = drawn.subplots()
    draw(axes)
    # The heading of the page is the title; a blank one, which is not empty, leaves room for the legend.
    blank = "" if axes.get_legend() is None else "\N{NO-BREAK SPACE}"
    axes.set_title(blank, loc="left", pad=18, fontsize=1)
    for each in drawn.axes:
        if not each.images:
            each.patch.set_visible(False)
    picture = as_svg(drawn, title)
    lines = pointer.lines_of(drawn, _in_page_colours)
    data = f' data-lines="{escape(lines)}" tabindex="0"' if lines else ""
    picture = f'<div class="drawn"{data}>{picture}</div>'
    return f"<figure><h3>{escape(title)}</h3>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def as_svg(drawn: Figure, label: str) -> str:
    """Return a figure as an element of a page, in the page's colours."""
    text = io.StringIO()
    FigureCanvasSVG(drawn).print_svg(text, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
    return _in_page_colours(svg)


def _in_page_colours(style: str) -> str:
    """Replace the fixed colours of a picture by the page's variables."""

    def variable(match: re.Match[str]) -> str:
        colour = match.group()
        return f"var(--{_VARIABLES[colour][0]})" if colour in _VARIABLES else colour

    return re.sub(r"(?:(?<=[:\s])|^)#[0-9a-f]{6}\b", variable, style)


def grid(pictures: Sequence[str]) -> str:
    """Return figures side by side."""
    return f'<div class="grid">{"".join(pictures)}</div>'


def tiles(values: Mapping[str, tuple[str, str]]) -> str:
    """Return the numbers to see first: name -> number and a few words about it."""
    cells = (
        f'<div class="tile">{escape(name)}<b>{escape(value)}</b><span>{escape(words)}</span></div>'
        for name, (value, words) in values.items()
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], numbers: bool = True) -> str:
    """Return a table; if `numbers` is true, all columns but the first are aligned as numbers."""
    kinds = [' class="number"' if numbers and at else "" for at in range(len(columns))]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, columns, strict=True))
    lines = ("".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def key(entries: Iterable[tuple[str, str, str]]) -> str:
    """Return the key of lines: name, colour, and SVG's dash pattern of each."""
    marks = (
        f'<span><svg viewBox="0 0 34 8"><line x1="0" y1="4" x2="34" y2="4" stroke-width="3" stroke-dasharray="{dash}" '
        f'style="{_in_page_colours(f"stroke: {colour.lower()}")}"/></svg> {escape(name)}</span>'
        for name, colour, dash in entries
    )
    return f'<div class="key">{"".join(marks)}</div>'
