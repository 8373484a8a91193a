"""`python -m experiments.compare RUN_DIR RUN_DIR ...`: several runs over each other, as one page of HTML.

Only the runs' folders are read. The page shows intervals and leaves it to the reader to judge which run is better.
"""

import os
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro
from etils import epath

from experiments.errors import complain
from experiments.reporting.comparison_page import make_comparison
from experiments.reporting.page import save_page
from experiments.reporting.record import load_run
from experiments.run_config import Place
from rspo_jax.records import AlarmRule, CollapseRule


@dataclass(frozen=True)
class CompareOptions:
    """Show several runs beside each other, as one HTML file that needs no network."""

    run_dirs: Annotated[tuple[Place, ...], tyro.conf.Positional]
    """The folders of two or more runs."""
    out: Place = epath.Path("comparison.html")
    """The file to write."""
    alarm: AlarmRule = AlarmRule()
    collapse: CollapseRule = CollapseRule()

    def __post_init__(self) -> None:
        if len(self.run_dirs) < 2:
            raise ValueError(f"a comparison needs two or more runs, got {len(self.run_dirs)}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code, 0 or `MISTAKE`."""
    try:
        options = tyro.cli(CompareOptions, args=arguments, prog="python -m experiments.compare")
        records = [load_run(path, options.alarm, options.collapse) for path in options.run_dirs]
        save_page(options.out, make_comparison(records))
    except (ValueError, OSError) as error:
        return complain(error)
    print(f"comparison: {os.fspath(options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
