"""When a run collapses, what shows it coming, and how long before: rules over the rows of `metrics.jsonl`.

The signs are those that are seen before a collapse (arXiv 2510.23027): importance ratios, divergence and clipping
burst, the entropy falls, the routes drift. A run is compared with its own early steps, as what is much for one model is
little for another, and with levels that are much for any, as a run may be lost from its first steps on. Both rules
count steps of the "rl" phase from 1; step 0, the evaluation before the first, is left out. This file must never know
how a metric is computed, and reads no files.
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
    """The alarm rings at the first step at which enough signs hold together.

    Each sign compares the mean of the last `window` steps with the median of the first `reference` steps:

    * ratio: log `ratio_max` is at least `least_log_ratio`, and `times` that of the reference.
    * divergence: `approx_kl` is at least `least_kl`, and `times` that of the reference.
    * clip: `clip_fraction` is at least `least_clip_fraction`, and `times` that of the reference.
    * entropy: `entropy` is at most `entropy_share` of that of the reference.
    * route: `drift` is at least `least_shift`, and `times` that of the reference. γ would not do: an adaptive scale or
      a sum over layers makes it small without any drift.

    Ratio, divergence and route also hold at `much_log_ratio`, `much_kl` and `much_shift` or more, whatever the
    reference; for these two steps are enough of a window. A metric that was recorded but is not finite is a sign at
    once; one that was not recorded is none. The levels were chosen on the runs of
    `experiments.ablate countdown_tuning`; how often they are right on others, `experiments.judge_alarm` says.
    """

    reference: int = 20
    window: int = 5
    signs: int = 2
    """How many of them hold together."""
    times: float = 3.0
    least_log_ratio: float = 1.0
    """In nats: the largest ratio of a step, as a geometric mean over the window, is e or more."""
    least_kl: float = 0.01
    """In nats a token."""
    least_clip_fraction: float = 0.02
    least_shift: float = 0.02
    """In nats, a mean over layers and tokens."""
    entropy_share: float = 0.3
    much_log_ratio: float = 3.0
    much_kl: float = 0.05
    much_shift: float = 0.08

    def __post_init__(self) -> None:
        if self.reference < 1 or self.window < 1:
            raise ValueError(f"reference and window must be at least 1, got {self.reference} and {self.window}")
        if not 1 <= self.signs <= len(_SIGNS):
            raise ValueError(f"signs must lie between 1 and {len(_SIGNS)}, got {self.signs}")


@dataclass(frozen=True)
class CollapseRule:
    """A run has collapsed where the mean of `metric` over the last `window` steps falls below `share` of its best so
    far, and is never at that again, for `stays` steps or more. The metric counts from 0, which a lost policy earns.

    The first steps are compared by the mean of those that there are: what step 1 earned was earned before any update,
    so that a policy that its very first updates destroy has something to fall from."""

    metric: str = "reward"
    window: int = 10
    share: float = 0.5
    stays: int = 10
    least_best: float = 0.05
    """A best below this is no success to fall from."""

    def __post_init__(self) -> None:
        if self.window < 1 or self.stays < 1:
            raise ValueError(f"window and stays must be at least 1, got {self.window} and {self.stays}")
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie between 0 and 1, got {self.share}")


class _Sign(NamedTuple):
    """One thing to watch."""

    name: str
    metric: str
    words: str
    """With the mean of the window."""
    number: str
    """How the reference is written."""

    def measure(self, value: float) -> float:
        """The metric as the sign counts it; NaN where it is not finite."""
        if not math.isfinite(value):
            return math.nan
        if self.name == "ratio":
            return math.log(max(value, 1.0))
        return value

    def holds(self, now: float, before: float, rule: AlarmRule) -> bool:
        """Whether it does, `before` being NaN while there is no reference to compare with."""
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
"""Steps that make a window where the run has no more yet."""
_SIGNS = (
    _Sign("ratio", "ratio_max", "largest log-ratios {:.2f}", "{:.2f}"),
    _Sign("divergence", "approx_kl", "divergence {:.3f}", "{:.3f}"),
    _Sign("clip", "clip_fraction", "clipped {:.1%}", "{:.1%}"),
    _Sign("entropy", "entropy", "entropy {:.3g}", "{:.3g}"),
    _Sign("route", "drift", "drift {:.3f}", "{:.3f}"),
)


class Alarm:
    """Watches a run step by step, and rings once.

    A run that goes on from a checkpoint first shows it the rows that there are, and does not repeat what it says.
    """

    def __init__(self, rule: AlarmRule = AlarmRule()) -> None:
        self._rule = rule
        self._early: dict[str, list[float]] = {sign.name: [] for sign in _SIGNS}
        self._last = {sign.name: collections.deque[float](maxlen=rule.window) for sign in _SIGNS}
        self._steps = 0
        self.step: int | None = None
        """When it rang."""
        self.why = ""

    def update(self, row: Row) -> str | None:
        """Sees the next row of the run.

        Args:
          row: of `metrics.jsonl`: "phase", "step", and numbers by name.

        Returns:
          Why it rings, in one line, at the step at which it first does; else None.
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
        if self.step is not None:
            return None
        seen = [words for sign in _SIGNS if (words := self._describe(sign))]
        if len(seen) < self._rule.signs:
            return None
        self.step, self.why = row["step"], ", ".join(seen)
        return self.why

    def _describe(self, sign: _Sign) -> str:
        """The sign in words if it holds, else nothing."""
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
    """The alarm after it has seen all rows of a run: `step`, None if it never rang, and `why`."""
    alarm = Alarm(rule)
    for row in rows:
        alarm.update(row)
    return alarm


def collapse_step(rows: Iterable[Row], rule: CollapseRule = CollapseRule()) -> int | None:
    """The step from which on a run lies below half of its best (`CollapseRule`), None if it does not end so.

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
    """What became of a run, and what was said of it before."""

    alarm: int | None
    """Step."""
    why: str
    collapse: int | None
    """Step."""

    @property
    def lead(self) -> int | None:
        """Steps from the alarm to the collapse; below 0 where the alarm came too late, None where one is missing."""
        return None if self.alarm is None or self.collapse is None else self.collapse - self.alarm


def judge_alarm(
    rows: Iterable[Row], alarm_rule: AlarmRule = AlarmRule(), collapse_rule: CollapseRule = CollapseRule()
) -> Warned:
    """Alarm and collapse of one run."""
    rows = list(rows)
    alarm = first_alarm(rows, alarm_rule)
    return Warned(alarm.step, alarm.why, collapse_step(rows, collapse_rule))


class AlarmRecord(NamedTuple):
    """How an alarm has done over many runs."""

    leads: list[int]
    """Steps between alarm and collapse, where the alarm came first or with it; in the order of the runs."""
    missed: int
    """Runs that collapsed without an alarm before."""
    false: int
    """Runs with an alarm that did not collapse."""
    quiet: int
    """Runs with neither."""


def alarm_record(
    runs: Sequence[Iterable[Row]],
    alarm_rule: AlarmRule = AlarmRule(),
    collapse_rule: CollapseRule = CollapseRule(),
) -> AlarmRecord:
    """Measures an alarm's lead time, and how often it is wrong.

    Args:
      runs: the rows of each.
      alarm_rule: when it rings.
      collapse_rule: what it should ring before.
    """
    judged = [judge_alarm(rows, alarm_rule, collapse_rule) for rows in runs]
    leads = [run.lead for run in judged if run.lead is not None and run.lead >= 0]
    collapsed = sum(run.collapse is not None for run in judged)
    false = sum(run.alarm is not None and run.collapse is None for run in judged)
    return AlarmRecord(leads, collapsed - len(leads), false, len(judged) - collapsed - false)
