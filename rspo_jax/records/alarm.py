"""Collapse of a run, its early signs, and their lead time: rules over the rows of `metrics.jsonl`.

The signs are those seen before a collapse (arXiv 2510.23027): importance ratios, divergence and clipping burst, the
entropy falls, the routes drift. A run is compared with its own early steps, because a level that is high for one model
is low for another, and with levels that are high for any model, because a run may be lost from its first steps on. Both
rules count steps of the "rl" phase from 1; step 0, the evaluation before the first step, is left out.
"""

import collections
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Row = Mapping[str, Any]


@dataclass(frozen=True)
class AlarmRule:
    """Conditions of the alarm, which rings at the first step at which enough signs hold together.

    Each sign compares the mean of the last `window` steps with the median of the first `reference` steps:

    * ratio: log `ratio_max` is at least `least_log_ratio`, and at least `times` the reference.
    * divergence: `approx_kl` is at least `least_kl`, and at least `times` the reference.
    * clip: `clip_fraction` is at least `least_clip_fraction`, and at least `times` the reference.
    * entropy: `entropy` is at most `entropy_share` times the reference.
    * route: `drift` is at least `least_shift`, and at least `times` the reference. γ would not do: an adaptive scale or
      a sum over layers makes it small without any drift.

    Ratio, divergence and route also hold from `much_log_ratio`, `much_kl` and `much_shift` on, whatever the reference;
    for this a window of two steps is enough. A metric that was recorded but is not finite is a sign at once; one that
    was not recorded is none. Apart from the signs, the alarm rings when `idle` steps in a row have learned from nothing
    (`learned_updates` is 0), unless every response was right. The levels were chosen on the runs of
    `experiments.ablate countdown_tuning`; `experiments.judge_alarm` tells how often they are right on other runs.
    """

    reference: int = 20
    window: int = 5
    signs: int = 2
    """Number of signs that have to hold together."""
    times: float = 3.0
    least_log_ratio: float = 1.0
    """Nats. At 1, the geometric mean over the window of each step's largest ratio is e or more."""
    least_kl: float = 0.01
    """Nats per token."""
    least_clip_fraction: float = 0.02
    least_shift: float = 0.02
    """Nats, a mean over layers and tokens."""
    entropy_share: float = 0.3
    much_log_ratio: float = 3.0
    much_kl: float = 0.05
    much_shift: float = 0.08
    idle: int = 5
    """Steps in a row that learn from nothing."""

    def __post_init__(self) -> None:
        if self.reference < 1 or self.window < 1:
            raise ValueError(f"reference and window must be at least 1, got {self.reference} and {self.window}")
        if self.idle < 1:
            raise ValueError(f"idle must be at least 1, got {self.idle}")
        if not 1 <= self.signs <= len(_SIGNS):
            raise ValueError(f"signs must lie between 1 and {len(_SIGNS)}, got {self.signs}")


@dataclass(frozen=True)
class CollapseRule:
    """Conditions of a collapse: the mean of `metric` over the last `window` steps falls below `share` times its best so
    far, and stays below that to the end, for at least `stays` steps. A policy that is lost earns 0.

    The first steps are compared by the mean of the steps so far. Step 1 earns its reward before any update, so that a
    policy that its very first updates destroy has something to fall from.
    """

    metric: str = "reward"
    window: int = 10
    share: float = 0.5
    stays: int = 10
    least_best: float = 0.05
    """Lowest best value that counts as a success to fall from."""

    def __post_init__(self) -> None:
        if self.window < 1 or self.stays < 1:
            raise ValueError(f"window and stays must be at least 1, got {self.window} and {self.stays}")
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie between 0 and 1, got {self.share}")


class _Sign(NamedTuple):
    """A sign of a collapse."""

    name: str
    metric: str
    words: str
    """Format of the sign in words, for the mean over the window."""
    number: str
    """Format of the reference."""

    def measure(self, value: float) -> float:
        """Return the metric as the sign counts it; NaN if it is not finite."""
        if not math.isfinite(value):
            return math.nan
        if self.name == "ratio":
            return math.log(max(value, 1.0))
        return value

    def holds(self, now: float, before: float, rule: AlarmRule) -> bool:
        """Return whether the sign holds.

        Args:
          now: the mean over the window; NaN if a value is not finite.
          before: the reference; NaN while there is none.
          rule: the levels.
        """
        if math.isnan(now):
            return True
        much = {"ratio": rule.much_log_ratio, "divergence": rule.much_kl, "route": rule.much_shift}
        if now >= much.get(self.name, math.inf):
            return True
        if math.isnan(before):
            return False
        if self.name == "entropy":
            return now <= rule.entropy_share * before
        least = {
            "ratio": rule.least_log_ratio,
            "divergence": rule.least_kl,
            "clip": rule.least_clip_fraction,
            "route": rule.least_shift,
        }
        return now >= max(least[self.name], rule.times * before)


_FEWEST = 2
"""Steps that make a window while the run has no more."""
_SIGNS = (
    _Sign("ratio", "ratio_max", "largest log-ratios {:.2f}", "{:.2f}"),
    _Sign("divergence", "approx_kl", "divergence {:.3f}", "{:.3f}"),
    _Sign("clip", "clip_fraction", "clipped {:.1%}", "{:.1%}"),
    _Sign("entropy", "entropy", "entropy {:.3g}", "{:.3g}"),
    _Sign("route", "drift", "drift {:.3f}", "{:.3f}"),
)


class Alarm:
    """An alarm that watches a run step by step and rings once.

    A run that goes on from a checkpoint first shows it the earlier rows, and ignores its answers to them.
    """

    def __init__(self, rule: AlarmRule = AlarmRule()) -> None:
        self._rule = rule
        self._early: dict[str, list[float]] = {sign.name: [] for sign in _SIGNS}
        self._last = {sign.name: collections.deque[float](maxlen=rule.window) for sign in _SIGNS}
        self._steps = 0
        self._idle = 0
        self.step: int | None = None
        """The step at which the alarm rang."""
        self.why = ""

    def update(self, row: Row) -> str | None:
        """Look at the next row of the run.

        Args:
          row: a row of `metrics.jsonl`: "phase", "step", and numbers by name.

        Returns:
          The reason in one line at the step at which the alarm rings; otherwise None.
        """
        if row["phase"] != "rl" or row["step"] < 1:
            return None
        self._steps += 1
        for sign in _SIGNS:
            if sign.metric in row:
                value = sign.measure(row[sign.metric])
                self._last[sign.name].append(value)
                if self._steps <= self._rule.reference:
                    self._early[sign.name].append(value)
        # A step without the metric, and one that had nothing left to learn, is not idle.
        is_idle = row.get("learned_updates") == 0 and row.get("solve_rate") != 1
        self._idle = self._idle + 1 if is_idle else 0
        if self.step is not None:
            return None
        seen = [words for sign in _SIGNS if (words := self._describe(sign))]
        if self._idle >= self._rule.idle:
            seen.append(f"{self._idle} steps in a row learned from nothing")
        elif len(seen) < self._rule.signs:
            return None
        self.step, self.why = row["step"], ", ".join(seen)
        return self.why

    def _describe(self, sign: _Sign) -> str:
        """Return the sign in words if it holds, otherwise an empty string."""
        last = self._last[sign.name]
        if len(last) < min(self._rule.window, _FEWEST):
            return ""
        early = [value for value in self._early[sign.name] if not math.isnan(value)]
        can_compare = early and self._steps >= self._rule.reference + self._rule.window
        before = statistics.median(early) if can_compare else math.nan
        now = math.nan if any(math.isnan(value) for value in last) else statistics.fmean(last)
        if not sign.holds(now, before, self._rule):
            return ""
        if math.isnan(now):
            return f"{sign.metric} is not finite"
        was = f" (was {sign.number.format(before)})" if can_compare else ""
        return sign.words.format(now) + was


def first_alarm(rows: Iterable[Row], rule: AlarmRule = AlarmRule()) -> Alarm:
    """Return the alarm after all rows of a run: `step`, None if it never rang, and `why`."""
    alarm = Alarm(rule)
    for row in rows:
        alarm.update(row)
    return alarm


def collapse_step(rows: Iterable[Row], rule: CollapseRule = CollapseRule()) -> int | None:
    """Return the step at which a run collapsed (`CollapseRule`), or None if it did not.

    Steps at which the metric is missing or not finite are left out.
    """
    steps, values = [], []
    for row in rows:
        value = row.get(rule.metric, math.nan)
        if row["phase"] == "rl" and row["step"] >= 1 and math.isfinite(value):
            steps.append(row["step"])
            values.append(value)
    best, fell = -math.inf, None
    for end in range(1, len(values) + 1):
        mean = statistics.fmean(values[max(end - rule.window, 0) : end])
        best = max(best, mean)
        if best < rule.least_best or mean >= rule.share * best:
            fell = None
        elif fell is None:
            fell = end - 1
    return None if fell is None or len(values) - fell < rule.stays else steps[fell]


class Warned(NamedTuple):
    """The alarm and the collapse of one run."""

    alarm: int | None
    """Step of the alarm; None if it never rang."""
    why: str
    collapse: int | None
    """Step of the collapse; None without one."""

    @property
    def lead(self) -> int | None:
        """Steps from the alarm to the collapse; negative if the alarm came too late, None if one is missing."""
        return None if self.alarm is None or self.collapse is None else self.collapse - self.alarm


def judge_alarm(
    rows: Iterable[Row], alarm_rule: AlarmRule = AlarmRule(), collapse_rule: CollapseRule = CollapseRule()
) -> Warned:
    """Find the alarm and the collapse in the rows of one run."""
    rows = list(rows)
    alarm = first_alarm(rows, alarm_rule)
    return Warned(alarm.step, alarm.why, collapse_step(rows, collapse_rule))


class AlarmRecord(NamedTuple):
    """Record of an alarm over many runs."""

    leads: list[int]
    """Steps from alarm to collapse, of the runs where the alarm came first or at the same step, in their order."""
    missed: int
    """Number of runs that collapsed without an alarm before."""
    false: int
    """Number of runs with an alarm that did not collapse."""
    quiet: int
    """Number of runs with neither."""


def alarm_record(
    runs: Sequence[Iterable[Row]],
    alarm_rule: AlarmRule = AlarmRule(),
    collapse_rule: CollapseRule = CollapseRule(),
) -> AlarmRecord:
    """Measure an alarm's lead times, and count its mistakes.

    Args:
      runs: the rows of each run.
      alarm_rule: the conditions of the alarm.
      collapse_rule: the conditions of the collapse that it should announce.
    """
    judged = [judge_alarm(rows, alarm_rule, collapse_rule) for rows in runs]
    leads = [run.lead for run in judged if run.lead is not None and run.lead >= 0]
    collapsed = sum(run.collapse is not None for run in judged)
    false = sum(run.alarm is not None and run.collapse is None for run in judged)
    return AlarmRecord(leads, collapsed - len(leads), false, len(judged) - collapsed - false)
