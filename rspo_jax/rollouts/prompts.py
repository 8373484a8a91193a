"""Problems as the device sees them: which ones a run uses, which ones a step gets, and their prompts as tokens.

Text becomes tokens here, and only here; every process encodes the rows that lie on its own devices.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rspo_jax.rollouts.sampler import pad_prompts
from rspo_jax.sharding import from_own, own_rows
from rspo_jax.types import Array, ProblemStream, Task

SPLITS = ("train", "validation", "test")
_MOST_SKIPPED = 1000
"""Problems of a stream in a row that may be skipped."""


class Taken(NamedTuple):
    """Problems that were taken from a split."""

    problems: list[Any]
    cursor: int
    """The position at which the next ones are taken."""


class UsableProblems(NamedTuple):
    """The problems of a split whose prompts are short enough."""

    problems: Sequence[Any]
    """The problems, in their original order."""
    width: int
    """Length of the longest prompt among them, in tokens."""
    dropped: int
    """Number of problems left out."""

    def take(self, seed: tuple[int, ...], cursor: int, size: int) -> Taken:
        """Take problems at `cursor` of an endless stream of shuffled epochs, which a seed names (`take`)."""
        rows = take(len(self.problems), seed, cursor, size)
        return Taken([self.problems[row] for row in rows], cursor + size)


class UsableStream(NamedTuple):
    """An endless stream of training problems, of which a run skips those that do not fit.

    Positions count what was skipped as well, so that seed and cursor alone say which problems come next.
    """

    task: Task
    stream: ProblemStream
    width: int
    """The longest prompt in tokens; problems with longer ones are skipped."""
    check: Callable[[Any], None] | None = None
    """Raises ValueError for a problem to skip, because its worked solution does not fit. None: all fit."""

    def take(self, seed: tuple[int, ...], cursor: int, size: int) -> Taken:
        """Take the next problems that fit.

        Args:
          seed: names the stream.
          cursor: the position to begin at.
          size: number of problems.

        Raises:
          ValueError: if hardly any problem fits.
        """
        taken, skipped = [], 0
        while len(taken) < size:
            positions = range(cursor, cursor + size - len(taken))
            found = [problem for problem in self.stream.draw(seed, positions) if self._fits(problem)]
            taken, cursor = taken + found, positions.stop
            skipped = 0 if found else skipped + len(positions)
            if skipped >= _MOST_SKIPPED:
                limits = f"max_prompt_tokens, {self.width}"
                limits += ", or no worked solution within the limits of responses" if self.check else ""
                raise ValueError(
                    f"{skipped} problems in a row were skipped, because they are held out or have no prompt of at most "
                    f"{limits}: raise the limits, or widen the range of the problems"
                )
        return Taken(taken, cursor)

    def _fits(self, problem: Any) -> bool:
        if problem is None or len(self.task.tokenizer.encode(self.task.prompt(problem))) > self.width:
            return False
        try:
            if self.check is not None:
                self.check(problem)
        except ValueError:
            return False
        return True


class Problems(NamedTuple):
    """A task with all the problems that a run uses."""

    task: Task
    train: UsableProblems | UsableStream
    held_out: dict[str, UsableProblems]
    """"validation" and "test" -> their usable problems."""

    @property
    def width(self) -> int:
        """Tokens that every prompt is padded to: one width for a whole run, so that it compiles once."""
        return max(split.width for split in (self.train, *self.held_out.values()))


class Prompts(NamedTuple):
    """Left-padded prompts on the device."""

    tokens: Array
    """int32 [B, P]."""
    mask: Array
    """bool [B, P]."""


def load_problems(task: Task, max_prompt_tokens: int | None = None) -> Problems:
    """Read every split of a task and leave out the problems whose prompts are too long.

    The problems of a stream are made as the run takes them. All others are encoded once to know their lengths, which
    takes minutes on a large data set: load the problems once and hand them on.

    Args:
      task: the source of the problems.
      max_prompt_tokens: the limit; None for no limit, which a stream of problems does not allow.

    Raises:
      ValueError: if nothing is left of a split, or there is no limit for the prompts of a stream.
    """
    train = task.problems("train")
    if not isinstance(train, ProblemStream):
        usable = usable_problems(task, train, max_prompt_tokens)
    elif max_prompt_tokens is None:
        raise ValueError(
            f"the training problems of {type(task).__name__} are an endless stream, of which nobody knows the longest "
            "prompt: set max_prompt_tokens"
        )
    else:
        usable = UsableStream(task, train, max_prompt_tokens)
    held_out = {split: usable_problems(task, task.problems(split), max_prompt_tokens) for split in SPLITS[1:]}
    return Problems(task, usable, held_out)


def usable_problems(
    task: Task, problems: Sequence[Any] | ProblemStream, max_prompt_tokens: int | None = None
) -> UsableProblems:
    """Leave out the problems whose prompts are too long. A prompt is never cut, because its end asks the question.

    Raises:
      ValueError: if nothing is left, or the problems are an endless stream.
    """
    if isinstance(problems, ProblemStream):
        raise ValueError(
            f"these problems of {type(task).__name__} are an endless stream, of which there is no first to last: "
            "choose the split validation or test"
        )
    lengths = [len(task.tokenizer.encode(task.prompt(problem))) for problem in problems]
    if not lengths:
        raise ValueError(f"{type(task).__name__} has no problems in this split")
    longest = max(lengths) if max_prompt_tokens is None else max_prompt_tokens
    kept = [length for length in lengths if length <= longest]
    if not kept:
        raise ValueError(
            f"none of {len(lengths)} problems has a prompt of at most max_prompt_tokens, {longest}: "
            f"raise it to {min(lengths)} or more, the length of the shortest"
        )
    if len(kept) < len(lengths):
        problems = [problem for problem, length in zip(problems, lengths, strict=True) if length <= longest]
    return UsableProblems(problems, max(kept), len(lengths) - len(kept))


@functools.lru_cache(maxsize=4)
def _permutation(count: int, seed: tuple[int, ...], epoch: int) -> np.ndarray:
    return np.random.default_rng([*seed, epoch]).permutation(count)


def take(count: int, seed: tuple[int, ...], cursor: int, size: int) -> list[int]:
    """Return positions cursor … cursor + size − 1 of an endless stream of shuffled epochs.

    The stream is a pure function of seed and cursor, so a run that resumes goes on with the very next problem.

    Args:
      count: size of the data set; each epoch visits every index once, in an order of its own.
      seed: names the stream.
      cursor: number of indices taken before.
      size: number of indices to take.

    Returns:
      `size` indices in [0, count).
    """
    positions = range(cursor, cursor + size)
    return [int(_permutation(count, seed, position // count)[position % count]) for position in positions]


def encode_prompts(task: Task, problems: Sequence[Any], width: int, repeats: int = 1) -> Prompts:
    """Encode each problem's prompt into `repeats` consecutive rows; each process encodes its own rows.

    Args:
      task: writes the prompt of a problem.
      problems: one for every `repeats` rows.
      width: P, the tokens that prompts are padded to.
      repeats: responses to be drawn for each problem.
    """
    count = len(problems) * repeats
    rows = own_rows(count)
    own, copies = np.unique(rows // repeats, return_counts=True)
    encoded = [task.tokenizer.encode(task.prompt(problems[index])) for index in own]
    # The global arrays, of which this process fills in the rows on its own devices.
    arrays = []
    for values in pad_prompts(encoded, width, task.tokenizer.pad_id):
        whole = np.zeros((count, width), values.dtype)
        whole[rows] = np.repeat(values, copies, axis=0)
        arrays.append(from_own(whole, "rows", None))
    return Prompts(*arrays)
