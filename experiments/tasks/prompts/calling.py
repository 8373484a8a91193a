"""Calls of reward functions as TRL's `GRPOTrainer` makes them, and the check of what they return.

A call gets lists, an entry a response, all by keyword: `prompts`, `completions`, `completion_ids`, every column of the
data, and `trainer_state`, `log_extra` and `log_metric`. A function without `**kwargs` gets those that it names.
"""

import asyncio
import contextlib
import inspect
import math
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType, SimpleNamespace
from typing import Any, NamedTuple

LARGEST = 3.4e38
"""Largest reward, as float32 has it."""
OWN_NAMES = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Keywords that are not columns."""


class Failure(NamedTuple):
    """The reason why a response goes without a reward that should have applied to it."""

    reason: str
    """What the function did, as the end of a sentence."""
    by_time: bool = False


Value = float | None | Failure
"""What came of a reward and a response; None where the reward does not apply."""


@dataclass(frozen=True)
class Batch:
    """Responses to be scored, as the keywords of a call."""

    prompts: list[Any]
    """Texts, or chats as lists of messages."""
    completions: list[Any]
    """Texts, or chats of one message of the assistant each."""
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]
    step: tuple[int, int] = (0, 0)
    """The step of the run, and the number of its steps."""

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: Sequence[int]) -> "Batch":
        """Return the batch of some rows."""
        return Batch(
            prompts=[self.prompts[row] for row in rows],
            completions=[self.completions[row] for row in rows],
            completion_ids=[self.completion_ids[row] for row in rows],
            columns={name: [values[row] for row in rows] for name, values in self.columns.items()},
            step=self.step,
        )


class OutOfTime(BaseException):
    """Raised in a reward function at its limit of time; no `except Exception` in it can stop this."""


def mistake_of(function: Callable[..., Any], columns: Sequence[str]) -> str:
    """Return what keeps a function from being called with these columns, as the end of a sentence; empty: nothing."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions in C do not tell; they get everything
        return ""
    names = [*OWN_NAMES, *columns]
    if positional := [one.name for one in parameters if one.kind == one.POSITIONAL_ONLY]:
        return f"takes {positional[0]} by position only, but rewards are called by keyword"
    by_name = (one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY))
    required = [one.name for one in by_name if one.default is one.empty]
    if missing := [name for name in required if name not in names]:
        have = f"the columns {', '.join(columns)}" if columns else "no column besides the prompts"
        return f"takes {', '.join(missing)}, but the data has {have}: correct the name, or give it a default"
    return ""


def is_asynchronous(function: Callable[..., Any]) -> bool:
    """Return whether a function, or a callable object, is an `async def`."""
    function = getattr(function, "func", function)  # that of a functools.partial
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def call(function: Callable[..., Any], batch: Batch, log: Callable[[str, float], object]) -> list[Value]:
    """Call a function that is not asynchronous; all responses share the failure of a call as a whole."""
    try:
        return _checked(function(**_keywords(function, batch, log)), len(batch))
    except (Exception, SystemExit) as error:
        return [_raised(error)] * len(batch)


async def call_asynchronously(
    function: Callable[..., Awaitable[Any]], batch: Batch, log: Callable[[str, float], object], limit: float
) -> list[Value]:
    """Await an asynchronous function; all responses share the failure of a call as a whole."""
    timeout = asyncio.timeout(limit)
    try:
        async with timeout:
            return _checked(await function(**_keywords(function, batch, log)), len(batch))
    except (Exception, SystemExit) as error:
        return [out_of_time(limit) if timeout.expired() else _raised(error)] * len(batch)


def out_of_time(limit: float) -> Failure:
    """Return the failure of a call that did not return within its limit, in seconds."""
    return Failure(f"did not return within {limit:g} s", by_time=True)


@contextlib.contextmanager
def limited(limit: float) -> Iterator[None]:
    """Raise `OutOfTime` in the block after `limit` seconds, as far as signals can reach it: in the main thread alone.

    A block that sets an alarm of its own takes this one away.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _keywords(function: Callable[..., Any], batch: Batch, log: Callable[[str, float], object]) -> dict[str, Any]:
    step, steps = batch.step
    given: dict[str, Any] = {name: list(values) for name, values in batch.columns.items()}
    given |= {"prompts": batch.prompts, "completions": batch.completions, "completion_ids": batch.completion_ids}
    given["trainer_state"] = SimpleNamespace(global_step=step, max_steps=steps, epoch=None)
    given |= {"log_extra": lambda column, values: None, "log_metric": log}
    taken = _taken(function)
    return given if taken is None else {name: value for name, value in given.items() if name in taken}


def _taken(function: Callable[..., Any]) -> frozenset[str] | None:
    """Return the keywords that a function takes; None for all."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    takes_all = any(one.kind == one.VAR_KEYWORD for one in parameters.values())
    return None if takes_all else frozenset(parameters)


def _checked(values: Any, count: int) -> list[Value]:
    """Return the rewards of a call; raise `_Wrong` if they are none."""
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__iter__"):
        raise _Wrong(f"returned {_short(values)}, not a list of {count} rewards")
    values = list(values)
    if len(values) != count:
        raise _Wrong(
            f"returned {len(values)} rewards for {count} completions: return one for each, None where it does not apply"
        )
    return [_value(value) for value in values]


def _value(value: Any) -> Value:
    if value is None:
        return None
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return Failure(f"returned {_short(value)}, which is no number")
    if not math.isfinite(number) or abs(number) > LARGEST:
        return Failure(f"returned {_short(value)}: rewards are finite, and None where one does not apply")
    return number


class _Wrong(Exception):
    """The error of a function that returned no list of rewards."""


def _raised(error: BaseException) -> Failure:
    if isinstance(error, _Wrong):
        return Failure(str(error))
    return Failure(f"raised {type(error).__name__}{f': {error}' if str(error) else ''}"[:500])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
