"""The report on a run as one page of HTML: key numbers, all panels that its record allows, sample responses,
configuration, summary.
"""

import functools
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from experiments.reporting import page
from experiments.reporting.curves import ORANGE, RED
from experiments.reporting.panels import SECTIONS, Panel, mark_events
from experiments.reporting.record import RunRecord
from experiments.reporting.samples import STYLE, samples_section
from experiments.reporting.words import describe_alarm, describe_bounds, describe_collapse, describe_value


def make_report(record: RunRecord) -> str:
    """Return the page."""
    # Task, objective, seed and number of steps, as far as they are known.
    config = record.config or {}
    named = [("task_name", "{}"), ("objective.objective", "{}"), ("trainer.seed", "seed {}")]
    parts = [words.format(config[name]) for name, words in named if name in config]
    planned = config.get("trainer.steps")
    parts.append(f"{record.steps} steps" if planned in (None, record.steps) else f"{record.steps} of {planned} steps")
    body = [f"<h1>{page.escape(record.name)}</h1>", f'<p class="quiet">{page.escape(" · ".join(parts))}</p>']
    body += [page.tiles(_key_numbers(record))]
    marks = (("alarm", ORANGE, record.warned.alarm), ("collapse", RED, record.warned.collapse))
    entries = [(name, colour, "6 4") for name, colour, step in marks if step is not None]
    body += [page.key(entries)] if entries else []
    left_out: list[tuple[str, str]] = []
    for section in SECTIONS:
        drawn = []
        for panel in section.panels:
            missing = panel.missing(record)
            if missing:
                left_out.append((panel.title, missing))
            else:
                draw = functools.partial(_draw, panel=panel, record=record)
                drawn.append(page.figure(panel.title, panel.caption, draw))
        if drawn:
            body += [f"<h2>{page.escape(section.title)}</h2>", page.grid(drawn)]
        if section is SECTIONS[0] and record.samples:
            body += samples_section(record.samples)
    if not record.samples:
        left_out.append(("Samples", "there is no samples.jsonl"))
    if left_out:
        body += ["<h2>Left out</h2>", page.table(("panel", "why"), left_out, numbers=False)]
    body += _details("Configuration", record.config, "the folder has no config.json")
    unfinished = "the folder has no summary.json, which comes at the end of a run"
    body += _details("Summary", record.summary or None, unfinished)
    return page.make_page(record.name, body, STYLE)


def _draw(axes: Axes, panel: Panel, record: RunRecord) -> None:
    """Draw a panel, with alarm and collapse marked if it goes over the steps."""
    panel.draw(axes, record)
    if axes.get_xlabel() == "RL step":
        mark_events(axes, record)


def _key_numbers(record: RunRecord) -> dict[str, tuple[str, str]]:
    """Return held-out results, alarm, collapse, time and memory: name -> number and a few words about it."""
    numbers = {}
    for mode in ("sampled", "greedy"):
        last, first = record.held_out(mode), record.held_out(mode, last=False)
        if last is not None:
            compared = first is not None and first.split == last.split and first.step < last.step
            before = f", before {describe_value(first)}" if first is not None and compared else ""
            bounds = describe_bounds(last, " to ")
            words = f"{f'95 %: {bounds}, ' if bounds else ''}step {last.step}{before}"
            kind = "" if last.is_rate else ", mean reward"
            numbers[f"{last.split}, {mode}{kind}"] = (describe_value(last), words)
    numbers["Alarm"] = describe_alarm(record.warned)
    numbers["Collapse"] = describe_collapse(record.warned)
    rows = [*record.warm_start, *record.rl]
    compiling, memory = ([row[name] for row in rows if name in row] for name in ("compile_seconds", "peak_memory_gib"))
    if "wall_seconds" in record.summary:
        numbers["Time"] = (f"{record.summary['wall_seconds']:,.0f} s", "of training")
    if compiling:
        numbers["Compiling"] = (f"{sum(compiling):,.0f} s", "of tracing, lowering and compiling programs")
    if memory:
        numbers["Peak memory"] = (f"{max(memory):,.2f} GiB", "of the fullest device; on CPUs, of the process")
    return numbers


def _details(title: str, values: Mapping[str, Any] | None, missing: str) -> list[str]:
    """Return a table that is folded away, or a sentence if there are no values."""
    if values is None:
        return [f'<p class="quiet">{title}: {page.escape(missing)}.</p>']
    return [f"<details><summary>{title}</summary>", page.table(("", ""), values.items(), numbers=False), "</details>"]
