"""Questions that all processes of a run answer together, so that none goes on, or waits, where another has stopped.

Answers travel through the coordination service of `jax.distributed`, where the collectives of
`jax.experimental.multihost_utils` would send them over the devices: a question can be asked from a thread while the
devices compute, compiles nothing, and has a time limit. A single process asks nobody.
"""

import collections
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import jax

# JAX offers no public access to the service's key-value store; Orbax takes this way as well.
from jax._src import distributed

T = TypeVar("T")

PATIENCE_SECONDS = 1800
"""Seconds to wait for another process: more than two processes may lie apart in reading or writing a checkpoint."""
_GRACE_SECONDS = 60
_made: collections.Counter[str] = collections.Counter()


def is_primary() -> bool:
    """Return whether this process is the first, which prints, scans and deletes for all."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Print a line, in the first process only."""
    if is_primary():
        print(text)


class Agreement:
    """A channel for questions that every process answers, one at a time and in the same order."""

    def __init__(self, about: str) -> None:
        """Open a channel.

        Args:
          about: the subject. The n-th channel about it in one process is connected to the n-th in the others.
        """
        self._name = f"rspo_jax/{about}/{_made[about]}"
        _made[about] += 1
        self._asked = 0

    def gather(self, answer: T | None) -> dict[int, T]:
        """Return the answers of all processes by process index, without those that are None.

        Raises:
          TimeoutError: in every process, if one of them does not answer.
        """
        if jax.process_count() == 1:
            return {} if answer is None else {0: answer}
        client: Any = distributed.global_state.client
        question, before = f"{self._name}/{self._asked}", f"{self._name}/{self._asked - 1}/"
        self._asked += 1
        client.key_value_set_bytes(f"{question}/{jax.process_index()}", _packed(answer))
        if is_primary():
            client.key_value_set_bytes(f"{question}/all", _packed(_collect(client, question)))
            client.key_value_delete(before)  # whoever answers this question has read the answers to that one
        answers = pickle.loads(_await(client, f"{question}/all", PATIENCE_SECONDS + _GRACE_SECONDS))
        if isinstance(answers, TimeoutError):
            raise answers
        return answers

    def from_primary(self, function: Callable[[], T]) -> T:
        """Call `function` in the first process only; return its result, or raise its error, in every process."""
        answer: tuple[T | None, Exception | None] | None = None
        if is_primary():
            try:
                answer = function(), None
            except Exception as error:
                answer = None, error
        shared = self.gather(answer)[0]
        result, error = shared if answer is None else answer
        if error is not None:
            raise error
        return result  # pyright: ignore[reportReturnType]

    def settle(self, error: Exception | None, severity: Callable[[Exception], int] = lambda _: 0) -> None:
        """Raise the same error in every process if any of them has met one.

        Args:
          error: the error that this process has met, if any.
          severity: rates an error. Of several, the most severe is raised; among equals, that of the first process.
        """
        met = self.gather(error)
        if not met:
            return
        worst = max(met, key=lambda process: (severity(met[process]), -process))
        if worst == jax.process_index() and error is not None:
            raise error
        met[worst].add_note(f"Met by process {worst}.")
        raise met[worst] from error


def _collect(client: Any, question: str) -> dict[int, Any] | TimeoutError:
    """Read the answer of every process, as process 0 does for all."""
    answers = {}
    for process in range(jax.process_count()):
        try:
            answer = pickle.loads(_await(client, f"{question}/{process}", PATIENCE_SECONDS))
        except TimeoutError:
            return TimeoutError(
                f"process {process} has not answered for {PATIENCE_SECONDS // 60} minutes: it has failed, or it runs "
                "a program other than that of process 0"
            )
        if answer is not None:
            answers[process] = answer
    return answers


def _await(client: Any, key: str, seconds: int) -> bytes:
    try:
        return client.blocking_key_value_get_bytes(key, seconds * 1000)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            raise TimeoutError(f"process 0 has not answered for {seconds // 60} minutes") from error
        raise


def _packed(answer: Any) -> bytes:
    """Pickle an answer; an error that cannot be pickled becomes a RuntimeError with its name and text."""
    try:
        packed = pickle.dumps(answer)
        pickle.loads(packed)
    except Exception:
        if isinstance(answer, Exception):
            return pickle.dumps(RuntimeError(f"{type(answer).__name__}: {answer}"))
        if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Exception):
            return pickle.dumps((None, RuntimeError(f"{type(answer[1]).__name__}: {answer[1]}")))
        raise
    return packed
