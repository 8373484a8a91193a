"""`python -m experiments.report RUN_DIR`: a run as one page of HTML that holds all it shows.

Reads the run's folder and nothing else, so that a run which still goes on, or is on another machine, will do. This file
must never train or draw.
"""

import os
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro
from etils import epath

from experiments.config import Place
from experiments.reporting import page
from experiments.reporting.curves import ORANGE, RED
from experiments.reporting.panels import SECTIONS, Panel, mark
from experiments.reporting.record import RunRecord, load_run
from experiments.reporting.words import describe_alarm, describe_collapse, percent, rate_words
from rspo_jax.records import AlarmRule, CollapseRule, as_path, replace_file


@dataclass(frozen=True)
class Report:
    """Make a report of a run, as one HTML file that needs no network."""

    run_dir: Annotated[Place, tyro.conf.Positional]
    """The run's folder, or its address in a bucket."""
    out: Place | None = None
    """The file. When absent: report.html in the run's folder."""
    alarm: AlarmRule = AlarmRule()
    collapse: CollapseRule = CollapseRule()


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for something that the user can mend."""
    try:
        report = tyro.cli(Report, args=arguments, prog="python -m experiments.report")
        record = load_run(report.run_dir, report.alarm, report.collapse)
        path = report.out or as_path(report.run_dir) / "report.html"
        write(path, make_report(record))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"report: {os.fspath(path)}")
    return 0


def write(path: epath.Path, content: str) -> None:
    """Writes a page where its folder exists.

    Raises:
      FileNotFoundError: if it does not.
    """
    if "://" not in os.fspath(path) and not path.parent.exists():
        raise FileNotFoundError(f"{path.parent} does not exist: make that folder, or choose another --out")
    replace_file(path, content.encode())


def make_report(record: RunRecord) -> str:
    """The page."""
    body = [f"<h1>{page.escape(record.name)}</h1>", f'<p class="quiet">{page.escape(_subtitle(record))}</p>']
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
                drawn.append(page.figure(panel.title, panel.caption, lambda axes, p=panel: _draw(axes, p, record)))
        if drawn:
            body += [f"<h2>{page.escape(section.title)}</h2>", page.grid(drawn)]
    if left_out:
        body += ["<h2>Left out</h2>", page.table(("panel", "why"), left_out, numbers=False)]
    body += _details("Configuration", record.config, "the folder has no config.json")
    unfinished = "the folder has no summary.json, which comes at the end of a run"
    body += _details("Summary", record.summary or None, unfinished)
    return page.make_page(record.name, body)


def _draw(axes, panel: Panel, record: RunRecord) -> None:
    panel.draw(axes, record)
    if axes.get_xlabel() == "RL step":
        mark(axes, record)


def _subtitle(record: RunRecord) -> str:
    config = record.config or {}
    named = [("task_name", "{}"), ("objective.objective", "{}"), ("trainer.seed", "seed {}")]
    parts = [words.format(config[name]) for name, words in named if name in config]
    planned = config.get("trainer.steps")
    parts.append(f"{record.steps} steps" if planned in (None, record.steps) else f"{record.steps} of {planned} steps")
    return " · ".join(parts)


def _key_numbers(record: RunRecord) -> dict[str, tuple[str, str]]:
    numbers = {}
    for mode in ("sampled", "greedy"):
        last, first = record.rate(mode), record.rate(mode, last=False)
        if last is not None:
            compared = first is not None and first.split == last.split and first.step < last.step
            before = f", before {percent(first.value)}" if first is not None and compared else ""
            numbers[f"{last.split}, {mode}"] = (percent(last.value), f"{rate_words(last)}, step {last.step}{before}")
    numbers["Alarm"] = describe_alarm(record.warned)
    numbers["Collapse"] = describe_collapse(record.warned)
    if "wall_seconds" in record.summary:
        numbers["Time"] = (f"{record.summary['wall_seconds']:,.0f} s", "of training")
    return numbers


def _details(title: str, values: dict | None, missing: str) -> list[str]:
    if values is None:
        return [f'<p class="quiet">{title}: {page.escape(missing)}.</p>']
    return [f"<details><summary>{title}</summary>", page.table(("", ""), values.items(), numbers=False), "</details>"]


if __name__ == "__main__":
    sys.exit(main())
