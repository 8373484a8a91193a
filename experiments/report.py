"""`python -m experiments.report RUN_DIR`: a run as one self-contained page of HTML.

Only the run's folder is read, so the run may still be in progress, or the folder may come from another machine.
"""

import os
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from experiments.errors import complain
from experiments.reporting.page import save_page
from experiments.reporting.record import load_run
from experiments.reporting.run_page import make_report
from experiments.run_config import Place
from rspo_jax.records import AlarmRule, CollapseRule, as_path


@dataclass(frozen=True)
class ReportOptions:
    """Make a report of a run, as one HTML file that needs no network."""

    run_dir: Annotated[Place, tyro.conf.Positional]
    """The run's folder, or its address in a bucket."""
    out: Place | None = None
    """The file to write; report.html in the run's folder by default."""
    alarm: AlarmRule = AlarmRule()
    collapse: CollapseRule = CollapseRule()


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code, 0 or `MISTAKE`."""
    try:
        options = tyro.cli(ReportOptions, args=arguments, prog="python -m experiments.report")
        record = load_run(options.run_dir, options.alarm, options.collapse)
        path = options.out or as_path(options.run_dir) / "report.html"
        save_page(path, make_report(record))
    except (ValueError, OSError) as error:
        return complain(error)
    print(f"report: {os.fspath(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
