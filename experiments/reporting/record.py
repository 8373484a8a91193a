"""The contents of a run's folder: configuration, summary, numbers and arrays of its steps, alarm and collapse."""

import json
import math
import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from etils import epath

from experiments.config import FIELD_COUNT, flatten
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
from rspo_jax.records.samples import Sample, read_samples

Rows = list[dict[str, Any]]
"""Metrics of steps, a dict for each step."""
Mode = Literal["sampled", "greedy"]
"""The way in which evaluations draw responses."""
Split = Literal["test", "validation"]
"""The held-out problems of an evaluation."""
_PREFIXES: dict[Split, str] = {"test": "test", "validation": "eval"}


class Series(NamedTuple):
    """An array over the steps at which it was recorded."""

    steps: np.ndarray
    """int64 [steps]."""
    values: np.ndarray
    """float64 [steps, ...]."""


class HeldOut(NamedTuple):
    """A held-out solve rate, or a mean reward where the task does not tell what is solved, with its 95 % interval."""

    value: float
    low: float
    """NaN, as `high`, where all rewards are alike."""
    high: float
    step: int
    split: Split
    is_rate: bool


@dataclass(frozen=True)
class RunRecord:
    """Everything that a report reads of one run."""

    path: epath.Path
    config: dict[str, Any] | None
    """Flat: "trainer.steps" -> 150. None without `config.json`."""
    summary: dict[str, Any]
    """Empty without `summary.json`, which a run writes at its end."""
    warm_start: Rows
    rl: Rows
    arrays: Rows
    """Arrays of the "rl" phase; empty for a run without diagnostics."""
    warned: Warned
    samples: dict[int, list[Sample]]
    """Step -> sample responses; empty for a run that recorded none."""

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.resolve().name

    def series(self, name: str) -> Series | None:
        """Return an array of `diagnostics.jsonl`, without the steps at which its shape differs from the last one."""
        rows = [row for row in self.arrays if name in row]
        if not rows:
            return None
        rows = [row for row in rows if row[name].shape == rows[-1][name].shape]
        return Series(np.array([row["step"] for row in rows], np.int64), np.stack([row[name] for row in rows]))

    def recorded(self, name: str) -> bool:
        """Return whether the "rl" phase has the metric as a finite number at any step."""
        return any(math.isfinite(row.get(name, math.nan)) for row in self.rl)

    def held_out(self, mode: Mode, last: bool = True) -> HeldOut | None:
        """Return the last held-out result, or the one before the first step; on the test split if it was used."""
        suffix = held_out_suffix(self.rl)
        for row in reversed(self.rl) if last else [row for row in self.rl if row["step"] == 0]:
            for split, prefix in _PREFIXES.items():
                name = f"{prefix}_{mode}{suffix}"
                value, low, high = (row.get(f"{name}{bound}", math.nan) for bound in ("", "_low", "_high"))
                if math.isfinite(value):
                    return HeldOut(value, low, high, row["step"], split, not suffix)
        return None

    @property
    def reward_names(self) -> list[str]:
        """The names of the rewards that the task tells apart."""
        names = dict.fromkeys(name for row in self.rl for name in row)
        return [name[len("rewards/") : -len("/mean")] for name in names if re.fullmatch(r"rewards/.+/mean", name)]

    @property
    def steps(self) -> int:
        """The number of the last step."""
        return max([row["step"] for row in self.rl], default=0)


def held_out_suffix(rows: Rows) -> str:
    """Return what ends the names of held-out results: "" for solve rates, "_reward" for a task that has none."""
    names = {name for row in rows for name in row}
    has_rates, has_rewards = (
        not names.isdisjoint({f"{prefix}_{mode}{suffix}" for prefix in _PREFIXES.values() for mode in get_args(Mode)})
        for suffix in ("", "_reward")
    )
    return "_reward" if has_rewards and not has_rates else ""


def load_run(
    run_dir: FilePath, alarm_rule: AlarmRule = AlarmRule(), collapse_rule: CollapseRule = CollapseRule()
) -> RunRecord:
    """Read the folder of a run, which may still be in progress.

    Args:
      run_dir: the folder, or its address in a bucket.
      alarm_rule: the rule by which the alarm is judged anew.
      collapse_rule: the rule by which a collapse is.

    Raises:
      FileNotFoundError: if there is neither `metrics.jsonl` nor `samples.jsonl`.
      ValueError: if a file is damaged.
    """
    path = as_path(run_dir)
    samples = read_samples(path)
    rows = [] if samples and not (path / "metrics.jsonl").exists() else read_metrics(path)
    rl = [row for row in rows if row["phase"] == "rl"]
    config = _read_json(path / "config.json")
    if config is not None:
        config.pop(FIELD_COUNT, None)  # no setting
    return RunRecord(
        path,
        None if config is None else flatten(config),
        _read_json(path / "summary.json") or {},
        [row for row in rows if row["phase"] == "warm_start"],
        rl,
        [row for row in read_diagnostics(path) if row["phase"] == "rl"],
        judge_alarm(rl, alarm_rule, collapse_rule),
        samples,
    )


def _read_json(path: epath.Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it is not a JSON object")
    return content
