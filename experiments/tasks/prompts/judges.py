"""The two places in which rewards are called: worker processes, row by row, and the trainer's own process, in batches.

Either way a response costs no other one its reward. Where everything takes too long, a few responses show it, and the
others are not tried.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from experiments.tasks.pool import WorkerPool
from experiments.tasks.prompts.calling import (
    Batch,
    Failure,
    OutOfTime,
    Value,
    call,
    call_asynchronously,
    is_asynchronous,
    limited,
    mistake_of,
    out_of_time,
)
from experiments.tasks.prompts.rewards import Function, Reward, parse_all

Table = list[list[Value]]
"""What came of each reward (first axis) and each response."""
Log = Callable[[str, float], object]
T = TypeVar("T")

WHOLE = 6.0
"""The limit of time of a call with a whole batch over that of one response."""
_GRACE = 1.0
"""Seconds of a worker's limit beyond those of the calls in it."""
_GIVEN_UP = Failure("was not tried, because it took too long on the responses before", by_time=True)


class Judge(Protocol):
    """A place in which rewards are called."""

    def mistakes(self, columns: Sequence[str]) -> list[str]:
        """Return what keeps the rewards from being called with the columns of the data, a sentence for each."""
        ...

    def score(self, batch: Batch, log: Log) -> Table:
        """Return what comes of each reward and each response; metrics that functions log are handed to `log`."""
        ...

    def close(self) -> None: ...


class InProcess:
    """Rewards in this process, called with a whole batch; one on which a call fails is called again row by row."""

    def __init__(self, rewards: Sequence[Reward], limit: float) -> None:
        self._rewards, self._limit = rewards, limit
        self._functions: list[Function] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def mistakes(self, columns: Sequence[str]) -> list[str]:
        self._functions, mistakes = _load(self._rewards, columns)
        return mistakes

    def score(self, batch: Batch, log: Log) -> Table:
        table: Table = [[] for _ in self._functions]
        asynchronous = [index for index, one in enumerate(self._functions) if is_asynchronous(one)]
        if asynchronous:
            functions = [self._functions[index] for index in asynchronous]
            for index, values in zip(asynchronous, self._run(self._await_all(functions, batch, log)), strict=True):
                table[index] = values
        for index, function in enumerate(self._functions):
            if index not in asynchronous:
                table[index] = self._call(function, batch, log)
        return table

    def close(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._loop = None

    def _call(self, function: Function, batch: Batch, log: Log) -> list[Value]:
        def call_within(part: Batch, limit: float) -> list[Value]:
            try:
                with limited(limit):
                    return call(function, part, log)
            except OutOfTime:
                return [out_of_time(limit)] * len(part)

        values = call_within(batch, WHOLE * self._limit)
        if len(batch) == 1 or not _failed_as_a_whole(values):
            return values
        return in_waves(len(batch), 1, lambda rows: [call_within(batch.take([row]), self._limit)[0] for row in rows])

    async def _await_all(self, functions: Sequence[Function], batch: Batch, log: Log) -> Table:
        async def await_one(function: Function) -> list[Value]:
            values = await call_asynchronously(function, batch, log, WHOLE * self._limit)
            if len(batch) == 1 or not _failed_as_a_whole(values):
                return values
            return await _await_rows(function, batch, log, self._limit)

        return await asyncio.gather(*map(await_one, functions))

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in a loop of its own thread, as a notebook has a loop running in this one."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="rewards", daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


class InWorkers:
    """Rewards in processes of their own, which are ended at the limit of time."""

    def __init__(self, rewards: Sequence[Reward], notations: Sequence[str], limit: float, workers: int) -> None:
        self._rewards, self._limit = rewards, limit
        self._pool = WorkerPool(
            f"{__name__}:serve", workers, limit + _GRACE, wall_limit=limit + _GRACE, arguments=[list(notations), limit]
        )
        self._asynchronous: list[bool] = []

    def mistakes(self, columns: Sequence[str]) -> list[str]:
        try:
            (found,) = self._pool.map([{"columns": list(columns)}])
        except RuntimeError as error:
            return [f"the processes of the rewards do not start: {error}"]
        if found.failure:
            return [f"the processes of the rewards do not start: {found.detail}"]
        self._asynchronous = found.value["asynchronous"]
        return found.value["mistakes"]

    def score(self, batch: Batch, log: Log) -> Table:
        table: Table = [[] for _ in self._rewards]
        together = [index for index, asynchronous in enumerate(self._asynchronous) if asynchronous]
        apart = [index for index, asynchronous in enumerate(self._asynchronous) if not asynchronous]
        # Asynchronous rewards wait for all responses at once. If one of them blocks, they are called row by row.
        if together:
            (found,) = self._ask([(together, batch)], log)
            for index, values in zip(together, found, strict=True):
                table[index] = values
            if any(_is_late(values[0]) and _failed_as_a_whole(values) for values in found):
                apart += together
        for index in apart:
            table[index] = in_waves(
                len(batch),
                self._pool.workers,
                lambda rows, index=index: [
                    of_row[0][0] for of_row in self._ask([([index], batch.take([row])) for row in rows], log)
                ],
            )
        return table

    def close(self) -> None:
        self._pool.close()

    def _ask(self, calls: Sequence[tuple[list[int], Batch]], log: Log) -> list[Table]:
        """Return the tables of some calls, each of some rewards on a batch."""
        items = [{"rewards": rewards, "batch": vars(batch)} for rewards, batch in calls]
        tables: list[Table] = []
        for (rewards, batch), outcome in zip(calls, self._pool.map(items), strict=True):
            if outcome.failure:
                by_time = outcome.failure == "time limit"
                how = {"error": f"raised {outcome.detail}", "died": f"ended its process: {outcome.detail}"}
                failure = out_of_time(self._limit) if by_time else Failure(how[outcome.failure])
                tables.append([[failure] * len(batch) for _ in rewards])
                continue
            for name, value in outcome.value["logged"]:
                log(name, value)
            tables.append([[_from_json(value) for value in values] for values in outcome.value["table"]])
        return tables


def in_waves(count: int, first: int, try_rows: Callable[[Sequence[int]], list[Value]]) -> list[Value]:
    """Try rows in waves that grow by four, until all of a wave took too long; return what came of each row."""
    values: list[Value] = []
    for rows in _waves(count, first):
        values += try_rows(rows)
        if all(_is_late(values[row]) for row in rows):
            break
    return values + [_GIVEN_UP] * (count - len(values))


def _waves(count: int, first: int) -> Iterator[range]:
    start, size = 0, first
    while start < count:
        yield range(start, min(start + size, count))
        start, size = start + size, 4 * size


async def _await_rows(function: Function, batch: Batch, log: Log, limit: float) -> list[Value]:
    """Call an asynchronous function for all rows at once, each with a limit of its own."""
    calls = (call_asynchronously(function, batch.take([row]), log, limit) for row in range(len(batch)))
    return [values[0] for values in await asyncio.gather(*calls)]


def _is_late(value: Value) -> bool:
    return isinstance(value, Failure) and value.by_time


def _failed_as_a_whole(values: Sequence[Value]) -> bool:
    """Return whether a call raised, took too long, or returned no list of the right length."""
    return isinstance(values[0], Failure) and all(value is values[0] for value in values)


def _load(rewards: Sequence[Reward], columns: Sequence[str]) -> tuple[list[Function], list[str]]:
    functions, mistakes = [], []
    for reward in rewards:
        try:
            function = reward.load()
        except ValueError as error:
            mistakes.append(str(error))
            continue
        if mistake := mistake_of(function, columns):
            mistakes.append(f"{reward.words} {mistake}")
        functions.append(function)
    return functions, mistakes


# In a worker process


def serve(notations: Sequence[str], limit: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Load the rewards, and return the function that a worker runs on its items. Called in the workers' server."""
    rewards = parse_all(notations)
    functions, _ = _load(rewards, [])  # mistakes are told when the columns are known
    runners: list[asyncio.Runner] = []  # one at most, made in the worker

    def work(item: dict[str, Any]) -> dict[str, Any]:
        if "columns" in item:
            _, mistakes = _load(rewards, item["columns"])
            return {"mistakes": mistakes, "asynchronous": [is_asynchronous(function) for function in functions]}
        batch, logged = Batch(**item["batch"]), list[tuple[str, float]]()

        def log(name: str, value: float) -> None:
            logged.append((str(name), float(value)))

        chosen = [functions[index] for index in item["rewards"]]
        if is_asynchronous(chosen[0]):
            runners.extend([asyncio.Runner()] if not runners else [])

            async def await_all() -> Table:
                return await asyncio.gather(*(_await_rows(function, batch, log, limit) for function in chosen))

            table = runners[0].run(await_all())
        else:
            table = [call(function, batch, log) for function in chosen]
        return {"table": [[_to_json(value) for value in values] for values in table], "logged": logged}

    return work


def _to_json(value: Value) -> Any:
    return list(value) if isinstance(value, Failure) else value


def _from_json(value: Any) -> Value:
    return Failure(*value) if isinstance(value, list) else value
