"""Compilation as it happens: its seconds, and the name of the program that a run is waiting for.

JAX tells listeners when it begins and ends to trace, lower and compile a program (`jax.monitoring`). Inner programs are
traced as parts of outer ones, and constants may be compiled meanwhile: only the outermost seconds count.
"""

import collections
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol, Self

import jax

_TRACE = "/jax/core/compile/jaxpr_trace_duration"
_LOWER = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILE = "/jax/core/compile/backend_compile_duration"


class CompileDisplay(Protocol):
    """Something that shows what is being compiled."""

    def begin_compiling(self, program: str) -> None:
        """Show that a program is being compiled from now on."""

    def end_compiling(self, program: str, seconds: float) -> None:
        """Show that it took so long."""


class CompileWatch:
    """A context manager that counts the seconds in which this thread compiles, and shows programs with a name."""

    def __init__(self, programs: Mapping[str, str], clock: Callable[[], float] = time.monotonic) -> None:
        """Prepare; entering the context begins to listen.

        Args:
          programs: the name of a jitted function -> what a user calls it. Others are counted, but not shown.
          clock: returns the time in seconds, from any origin.
        """
        self.display: CompileDisplay | None = None
        """Where programs are shown; nowhere when absent."""
        self._programs, self._clock = programs, clock
        self._thread = threading.get_ident()
        self._depth, self._began, self._total = 0, 0.0, 0.0
        self._compiled: collections.Counter[str] = collections.Counter()
        self._shown: tuple[str, str, float] | None = None  # the function, its words, and when its tracing began

    def __enter__(self) -> Self:
        jax.monitoring.register_scalar_listener(self._on_begin)
        jax.monitoring.register_event_duration_secs_listener(self._on_end)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_scalar_listener(self._on_begin)
        jax.monitoring.unregister_event_duration_listener(self._on_end)

    def seconds(self) -> float:
        """Return the seconds of tracing, lowering and compiling so far, or those spent on loading what is cached."""
        return self._total

    def _on_begin(self, event: str, value: float, **details: str | int) -> None:
        if event not in (_TRACE, _LOWER, _COMPILE) or threading.get_ident() != self._thread:
            return
        self._depth += 1
        if self._depth > 1:
            return
        self._began = self._clock()
        function = _function(details)
        # A program that was traced before is only lowered, for other devices, say.
        begun = self._shown is not None and self._shown[0] == function
        if event in (_TRACE, _LOWER) and function in self._programs and not begun:
            again = self._compiled[function]
            words = self._programs[function] + (f" (variant {again + 1})" if again else "")
            self._shown = (function, words, self._began)
            if self.display is not None:
                self.display.begin_compiling(words)

    def _on_end(self, event: str, duration_secs: float, **details: str | int) -> None:
        if event not in (_TRACE, _LOWER, _COMPILE) or threading.get_ident() != self._thread or not self._depth:
            return
        self._depth -= 1
        if self._depth:
            return
        now = self._clock()
        self._total += now - self._began
        function = _function(details)
        if event == _COMPILE and self._shown is not None and self._shown[0] == function:
            _, words, began = self._shown
            self._shown = None
            self._compiled[function] += 1
            if self.display is not None:
                self.display.end_compiling(words, now - began)


def _function(details: Mapping[str, str | int]) -> str:
    """Return the name of the function that JAX compiles, of `f` and of `jit(f)`."""
    return str(details.get("fun_name", "")).removeprefix("jit(").removesuffix(")")
