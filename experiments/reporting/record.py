"""What a run's folder tells: configuration, summary, numbers and arrays of its steps, alarm and collapse.

This file must never know how any of it is shown.
"""

import json
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from rspo_jax.records import (
    AlarmRule,
    CollapseRule,
    FilePath,
    Warned,
    as_path,
    judge_alarm,
    read_diagnostics,
    read_metrics,
)

Rows = list[dict[str, Any]]


class Series(NamedTuple):
    """An array over the steps at which it was recorded."""

    steps: np.ndarray
    """int64 [steps]."""
    values: np.ndarray
    """float64 [steps, ...]."""


class Rate(NamedTuple):
    """A held-out solve rate with its 95 % interval."""

    value: float
    low: float
    high: float
    step: int
    split: str
    """"test" or "validation"."""


@dataclass(frozen=True)
class RunRecord:
    """All that a report reads of one run."""

    path: epath.Path
    config: dict[str, Any] | None
    """Flat: "trainer.steps" -> 150. None without `config.json`."""
    summary: dict[str, Any]
    """Empty without `summary.json`, which comes at the end of a run."""
    warm_start: Rows
    rl: Rows
    arrays: Rows
    """Of the rl phase; none for a run without diagnostics."""
    warned: Warned

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def series(self, name: str) -> Series | None:
        """An array of `diagnostics.jsonl`, at the steps at which it has the shape that it has at the last."""
        rows = [row for row in self.arrays if name in row]
        if not rows:
            return None
        rows = [row for row in rows if row[name].shape == rows[-1][name].shape]
        return Series(np.array([row["step"] for row in rows], np.int64), np.stack([row[name] for row in rows]))

    def recorded(self, name: str) -> bool:
        """Whether a step of reinforcement learning has the metric, as a finite number."""
        return any(math.isfinite(row.get(name, math.nan)) for row in self.rl)

    def rate(self, mode: str, last: bool = True) -> Rate | None:
        """The last held-out rate of "greedy" or "sampled" responses, or the one before the first step."""
        for row in reversed(self.rl) if last else [row for row in self.rl if row["step"] == 0]:
            for split, prefix in (("test", "test"), ("validation", "eval")):
                rate, low, high = (row.get(f"{prefix}_{mode}{bound}", math.nan) for bound in ("", "_low", "_high"))
                if math.isfinite(rate + low + high):
                    return Rate(rate, low, high, row["step"], split)
        return None

    @property
    def steps(self) -> int:
        return max([row["step"] for row in self.rl], default=0)


def load_run(
    run_dir: FilePath, alarm_rule: AlarmRule = AlarmRule(), collapse_rule: CollapseRule = CollapseRule()
) -> RunRecord:
    """Reads a run's folder; a run that still goes on will do.

    Args:
      run_dir: the folder, or its address in a bucket.
      alarm_rule: by which the alarm is judged anew.
      collapse_rule: by which a collapse is.

    Raises:
      FileNotFoundError: if there is no `metrics.jsonl`.
      ValueError: if a file is damaged.
    """
    path = as_path(run_dir)
    rows = read_metrics(path)
    rl = [row for row in rows if row["phase"] == "rl"]
    config = _read_json(path / "config.json")
    return RunRecord(
        path,
        None if config is None else dict(_flat(config)),
        _read_json(path / "summary.json") or {},
        [row for row in rows if row["phase"] == "warm_start"],
        rl,
        [row for row in read_diagnostics(path) if row["phase"] == "rl"],
        judge_alarm(rl, alarm_rule, collapse_rule),
    )


def _read_json(path: epath.Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return content


def _flat(nested: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for name, value in nested.items():
        pairs += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return pairs
