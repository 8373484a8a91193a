"""`python -m experiments.bench_verifier --data DIR`: how fast answers are judged, and how often rightly.

Throughput is that of the reference solutions of GSM8K and MATH-500. Pools of different sizes judge them in turn, each
with fresh processes so that no cache helps, and ratios are medians over neighbouring runs. What is counted: reference
solutions and answers that are judged right, as all should be, and answers of another problem that are, as none
should be. This file must never be needed by a run.
"""

import json
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import rich.console
import rich.table
import tyro

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
"""What the sets are called in the folder that the user names."""

Item = tuple[str, str, bool]


@dataclass(frozen=True)
class Benchmark:
    """Judge reference solutions, right answers and answers of other problems, and report counts and throughput."""

    data: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder with gsm8k_test, math500, aime24, amc23, minerva_math and olympiadbench, each a .jsonl."""
    workers: tuple[int, ...] = (1, 2)
    """Sizes of pools; ratios are to the first."""
    repeats: int = 3
    time_limit: float = 5.0


@dataclass
class Check:
    """What came of judging the items of one kind: `exceptions` has a line for each that was not as it should be."""

    name: str
    kind: str
    items: int
    exceptions: list[str] = field(default_factory=list)


def start_pool(workers: int, time_limit: float) -> WorkerPool:
    return WorkerPool("experiments.tasks.mathematics.verifier:judge", workers, time_limit, memory_limit=4 * 2**30)


def reference_items(data: Path, name: str) -> list[Item]:
    """The worked solutions as a task gives them to a warm start."""
    return [(problem.answer, problem.solution, True) for problem in read_problems(str(data / FILES[name]), name)]


def file_items(data: Path, name: str) -> list[Item]:
    """The solutions as the file has them, whose answers need no box."""
    problems = read_problems(str(data / FILES[name]), name)
    records = [json.loads(line) for line in (data / FILES[name]).read_text(encoding="utf-8").splitlines()]
    texts = [record[SETS[name].solution] for record in records]
    return [(problem.answer, text, False) for problem, text in zip(problems, texts, strict=True)]


def own_items(problems: Sequence[Problem]) -> list[Item]:
    return [(problem.answer, f"It is $\\boxed{{{problem.answer}}}$.", True) for problem in problems]


def foreign_items(problems: Sequence[Problem]) -> Iterator[Item]:
    """Each problem with the answer of the next one, in a circle, whose answer has another text and another value."""
    for index, problem in enumerate(problems):
        for other in (*problems[index + 1 :], *problems[:index]):
            if other.answer != problem.answer and plain_value(other.answer) != plain_value(problem.answer):
                yield problem.answer, f"It is $\\boxed{{{other.answer}}}$.", True
                break


def plain_value(answer: str) -> Fraction | str:
    """The value of a number or a fraction of two, otherwise the text without what changes no meaning.

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


def check(pool: WorkerPool, name: str, kind: str, items: Sequence[Item], right: bool) -> Check:
    """Judges items of which all should be right, or none."""
    result = Check(name, kind, len(items))
    for (answer, response, _), outcome in zip(items, pool.map(items), strict=True):
        if outcome.failure:
            if right:  # a failure counts as wrong
                result.exceptions.append(f"{answer}: {outcome.failure} ({outcome.detail})")
        elif outcome.value["correct"] != right:
            result.exceptions.append(f"{answer}: judged {'wrong' if right else 'right'}: …{response[-80:]}")
    return result


def checks_of(pool: WorkerPool, data: Path, name: str) -> list[Check]:
    """Everything that is counted of one set."""
    problems = read_problems(str(data / FILES[name]), name)
    results = [
        check(pool, name, "answers, right against themselves", own_items(problems), True),
        check(pool, name, "reference solutions, right", reference_items(data, name), True),
        check(pool, name, "answers of another problem, wrong", list(foreign_items(problems)), False),
    ]
    if name == "gsm8k":
        results.append(check(pool, name, "reference solutions as in the file, right", file_items(data, name), True))
    return results


def text_answers(data: Path, name: str) -> list[str]:
    """Answers that math-verify cannot read, so that nothing but the same text is right."""
    from experiments.tasks.mathematics import verifier  # SymPy, for this process

    problems = read_problems(str(data / FILES[name]), name)
    return [problem.answer for problem in problems if not verifier.is_readable(problem.answer)]


def seconds_of(items: Sequence[Item], workers: int, time_limit: float) -> float:
    """Wall time of judging the items with processes that have started and seen nothing yet."""
    with start_pool(workers, time_limit) as pool:
        pool.map([("1", "\\boxed{2}", True)] * 8 * workers)
        start = time.perf_counter()
        pool.map(items)
        return time.perf_counter() - start


def throughput(benchmark: Benchmark) -> rich.table.Table:
    items = [item for name in ("gsm8k", "math500") for item in reference_items(benchmark.data, name)]
    seconds: dict[int, list[float]] = {workers: [] for workers in benchmark.workers}
    for _ in range(benchmark.repeats):
        for workers, times in seconds.items():
            times.append(seconds_of(items, workers, benchmark.time_limit))
    table = rich.table.Table(title=f"{len(items)} reference solutions of GSM8K and MATH-500")
    for column in ("workers", "verdicts a second", "ratio", "range of ratios"):
        table.add_column(column, justify="right")
    first = seconds[benchmark.workers[0]]
    for workers, times in seconds.items():
        ratios = [base / own for base, own in zip(first, times, strict=True)]
        rate = len(items) / statistics.median(times)
        spread = f"{min(ratios):.2f} – {max(ratios):.2f}"
        table.add_row(str(workers), f"{rate:.0f}", f"{statistics.median(ratios):.2f}", spread)
    return table


def main(arguments: list[str] | None = None) -> int:
    benchmark = tyro.cli(Benchmark, args=arguments, prog="python -m experiments.bench_verifier")
    if benchmark.repeats < 1 or not benchmark.workers or min(benchmark.workers) < 1:
        raise ValueError("repeats and workers must be at least 1")
    console = rich.console.Console()
    console.width = max(console.width, 110)
    table = rich.table.Table(title="verdicts")
    for column in ("set", "what, and what it should be", "it is", "of"):
        table.add_column(column, justify="right" if column in ("it is", "of") else "left")
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
