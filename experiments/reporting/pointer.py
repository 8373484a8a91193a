"""Values under the pointer: the lines of a picture as data, and the script of the page that shows them.

The script is part of the page and fetches nothing. Without it, or on paper, a page is what it is without a pointer.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

STYLE = """
figure .drawn { position: relative; } .drawn[data-lines] svg { touch-action: pan-y; }
.guide { position: absolute; width: 1px; background: var(--ink); opacity: .45; pointer-events: none; }
.values { position: absolute; pointer-events: none; background: var(--paper); border: 1px solid var(--line);
  border-radius: 6px; padding: .25rem .5rem; font-size: .8rem; line-height: 1.4; white-space: nowrap; z-index: 1;
  box-shadow: 0 1px 4px #0003; font-variant-numeric: tabular-nums; }
.values b { float: right; margin-left: 1.2rem; } .values div { border-left: .25rem solid; padding-left: .4rem; }
.values div span { color: var(--ink); } [hidden] { display: none; }
"""

SCRIPT = """
for (const drawn of document.querySelectorAll("[data-lines]")) {
  const {frame: [left, top, width, height], span: [low, high], grids, lines} = JSON.parse(drawn.dataset.lines);
  const steps = [...new Set(grids.flat())].sort((a, b) => a - b);
  const add = name => { const one = document.createElement("div"); one.className = name; one.hidden = true;
    drawn.append(one); return one; };
  const nearest = (sorted, wanted) => {
    let at = sorted.findIndex(step => step >= wanted);
    if (at < 0) at = sorted.length - 1;
    return at > 0 && wanted - sorted[at - 1] <= sorted[at] - wanted ? at - 1 : at; };
  const text = (value, share) => value === null ? "–" : share ? (100 * value).toPrecision(4) + " %"
    : value.toPrecision(4);
  const guide = add("guide"), values = add("values");
  let shown = -1;
  const hide = () => { shown = -1; guide.hidden = values.hidden = true; };
  const show = at => {
    const picture = drawn.querySelector("svg").getBoundingClientRect(), step = steps[shown = at];
    const x = (left + width * (step - low) / (high - low)) * picture.width;
    guide.hidden = values.hidden = false;
    guide.style.cssText = `left:${x}px;top:${top * picture.height}px;height:${height * picture.height}px`;
    const head = document.createElement("span");
    head.textContent = "step " + step;
    values.replaceChildren(head, ...lines.map(line => {
      const row = document.createElement("div"), name = document.createElement("span");
      const number = document.createElement("b"), grid = grids[line.grid], own = nearest(grid, step);
      row.style.borderColor = line.colour;
      name.textContent = line.name + (grid[own] === step ? "" : ` (step ${grid[own]})`);
      number.textContent = text(line.values[own], line.percent);
      name.append(number); row.append(name);
      return row; }));
    const room = x + values.offsetWidth + 12 <= drawn.clientWidth;
    values.style.left = Math.max(0, room ? x + 12 : x - values.offsetWidth - 12) + "px";
    values.style.top = (top * picture.height) + "px"; };
  drawn.addEventListener("pointermove", event => {
    const picture = drawn.querySelector("svg").getBoundingClientRect();
    const part = ((event.clientX - picture.left) / picture.width - left) / width;
    if (part < -.03 || part > 1.03) return hide();
    show(nearest(steps, low + part * (high - low))); });
  drawn.addEventListener("pointerleave", hide);
  drawn.addEventListener("blur", hide);
  drawn.addEventListener("keydown", event => {
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!by) return;
    event.preventDefault();
    show(Math.min(Math.max(shown < 0 ? (by > 0 ? 0 : steps.length - 1) : shown + by, 0), steps.length - 1)); });
}
"""


def lines_of(drawn: Figure, page_colour: Callable[[str], str]) -> str:
    """Return the named lines of a picture as the JSON that `SCRIPT` reads; an empty string for one without any.

    A line whose name begins with "_", which hides it from the legend, is among them.

    Args:
      drawn: a figure with one panel, which has been drawn: only then is its layout known.
      page_colour: turns a colour, "#rrggbb", into the page's own.
    """
    lines, grids = [], []
    for axes in drawn.axes:
        percent = axes.yaxis.get_major_formatter()(1.0, 0).endswith("%")
        for line in axes.get_lines():
            steps, values = (np.atleast_1d(np.asarray(data, np.float64)) for data in line.get_data())
            name = str(line.get_label())
            if name.startswith("_child") or not np.isfinite(values).any():
                continue
            grid = steps.astype(int).tolist()
            grids += [] if grid in grids else [grid]
            lines.append(
                {
                    "name": name.removeprefix("_"),
                    "colour": page_colour(to_hex(line.get_color()).lower()),
                    "percent": percent,
                    "grid": grids.index(grid),
                    "values": [float(f"{value:.4g}") if np.isfinite(value) else None for value in values.tolist()],
                }
            )
    if not lines:
        return ""
    axes: Axes = drawn.axes[0]
    place = axes.get_position()
    content: dict[str, Any] = {
        "frame": [round(part, 4) for part in (place.x0, 1 - place.y1, place.width, place.height)],
        "span": list(axes.get_xlim()),
        "grids": grids,
        "lines": lines,
    }
    return json.dumps(content)
