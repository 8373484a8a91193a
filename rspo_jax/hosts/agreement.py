"""How the processes of one run come to one answer, so that none goes on, or waits, where another has stopped.

Words travel through the coordination service of `jax.distributed` and not over the devices: a question can be asked
from a thread while the devices compute, compiles nothing, and has a time limit. A single process talks to nobody.
This file must never know what is being decided.
"""

import collections
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import jax

# The only door to the service's key-value store; Orbax and jax.experimental.multihost_utils use it as well.
from jax._src import distributed

T = TypeVar("T")

PATIENCE_SECONDS = 1800
"""How long a process waits for the others: longer than they may lie apart in reading or writing a checkpoint."""
_GRACE_SECONDS = 60
_made: collections.Counter[str] = collections.Counter()


def is_primary() -> bool:
    """Whether this process is the one that speaks, scans and deletes for all."""
    return jax.process_index() == 0


class Agreement:
    """A line of questions that all processes answer, each of them, in the same order, one at a time."""

    def __init__(self, about: str) -> None:
        """Opens a line.

        Args:
          about: what is asked; the n-th line about it in one process belongs to the n-th in the others.
        """
        self._name = f"rspo_jax/{about}/{_made[about]}"
        _made[about] += 1
        self._asked = 0

    def gather(self, word: T | None) -> dict[int, T]:
        """What the processes have to say, by their indices; those that say None are left out.

        Raises:
          TimeoutError: in every process, if one of them does not answer.
        """
        if jax.process_count() == 1:
            return {} if word is None else {0: word}
        client: Any = distributed.global_state.client
        question, before = f"{self._name}/{self._asked}", f"{self._name}/{self._asked - 1}/"
        self._asked += 1
        client.key_value_set_bytes(f"{question}/{jax.process_index()}", _packed(word))
        if is_primary():
            client.key_value_set_bytes(f"{question}/all", _packed(_collect(client, question)))
            client.key_value_delete(before)  # by answering this question, all have said that they read that one
        words = pickle.loads(_await(client, f"{question}/all", PATIENCE_SECONDS + _GRACE_SECONDS))
        if isinstance(words, TimeoutError):
            raise words
        return words

    def from_primary(self, function: Callable[[], T]) -> T:
        """Calls `function` in the primary process only; its result, or the error that it raised, in every process."""
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
        """Passes in every process if none met an error, and raises one and the same in every process otherwise.

        Args:
          error: what this process met.
          severity: of several errors, that with the highest is raised; among equals, that of the first process.
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
    words = {}
    for process in range(jax.process_count()):
        try:
            word = pickle.loads(_await(client, f"{question}/{process}", PATIENCE_SECONDS))
        except TimeoutError:
            return TimeoutError(
                f"process {process} has not answered for {PATIENCE_SECONDS // 60} minutes: it has failed, or it runs "
                "another program than process 0"
            )
        if word is not None:
            words[process] = word
    return words


def _await(client: Any, key: str, seconds: int) -> bytes:
    try:
        return client.blocking_key_value_get_bytes(key, seconds * 1000)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            raise TimeoutError(f"process 0 has not answered for {seconds // 60} minutes") from error
        raise


def _packed(word: Any) -> bytes:
    """Bytes that any process can read; an error that does not survive the way becomes one that does."""
    try:
        packed = pickle.dumps(word)
        pickle.loads(packed)
    except Exception:
        if isinstance(word, Exception):
            return pickle.dumps(RuntimeError(f"{type(word).__name__}: {word}"))
        if isinstance(word, tuple) and len(word) == 2 and isinstance(word[1], Exception):
            return pickle.dumps((None, RuntimeError(f"{type(word[1]).__name__}: {word[1]}")))
        raise
    return packed
