"""The seconds of a step by stage, as the host sees them.

JAX hands programs to the device and goes on, so a stage's seconds are those that the host works for it or waits for it.
The loop waits only where it would without a stopwatch: for the responses when it judges them (draw), and for the
statistics of scoring and updates (score, update) once the device has the next rollout to draw. What the host does while
the device goes on with something else counts in its own stage, and once more, by itself, as overlapped.
"""

import time
from collections.abc import Callable
from typing import Literal, Protocol, get_args

from rspo_jax.types import Array

Stage = Literal["draw", "judge", "score", "update", "probe", "evaluate", "write", "other"]
STAGES: tuple[Stage, ...] = get_args(Stage)
"""The stages of a step: handing prompts out and waiting for responses; the judge; scoring; updates; the probe of
gradients; evaluations; rows and checkpoints; and all the rest, such as advantages and packing."""


class Lap(Protocol):
    """The method `Stopwatch.lap`, for functions whose caller may measure them."""

    def __call__(self, stage: Stage, beside: Array | None = None) -> None: ...


def unmeasured(stage: Stage, beside: Array | None = None) -> None:
    """Measure nothing, in place of `Stopwatch.lap`."""


class Stopwatch:
    """A clock of a loop that gives each second to one stage and to one row of metrics, the next one written."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, compiled: Callable[[], float] = lambda: 0.0
    ) -> None:
        """Start.

        Args:
          clock: returns the time in seconds, from any origin.
          compiled: returns the seconds spent on compiling so far.
        """
        self._clock, self._compiled = clock, compiled
        self.restart()

    def restart(self) -> None:
        """Begin anew: what has passed since the last row counts nowhere."""
        self._last, self._compiled_before = self._clock(), self._compiled()
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._overlapped = 0.0

    def lap(self, stage: Stage, beside: Array | None = None) -> None:
        """Give the seconds since the last lap to a stage.

        Args:
          stage: the stage that ends here.
          beside: something that the device was told to compute before. If it is still not ready, the device was busy
            with it all the while, and the seconds count as overlapped too.
        """
        now = self._clock()
        self._seconds[stage] += now - self._last
        if beside is not None and not beside.is_ready():  # pyright: ignore[reportAttributeAccessIssue]
            self._overlapped += now - self._last
        self._last = now

    def take(self, tokens: float | None = None) -> dict[str, float]:
        """Return the seconds since the last row, for the next one, and begin anew.

        Args:
          tokens: response tokens of the step; None for a row that is no step.

        Returns:
          `seconds_*` of each stage; `compile_seconds` and `overlapped_seconds`, which are parts of these and not more
          of them; and for a step `step_seconds`, the sum of all stages, and `tokens_per_second`.
        """
        self.lap("other")
        total = sum(self._seconds.values())
        metrics = {} if tokens is None else {"step_seconds": total, "tokens_per_second": tokens / total}
        metrics |= {f"seconds_{stage}": seconds for stage, seconds in self._seconds.items()}
        metrics |= {"compile_seconds": self._compiled() - self._compiled_before, "overlapped_seconds": self._overlapped}
        self._compiled_before, self._overlapped = self._compiled(), 0.0
        self._seconds = dict.fromkeys(STAGES, 0.0)
        return metrics
