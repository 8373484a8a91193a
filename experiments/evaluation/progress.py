"""How an evaluation is going, and how fast: a line that is kept up to date on a terminal, and plain lines elsewhere.

This file must never know how responses are drawn.
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import rich.console
import rich.live
import rich.text

from experiments.evaluation.responses import Response

_REPORTS = 20


class Throughput(NamedTuple):
    """How fast responses were drawn and judged."""

    responses_per_second: float
    tokens_per_second: float
    """Of responses; those of prompts are not counted."""
    compilation_included: bool
    """Whether there was but one batch: of several, the first is left out, as it is mostly compilation."""


class _Mark(NamedTuple):
    """What was drawn up to a moment."""

    seconds: float
    responses: int
    tokens: int


class Progress:
    """Shows and measures. A context manager."""

    def __init__(
        self,
        total: int,
        present: Sequence[Response] = (),
        console: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepares the display; entering the context shows it and starts the clock.

        Args:
          total: responses asked for.
          present: those of them that are there already.
          console: where to print; standard output by default.
          clock: the time in seconds, from any origin.
        """
        self._total, self._clock = total, clock
        self._done, self._right = len(present), sum(response.correct for response in present)
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
        """Counts a batch that is done."""
        last, before = self._marks[-1], self._done
        tokens = sum(response.tokens for response in responses)
        self._marks.append(_Mark(self._clock(), last.responses + len(responses), last.tokens + tokens))
        self._done += len(responses)
        self._right += sum(response.correct for response in responses)
        if self._live:
            self._live.refresh()
        elif len(self._marks) == 2 or before * _REPORTS // self._total < self._done * _REPORTS // self._total:
            self._console.print(self._render(), soft_wrap=True)

    @property
    def throughput(self) -> Throughput | None:
        """Of what was drawn since the start; None before the first batch is done."""
        if len(self._marks) < 2:
            return None
        first, last = self._marks[1 if len(self._marks) > 2 else 0], self._marks[-1]
        seconds = max(last.seconds - first.seconds, 1e-9)
        responses, tokens = last.responses - first.responses, last.tokens - first.tokens
        return Throughput(responses / seconds, tokens / seconds, len(self._marks) == 2)

    def _render(self) -> rich.text.Text:
        parts = [f"{self._done:,}/{self._total:,} responses"]
        if self._done:
            parts.append(f"{self._right / self._done:.1%} right")
        if throughput := self.throughput:
            parts += _rates(throughput)
            if throughput.compilation_included:  # which says nothing about the time left
                return rich.text.Text(", ".join(parts))
            seconds = round((self._total - self._done) / max(throughput.responses_per_second, 1e-9))
            parts.append(f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left")
        return rich.text.Text(", ".join(parts))


def describe(drawn: int, throughput: Throughput | None) -> str:
    """One line at the end: how many responses were drawn since the start, and how fast."""
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
    """Prints text as it is, without markup, colours or line breaks of its own; an output that cannot show a character
    gets a question mark."""
    encodable = text.encode(console.encoding, errors="replace").decode(console.encoding)
    console.print(rich.text.Text(encodable), soft_wrap=True)


def make_console() -> rich.console.Console:
    """Standard output; colours may be forced where there is no terminal, where a line that redraws itself would fill
    the log."""
    return rich.console.Console(force_interactive=None if sys.stdout.isatty() else False)
