"""Progress and speed of an evaluation: one line that is updated on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import rich.console
import rich.live
import rich.text

from experiments.evaluation.responses import Response

_REPORTS = 20  # approximate number of lines on an output that is no terminal


class Throughput(NamedTuple):
    """Speed of drawing and judging responses."""

    responses_per_second: float
    tokens_per_second: float
    """Tokens of responses; those of prompts are not counted."""
    compilation_included: bool
    """True if there was only one batch; the first of several is left out, as it is mostly compilation."""


class _Mark(NamedTuple):
    """Numbers of responses and tokens drawn up to a moment."""

    seconds: float
    responses: int
    tokens: int


class EvaluationProgress:
    """A context manager that shows and measures the progress of an evaluation."""

    def __init__(
        self,
        total: int,
        present: Sequence[Response] = (),
        console: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare the display; entering the context shows it and starts the clock.

        Args:
          total: number of responses that the evaluation consists of.
          present: responses that were drawn before.
          console: the console to print to; standard output by default.
          clock: returns the time in seconds, from any origin.
        """
        self._total, self._clock = total, clock
        self._done, self._right, self._reward, self._told = 0, 0, 0.0, True
        self._count(present)
        self._marks: list[_Mark] = []
        """The start, and the end of each batch."""
        self._console = console or make_console()
        self._live = (
            rich.live.Live(get_renderable=self._render, console=self._console, transient=True, refresh_per_second=4)
            if self._console.is_interactive
            else None
        )

    def __enter__(self) -> Self:
        self._marks = [_Mark(self._clock(), 0, 0)]
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, responses: Sequence[Response]) -> None:
        """Count a batch that is done."""
        last, before = self._marks[-1], self._done
        tokens = sum(response.tokens for response in responses)
        self._marks.append(_Mark(self._clock(), last.responses + len(responses), last.tokens + tokens))
        self._count(responses)
        if self._live:
            self._live.refresh()
        elif len(self._marks) == 2 or before * _REPORTS // self._total < self._done * _REPORTS // self._total:
            self._console.print(self._render(), soft_wrap=True)

    def _count(self, responses: Sequence[Response]) -> None:
        self._done += len(responses)
        self._right += sum(bool(response.correct) for response in responses)
        self._reward += sum(response.reward for response in responses)
        self._told &= all(response.correct is not None for response in responses)

    @property
    def throughput(self) -> Throughput | None:
        """The speed since the start; None before the first batch is done."""
        if len(self._marks) < 2:
            return None
        first, last = self._marks[1 if len(self._marks) > 2 else 0], self._marks[-1]
        seconds = max(last.seconds - first.seconds, 1e-9)
        responses, tokens = last.responses - first.responses, last.tokens - first.tokens
        return Throughput(responses / seconds, tokens / seconds, len(self._marks) == 2)

    def _render(self) -> rich.text.Text:
        parts = [f"{self._done:,}/{self._total:,} responses"]
        if self._done:
            found = f"{self._right / self._done:.1%} right" if self._told else f"reward {self._reward / self._done:.3f}"
            parts.append(found)
        if throughput := self.throughput:
            parts += _rates(throughput)
            if throughput.compilation_included:  # too slow to estimate the time left
                return rich.text.Text(", ".join(parts))
            seconds = round((self._total - self._done) / max(throughput.responses_per_second, 1e-9))
            parts.append(f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left")
        return rich.text.Text(", ".join(parts))


def describe_throughput(drawn: int, throughput: Throughput | None) -> str:
    """Return the last line of an evaluation: the number of responses drawn since the start, and the speed."""
    if throughput is None:
        return "all responses were there already"
    compilation = ", compilation included" if throughput.compilation_included else ""
    return f"{drawn:,} responses drawn and judged: {', '.join(_rates(throughput))}{compilation}"


def _rates(throughput: Throughput) -> tuple[str, str]:
    return (
        f"{throughput.tokens_per_second:,.0f} tokens/s",
        f"{throughput.responses_per_second:,.1f} responses/s",
    )


def print_plain(console: rich.console.Console, text: str) -> None:
    """Print text as it is, without markup, colours or added line breaks.

    Characters that the output cannot encode become question marks.
    """
    encodable = text.encode(console.encoding, errors="replace").decode(console.encoding)
    console.print(rich.text.Text(encodable), soft_wrap=True)


def make_console() -> rich.console.Console:
    """Return a console on standard output that redraws lines only on a terminal, even if colours are forced."""
    return rich.console.Console(force_interactive=None if sys.stdout.isatty() else False)
