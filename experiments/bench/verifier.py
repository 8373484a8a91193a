"""Speed of the judge of mathematics, and its mistakes (`python -m experiments.bench_verifier --data DIR`).

Throughput is that of the reference solutions of GSM8K and MATH-500. Pools of different sizes take turns, each with
fresh processes so that no cache helps; the figure is the median of the ratios of runs in the same turn. Mistakes are
reference solutions and correct answers that are judged wrong, and answers to another problem that are judged right.
"""

import functools
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import rich.console
import rich.table
import tyro

from experiments.bench import timing
from experiments.tasks.mathematics.problems import SETS, Problem, read_problems
from experiments.tasks.pool import WorkerPool

FILES = {
    "gsm8k": "gsm8k_test.jsonl",
    "math500": "math500.jsonl",
    "aime24": "aime24.jsonl",
    "amc23": "amc23.jsonl",
    "minerva": "minerva_math.jsonl",
    "olympiadbench": "olympiadbench.jsonl",
}
"""Set -> its file in the folder that the user names."""

Item = tuple[str, str, bool]
"""Reference answer, response, and True if the response must box its answer: the arguments of the judge."""


@dataclass(frozen=True)
class VerifierBenchmark:
    """Judge reference solutions, right answers and answers of other problems, and report counts and throughput."""

    data: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder with gsm8k_test, math500, aime24, amc23, minerva_math and olympiadbench, each a .jsonl."""
    workers: tuple[int, ...] = (1, 2)
    """Sizes of pools; ratios are to the first."""
    repeats: int = 3
    time_limit: float = 5.0
    """Seconds for one verdict."""


@dataclass
class Check:
    """The outcome of judging the items of one kind."""

    name: str
    kind: str
    items: int
    exceptions: list[str] = field(default_factory=list)
    """A line for each item that was not judged as it should be."""


def start_pool(workers: int, time_limit: float) -> WorkerPool:
    """Start processes that judge mathematics, each with 4 GiB of memory."""
    return WorkerPool("experiments.tasks.mathematics.verifier:judge", workers, time_limit, memory_limit=4 * 2**30)


def reference_items(data: Path, name: str) -> list[Item]:
    """Return the worked solutions in the form that a task gives to a warm start."""
    return [(problem.answer, problem.solution, True) for problem in read_problems(str(data / FILES[name]), SETS[name])]


def foreign_items(problems: Sequence[Problem]) -> Iterator[Item]:
    """Yield each problem with the answer of the next one, in a circle, that differs from its own in text and value."""
    for index, problem in enumerate(problems):
        for other in (*problems[index + 1 :], *problems[:index]):
            if other.answer != problem.answer and plain_value(other.answer) != plain_value(problem.answer):
                yield problem.answer, f"It is $\\boxed{{{other.answer}}}$.", True
                break


def plain_value(answer: str) -> Fraction | str:
    """Return the value of a number or a fraction, otherwise the text without marks that change no meaning.

    It decides which answers differ, and shares no code with the verifier.
    """
    text = re.sub(r"^[a-zA-Z](?:\([a-zA-Z]\))?\s*=", "", answer)
    text = re.sub(r"\\left|\\right|\\\$|\s|(?<=\d),(?:\\!)?(?=\d{3})|\^\\circ|\^\{\\circ\}", "", text).replace(
        "dfrac", "frac"
    )
    fraction = re.fullmatch(r"(-?)\\frac\{?(\d+?)\}?\{?(\d+)\}?", text)
    if fraction:
        text = f"{fraction[1]}{fraction[2]}/{fraction[3]}"
    try:
        return Fraction(text)
    except ValueError:
        return text


def judge_items(pool: WorkerPool, name: str, kind: str, items: Sequence[Item], right: bool) -> Check:
    """Judge items that should all be right (`right`), or all be wrong."""
    result = Check(name, kind, len(items))
    for (answer, response, _), outcome in zip(items, pool.map(items), strict=True):
        if outcome.failure:
            if right:  # a failure counts as wrong
                result.exceptions.append(f"{answer}: {outcome.failure} ({outcome.detail})")
        elif outcome.value["correct"] != right:
            result.exceptions.append(f"{answer}: judged {'wrong' if right else 'right'}: …{response[-80:]}")
    return result


def checks_of(pool: WorkerPool, data: Path, name: str) -> list[Check]:
    """Judge a set in every way that is counted."""
    problems = read_problems(str(data / FILES[name]), SETS[name])
    own_items = [(problem.answer, f"It is $\\boxed{{{problem.answer}}}$.", True) for problem in problems]
    results = [
        judge_items(pool, name, "answers, right against themselves", own_items, True),
        judge_items(pool, name, "reference solutions, right", reference_items(data, name), True),
        judge_items(pool, name, "answers of another problem, wrong", list(foreign_items(problems)), False),
    ]
    if name == "gsm8k":
        # Once more as the file has them: their answers need no box.
        records = [json.loads(line) for line in (data / FILES[name]).read_text(encoding="utf-8").splitlines()]
        texts = [record[SETS[name].solution] for record in records]
        items = [(problem.answer, text, False) for problem, text in zip(problems, texts, strict=True)]
        results.append(judge_items(pool, name, "reference solutions as in the file, right", items, True))
    return results


def text_answers(data: Path, name: str) -> list[str]:
    """Return the answers that the judge cannot read, so that nothing but the same text is right."""
    from experiments.tasks.mathematics import verifier  # imports mpmath, into this process too

    problems = read_problems(str(data / FILES[name]), SETS[name])
    return [problem.answer for problem in problems if not verifier.is_readable(problem.answer)]


def seconds_of(items: Sequence[Item], workers: int, time_limit: float) -> float:
    """Return the wall time of judging the items by processes that have started and judged none of them before."""
    with start_pool(workers, time_limit) as pool:
        pool.map([("1", "\\boxed{2}", True)] * 8 * workers)
        start = time.perf_counter()
        pool.map(items)
        return time.perf_counter() - start


def throughput(benchmark: VerifierBenchmark) -> rich.table.Table:
    """Time pools of every size, and return a table of their verdicts a second."""
    items = [item for name in ("gsm8k", "math500") for item in reference_items(benchmark.data, name)]
    measurements = {
        str(workers): functools.partial(seconds_of, items, workers, benchmark.time_limit)
        for workers in benchmark.workers
    }
    seconds = timing.take_turns(measurements, benchmark.repeats)
    table = rich.table.Table(title=f"{len(items)} reference solutions of GSM8K and MATH-500")
    for column in ("workers", "verdicts a second", "ratio", "quartiles"):
        table.add_column(column, justify="right")
    first = seconds[str(benchmark.workers[0])]
    for workers, times in seconds.items():
        speedups = timing.quartiles(timing.paired_ratios(first, times))
        rate = len(items) / timing.quartiles(times).median
        table.add_row(workers, f"{rate:.0f}", f"{speedups.median:.2f}", speedups.range())
    return table


def main(arguments: list[str] | None = None) -> int:
    """Print the verdicts, every exception and the throughput, and return the exit code."""
    benchmark = tyro.cli(VerifierBenchmark, args=arguments, prog="python -m experiments.bench_verifier")
    if benchmark.repeats < 1 or not benchmark.workers or min(benchmark.workers) < 1:
        raise ValueError("repeats and workers must be at least 1")
    console = rich.console.Console()
    console.width = max(console.width, 110)
    table = rich.table.Table(title="verdicts")
    for column in ("set", "items, and their right verdict", "so judged", "of"):
        table.add_column(column, justify="right" if column in ("so judged", "of") else "left")
    exceptions = []
    with start_pool(max(benchmark.workers), benchmark.time_limit) as pool:
        for name in FILES:
            for result in checks_of(pool, benchmark.data, name):
                table.add_row(name, result.kind, str(result.items - len(result.exceptions)), str(result.items))
                exceptions += [f"{name}, {result.kind}: {line}" for line in result.exceptions]
            exceptions += [f"{name}, compared as text: {answer}" for answer in text_answers(benchmark.data, name)]
        console.print(table)
        console.print("pool:", ", ".join(f"{name} {count}" for name, count in pool.counts().items()), markup=False)
    for line in exceptions:
        console.print("exception:", line, markup=False, highlight=False)
    console.print(throughput(benchmark))
    return 0
