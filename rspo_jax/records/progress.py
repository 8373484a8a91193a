"""Live display of a run: a bar with the latest metrics on a terminal, plain lines elsewhere."""

import collections
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Self

import rich.console
import rich.progress
import rich.table
import rich.text

from rspo_jax.hosts import is_primary
from rspo_jax.records.rows import Phase
from rspo_jax.types import check_choice

_TITLES: dict[Phase, str] = {"warm_start": "warm start", "rl": "RL"}
_SHOWN: dict[Phase, dict[str, str]] = {
    "warm_start": {"loss": "loss {:.4g}", "tokens_per_second": "{:,.0f} tokens/s"},
    "rl": {
        "reward": "reward {:.3f}",
        "solve_rate": "solve rate {:.1%}",
        "gamma_mean": "γ {:.4f}",
        "clip_fraction": "clipped {:.2%}",
        "entropy": "entropy {:.3f}",
        "tokens_per_second": "{:,.0f} tokens/s",
    },
}
_INTERVALS_TIMED = 32
_REPORTS = 20


class _BarWithMetrics(rich.progress.Progress):
    """A bar with a line of text under it, asked for at every refresh."""

    text: Callable[[], str] = staticmethod(lambda: "")

    def get_renderables(self) -> Iterable[rich.console.RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield rich.text.Text(self.text(), style="dim")


class PhaseProgress:
    """Display of one phase of a run, a context manager.

    On a terminal it is a live bar with the latest metrics under it. Elsewhere (a file, the log of a job) it is plain
    lines: after the first step, after about every 5 % of the steps, after the last one, and at every evaluation. A
    metric that is missing shows as "–". Of several processes only the first shows anything. A program that is compiled
    has a line of its own, which begins when compiling does and ends with the seconds that it took.
    """

    def __init__(
        self,
        phase: Phase,
        total: int,
        completed: int = 0,
        console: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare the display; entering the context shows it.

        Args:
          phase: the phase of the run.
          total: number of steps in the phase.
          completed: number of steps that are already done, in a run that is resumed.
          console: the output; standard output by default.
          clock: returns the time in seconds, from any origin.

        Raises:
          ValueError: if the phase is unknown, or unless 0 <= completed <= total and total >= 1.
        """
        check_choice("phase", phase, Phase)
        if not (total >= 1 and 0 <= completed <= total):
            raise ValueError(f"a phase needs 1 step or more, and no more completed, got {completed} of {total}")
        self._title, self._shown = _TITLES[phase], _SHOWN[phase]
        self._total, self._step, self._clock = total, completed, clock
        if not is_primary():
            console = rich.console.Console(quiet=True, force_interactive=False)
        # Colours may be forced without a terminal, where a bar that redraws itself would fill the log.
        self._console = console or rich.console.Console(force_interactive=None if sys.stdout.isatty() else False)
        self._metrics: Mapping[str, float] = {}
        self._updates = 0
        self._times = collections.deque([(completed, clock())], maxlen=_INTERVALS_TIMED + 1)
        self._compiling: tuple[str, float] | None = None  # the program, and since when
        self._bar: _BarWithMetrics | None = None
        if self._console.is_interactive:
            self._bar = _BarWithMetrics(
                rich.progress.TextColumn("{task.description}", style="bold", markup=False),
                rich.progress.BarColumn(bar_width=None, table_column=rich.table.Column(ratio=1)),
                rich.progress.TextColumn("{task.completed}/{task.total}"),
                rich.progress.TextColumn("{task.fields[left]}", style="cyan", markup=False),
                console=self._console,
                expand=True,
                refresh_per_second=4,
            )
            self._bar.text = self._text_under_the_bar
            self._bar.add_task(self._title, total=total, left="")
            self._redraw()

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._break_line()
        if self._bar:
            self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that a step is done.

        Args:
          step: the step within the phase, counted from 1.
          metrics: numbers by name. A skipped update, a step that learned from nothing and an evaluation get a line that
            stays.
        """
        before, self._step, self._metrics = self._step, step, dict(metrics)
        self._times.append((step, self._clock()))
        self._updates += 1
        if self._updates == 2:
            self._times.popleft()  # the first step is mostly compilation and tells nothing about the others
        if (skipped := metrics.get("skipped_updates", 0)) > 0:
            self.say(f"{self._title} step {step}: {skipped:.0f} update{'s' if skipped > 1 else ''} skipped")
        if metrics.get("learned_updates") == 0:
            self.say(f"{self._title} step {step}: learned from nothing: {_describe_idleness(metrics)}")
        evaluation = _describe_evaluation(metrics)
        if self._bar:
            if evaluation:
                self.say(f"{self._title} step {step}: {evaluation}")
            self._redraw()
            return
        a_twentieth_is_done = before * _REPORTS // self._total < step * _REPORTS // self._total
        if evaluation or self._updates == 1 or a_twentieth_is_done:
            parts = [*self._describe_metrics(), *([evaluation] if evaluation else []), self._time_left()]
            self.say(f"{self._title} {step}/{self._total}: {', '.join(parts)}")

    def begin_compiling(self, program: str) -> None:
        """Show that a program is being compiled from now on."""
        self._break_line()
        self._compiling = (program, self._clock())
        if self._bar:
            self._redraw()
        else:
            self._print(f"compiling {program} …", end="")

    def end_compiling(self, program: str, seconds: float) -> None:
        """Show that a program has been compiled, and how long it took."""
        took = f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
        in_its_line = self._bar is None and self._compiling is not None
        self._compiling = None
        self._print(f" {took}" if in_its_line else f"compiling {program} … {took}")
        if self._bar:
            self._redraw()

    def say(self, text: str) -> None:
        """Print a line of plain text; on a terminal it goes above the bar."""
        self._break_line()
        self._print(text)

    def _break_line(self) -> None:
        """End a line that still waits for the seconds of a program."""
        if self._compiling is not None and self._bar is None:
            self._compiling = None
            self._print("")

    def _print(self, text: str, end: str = "\n") -> None:
        self._console.print(rich.text.Text(self._encodable(text)), soft_wrap=True, end=end)

    def _text_under_the_bar(self) -> str:
        if self._compiling is None:
            return self._encodable("  ".join(self._describe_metrics()))
        program, began = self._compiling
        return self._encodable(f"compiling {program} … {self._clock() - began:.0f} s")

    def _redraw(self) -> None:
        assert self._bar is not None
        (task,) = self._bar.task_ids
        self._bar.update(task, completed=self._step, left=self._encodable(self._time_left()), refresh=True)

    def _describe_metrics(self) -> list[str]:
        metrics, parts = self._metrics, []
        named = {name: value for name, value in metrics.items() if re.fullmatch("rewards/.+/mean", name)}
        names_rewards = bool(named) or any(name.endswith("_reward") for name in metrics)
        for name, text in self._shown.items():
            if name == "solve_rate" and names_rewards and name not in metrics:
                continue  # a task that names its rewards need not tell what is solved
            parts.append(text.format(metrics[name]) if name in metrics else re.sub(r"\{.*?\}", "–", text))
            if name == "reward":
                # A reward that applied to no response has no mean.
                means = {of_reward.split("/")[1]: value for of_reward, value in named.items()}
                parts += [f"{own} –" if math.isnan(value) else f"{own} {value:.3f}" for own, value in means.items()]
        counts = {"left_out": "left out", "unjudged": "not judged"}
        return parts + [f"{metrics[name]:.0f} {words}" for name, words in counts.items() if metrics.get(name, 0) > 0]

    def _time_left(self) -> str:
        # The estimate of rich.progress would include the first step.
        (first_step, first_time), (last_step, last_time) = self._times[0], self._times[-1]
        if last_step <= first_step:
            return "– left"
        seconds = (self._total - last_step) * (last_time - first_time) / (last_step - first_step)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d} left"

    def _encodable(self, text: str) -> str:
        # An output that cannot show "γ" must not end the run.
        return text.encode(self._console.encoding, errors="replace").decode(self._console.encoding)


def _describe_idleness(metrics: Mapping[str, float]) -> str:
    """Return why no update of a step learned anything, as far as the metrics tell."""
    reasons = {
        "every response was cut off and left out": "masked_truncated" in metrics and metrics["truncated_fraction"] == 1,
        "no reward applied to any response": metrics.get("left_out", 0) > 0 and math.isnan(metrics["reward"]),
        "the rewards of each group are all equal": metrics.get("informative_groups") == 0,
        "the correction dropped every response": metrics.get("correction_dropped_fraction") == 1,
        "the clip cut every token": metrics.get("clip_fraction") == 1,
        "updates were skipped, as loss or gradient were not finite": metrics.get("skipped_updates", 0) > 0,
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds) or "no response has a gradient"


def _describe_evaluation(metrics: Mapping[str, float]) -> str:
    """Return held-out solve rates with their intervals, else mean rewards; an empty string without any."""
    for suffix, words, digits in (("", "", ".1%"), ("_reward", "reward ", ".3f")):
        parts = []
        for kind in ("greedy", "sampled"):
            value, low, high = (metrics.get(f"eval_{kind}{suffix}{bound}") for bound in ("", "_low", "_high"))
            if value is not None:
                known = low is not None and high is not None and math.isfinite(low + high)
                interval = f" [{low:{digits}}, {high:{digits}}]" if known else ""
                parts.append(f"{kind} {value:{digits}}{interval}")
        if parts:
            return f"held-out {words}{', '.join(parts)}"
    return ""
