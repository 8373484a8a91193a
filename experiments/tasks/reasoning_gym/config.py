"""The settings of a reasoning-gym task: its data sets, their weights and difficulty, and the judge's limits.

Nothing here needs the library. Whether data sets and options exist is checked where the library is, in
`experiments.tasks.reasoning_gym.library`.
"""

import ast
import dataclasses
import importlib.metadata
import math
import os
from typing import Any, NamedTuple

DISTRIBUTION = "reasoning-gym"
FORMS = "level=1, NAME.level=1, NAME.ATTRIBUTE.level=1 or NAME.OPTION=VALUE"
"""The forms of an entry of `difficulty`."""
_RESERVED = {
    "seed": "the seed of all data sets is task.seed",
    "size": "a run draws as many problems as it needs; task.validation and task.test set the sizes of the other splits",
}


class DataSet(NamedTuple):
    """A data set of the mixture, with its difficulty. A JSON value for the processes that hold the library."""

    name: str
    weight: float
    level: int | None
    """Level of all attributes of its curriculum; None for the defaults of the library's config."""
    levels: dict[str, int]
    """Attribute of its curriculum -> level."""
    options: dict[str, Any]
    """Option of its config -> value."""


def installed_version() -> str:
    """Return the version of the library that is installed; empty if it is not."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return ""


@dataclasses.dataclass(frozen=True)
class ReasoningGymConfig:
    """The settings of a reasoning-gym task: data sets, difficulty, prompts and the judge's limits.

    Attributes:
        datasets: data sets of reasoning-gym as NAME or NAME:WEIGHT. A problem is drawn from each as often as its
            weight says; without one it is 1.
        difficulty: level=1 sets every attribute of every data set's curriculum to this level, NAME.level=1 those of
            one data set, NAME.ATTRIBUTE.level=1 a single one; NAME.OPTION=VALUE sets an option of a data set's config,
            such as chain_sum.max_terms=4.
        seed: determines the problems of all splits.
        validation: number of problems in the split "validation", shared out by weight.
        test: number of problems in the split "test", shared out by weight.
        system: the system message of a chat model: the name of one of the library's (default, simple, direct,
            DeepSeekZero, chain_of_draft), or a text of your own; none if empty.
        answer_tags: if True, the answer is what stands between the last <answer> and </answer> of a response, and a
            response without them is wrong; if False, all of the response is. When absent: True for a chat model.
        correct_at: the score from which a response counts as solved. The reward is the score itself.
        time_limit: seconds of CPU time for making a problem, and for scoring a response.
        wall_limit: seconds of wall time for it, larger, so that a busy host fails nothing that is quick.
        workers: number of processes that make problems and score responses. None: as many as cores, at most 16.
        memory_limit: GiB of address space of each of these processes.
        version: the version of reasoning-gym that the run began with; the installed one when absent. Another version
            makes other problems, so a run goes on with its own only.
    """

    datasets: tuple[str, ...] = ()
    difficulty: tuple[str, ...] = ()
    seed: int = 0
    validation: int = 200
    test: int = 500
    system: str = "default"
    answer_tags: bool | None = None
    correct_at: float = 1.0
    time_limit: float = 20.0
    wall_limit: float = 120.0
    workers: int | None = None
    memory_limit: float = 4.0
    version: str = dataclasses.field(default_factory=installed_version)

    def check(self) -> None:
        """Refuse settings that are impossible whatever the library holds.

        Raises:
            ValueError: with a sentence for every mistake.
        """
        mistakes = []
        if not installed_version():
            mistakes.append(
                f"the task reasoning_gym needs {DISTRIBUTION}, which the extra of this name brings (a part of it needs "
                f"a C compiler): pip install 'rspo-jax[{DISTRIBUTION}]'"
            )
        elif self.version != installed_version():
            mistakes.append(
                f"this run draws its problems from reasoning-gym {self.version or '(none)'}, but version "
                f"{installed_version()} is installed, which makes others: pip install {DISTRIBUTION}=={self.version}, "
                "or start a new run"
            )
        try:
            self.data_sets()
        except ValueError as error:
            mistakes.append(str(error))
        for field, least in (("validation", 1), ("test", 1), ("seed", 0)):
            if getattr(self, field) < least:
                mistakes.append(f"task.{field} is {getattr(self, field)}; set it to {least} or more")
        for field in ("time_limit", "wall_limit", "memory_limit", "correct_at"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                mistakes.append(f"task.{field} is {value}; set it to a number above 0")
        if self.wall_limit < self.time_limit:
            mistakes.append(f"task.wall_limit ({self.wall_limit}) is below task.time_limit ({self.time_limit})")
        if self.workers is not None and self.workers < 1:
            mistakes.append(f"task.workers is {self.workers}; set it to 1 or more, or leave it out")
        if mistakes:
            raise ValueError("; ".join(mistakes))

    def data_sets(self) -> list[DataSet]:
        """Return the data sets with their weights and difficulty, as the flags name them.

        Raises:
            ValueError: with a sentence for every entry that has none of the forms or stands twice.
        """
        weights, mistakes = _weights(self.datasets)
        of_all, found = None, {name: DataSet(name, weight, None, {}, {}) for name, weight in weights.items()}
        for entry in self.difficulty:
            key, equals, text = entry.partition("=")
            name, *path = key.split(".")
            value, mistake = _value(text), None
            is_level = key.split(".")[-1] == "level"
            if not equals or len(path) > 2 or (len(path) != 1 and not is_level):
                mistake = f"has none of the forms {FORMS}"
            elif is_level and not (type(value) is int and value >= 0):
                mistake = "sets a level, which is a whole number from 0 on"
            elif path and name not in found:
                mistake = f"is for {name}, which is not among task.datasets"
            elif path and not is_level and path[0] in _RESERVED:
                mistake = f"sets no difficulty: {_RESERVED[path[0]]}"
            if mistake is not None:
                mistakes.append(f"task.difficulty {entry!r} {mistake}")
            elif not path:
                of_all = value
            elif path == ["level"]:
                found[name] = found[name]._replace(level=value)
            else:
                (found[name].levels if is_level else found[name].options)[path[0]] = value
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return [one if one.level is not None else one._replace(level=of_all) for one in found.values()]

    def worker_count(self) -> int:
        """Return the number of processes that make problems and score responses."""
        if self.workers is not None:
            return self.workers
        affinity = getattr(os, "sched_getaffinity", None)
        return min(16, len(affinity(0)) if affinity else os.cpu_count() or 1)


def _weights(entries: tuple[str, ...]) -> tuple[dict[str, float], list[str]]:
    """Read NAME or NAME:WEIGHT; return the weights by name, and the mistakes."""
    weights: dict[str, float] = {}
    mistakes = (
        []
        if entries
        else [
            "name the data sets with task.datasets (--datasets of an evaluation), such as chain_sum:0.5 countdown:0.5"
        ]
    )
    for entry in entries:
        name, colon, text = entry.partition(":")
        try:
            weight = float(text) if colon else 1.0
        except ValueError:
            weight = math.nan
        if not name or not (math.isfinite(weight) and weight > 0):
            mistakes.append(f"task.datasets {entry!r} is not NAME or NAME:WEIGHT with a weight above 0")
        elif name in weights:
            mistakes.append(f"task.datasets names {name} twice")
        weights[name] = weight
    return weights, mistakes


def _value(text: str) -> Any:
    """Read the value of an option: a literal of Python, true, false or null as JSON has them, or else the text."""
    try:
        return ast.literal_eval({"true": "True", "false": "False", "null": "None"}.get(text, text))
    except (ValueError, SyntaxError):
        return text
