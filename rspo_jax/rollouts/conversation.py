"""Conversations: the model and a task's environment take turns, and the model learns from its own tokens alone.

A conversation is token ids. The ids that the model drew are kept as they are; the environment's text is tokenised by
itself and appended. Both are in the context of what follows, and only the model's are in the mask. All turns of a
conversation are one response of a `RolloutBatch`, and so are scored in one forward pass:

    tokens        prompt | 3  stop |  l  o  w  e  r |  2  stop
    segment_ids   1 … 1  | 1  1    |  1  1  1  1  1 |  1  1
    mask          0 … 0  | 1  1    |  0  0  0  0  0 |  1  1

The first turn is drawn like any response. Then the host reads each turn and asks the environment, and the device draws
the next turn of the conversations that go on, with all that was said so far as their prompts, padded to one width: one
more program for all later turns. Each turn reads its conversation again from the beginning.

A conversation ends
  * when the environment has nothing more to say, or has an answer to the last turn that `max_turns` allows: it is
    judged as it is;
  * when a turn is cut off at `sampler.max_new_tokens`, or at `max_tokens` of the conversation, before it has stopped;
    or when the environment's answer leaves the model no token to draw, and is then left out: it is truncated, and
    worth what a truncated response is worth.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rspo_jax.rollouts.prompts import Prompts, UsableProblems, UsableStream
from rspo_jax.rollouts.reading import read_response
from rspo_jax.rollouts.sampler import SamplerConfig, generate
from rspo_jax.sharding import fetch, fetch_own, from_own, own_rows
from rspo_jax.types import Array, Conversation, ConversationTask, DemonstrationTask, Params, Policy, Samples, Task

_LATER_TURNS = 0x7475726E
"""Folded, with the turn, into the keys of later turns; far from the numbers of tokens that are folded into a key."""


@dataclass(frozen=True)
class ConversationConfig:
    """Limits of the conversations of a task of several turns."""

    max_turns: int = 5
    """Turns of the model. A conversation that has had them is judged as it is."""
    max_tokens: int | None = None
    """Tokens of a conversation after its prompt, the environment's included; max_turns times sampler.max_new_tokens
    when absent. A conversation that reaches them is truncated. (sampler.max_new_tokens is the limit of one turn.)"""

    def __post_init__(self) -> None:
        for name in ("max_turns", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"conversation.{name} must be at least 1, got {value}")


class Limits(NamedTuple):
    """Limits of a conversation. A task without an environment has conversations of one turn."""

    turns: int
    """Turns of the model."""
    tokens: int
    """Tokens after the prompt: the response columns of a rollout."""


def limits_of(task: Task, sampler: SamplerConfig, config: ConversationConfig) -> Limits:
    """Return the limits of a task's conversations.

    Raises:
      ValueError: if the limits do not fit together, or are set for a task without an environment.
    """
    if not isinstance(task, ConversationTask):
        if hasattr(task, "respond"):
            missing = [
                name
                for name in ("tokenizer", "problems", "prompt", "solution", "judge")
                if getattr(task, name, None) is None
            ]
            raise ValueError(
                f"{type(task).__name__} answers in turns, but is no task yet: it lacks {', '.join(missing)}"
            )
        if config != ConversationConfig():
            raise ValueError(
                f"{type(task).__name__} has no environment that answers (a method respond), so its responses are of "
                "one turn: leave conversation.max_turns and conversation.max_tokens out"
            )
        return Limits(1, sampler.max_new_tokens)
    tokens = config.max_turns * sampler.max_new_tokens if config.max_tokens is None else config.max_tokens
    if tokens < sampler.max_new_tokens:
        raise ValueError(
            f"conversation.max_tokens is {tokens}, but one turn alone may have {sampler.max_new_tokens} "
            "(sampler.max_new_tokens): raise the one or lower the other"
        )
    return Limits(config.max_turns, tokens)


class FirstTurns(NamedTuple):
    """Conversations of which the device is drawing the first turns."""

    prompts: Prompts
    """B rows."""
    keys: Array
    """PRNG keys [B], those of the first turns."""
    chunks: list[Samples]
    """From `rspo_jax.rollouts.sample_in_chunks`, equally long."""


class Talk(NamedTuple):
    """A conversation that has ended."""

    turns: Conversation
    """The texts of the turns."""
    token_ids: list[int]
    """All tokens after the prompt, the environment's included."""
    length: int
    """Tokens that the model drew."""
    stopped: bool
    """False if the conversation was truncated."""
    turn_limited: bool
    """True if the limit of turns has ended it, though the environment had more to say."""
    token_limited: bool
    """True if the limit of its tokens has truncated it."""


class Conversations(NamedTuple):
    """A chunk of conversations that have ended."""

    samples: Samples
    """Their tokens, R being the limit of tokens."""
    talks: dict[int, Talk]
    """Row of the chunk -> its conversation, for the rows of this process that have a problem."""


def converse(
    policy: Policy,
    params: Params,
    task: ConversationTask,
    problems: Sequence[Any],
    first: FirstTurns,
    sampler: SamplerConfig,
    limits: Limits,
) -> Iterator[Conversations]:
    """Go on with conversations to their ends, and yield them chunk by chunk, in order.

    While the host reads the turns of one chunk and asks the environment, the device draws those of the others. Each
    process converses on the rows of its own devices. The keys of a conversation depend on its first key and the turn
    alone, so neither the chunks nor the other rows change what is said.

    Args:
      policy: the model.
      params: the parameters that draw the first turns.
      task: its environment answers.
      problems: one a row. Rows beyond them, which only fill up the last chunk, end with their first turns.
      first: the first turns. The route of all turns is recorded if theirs is.
      sampler: draws a turn. Later turns have a slot for each row of a chunk.
      limits: from `limits_of`.

    Raises:
      ValueError: if the environment answers with anything but a text or None.
    """
    rows = first.chunks[0].tokens.shape[0]
    chunks = []
    for index, samples in enumerate(first.chunks):
        own = slice(index * rows, (index + 1) * rows)
        prompts = Prompts(first.prompts.tokens[own], first.prompts.mask[own])
        chunks.append(_Chunk(task, problems[own], prompts, samples, limits))
    sampler = dataclasses.replace(sampler, slots=None)
    for index, chunk in enumerate(chunks):
        while chunk.samples is not None:
            # All chunks that are not done take turns, so that the device has another one to draw.
            for other, waiting in list(enumerate(chunks))[index:]:
                if waiting.samples is None:
                    continue
                waiting.take_in(waiting.samples)
                keys = first.keys[other * rows : (other + 1) * rows]
                waiting.samples = _draw_next(policy, params, waiting, keys, sampler)
        yield chunk.ended()


class _Chunk:
    """The conversations of a chunk of rows as far as they have come, on the host; other processes' rows are empty."""

    def __init__(
        self, task: ConversationTask, problems: Sequence[Any], prompts: Prompts, samples: Samples, limits: Limits
    ) -> None:
        self.task, self.problems, self.limits = task, problems, limits
        self.samples: Samples | None = samples  # the turns that the device is drawing; None once all have ended
        rows, self.width = prompts.tokens.shape
        tokens, mask = fetch_own(prompts.tokens), fetch_own(prompts.mask)
        own = own_rows(rows)
        self.prompts = {int(row): tokens[row][mask[row]] for row in own[own < len(problems)]}
        # The columns after the prompt.
        shape = (rows, limits.tokens)
        self.tokens = np.full(shape, task.tokenizer.pad_id, np.int32)
        self.mask, self.environment = np.zeros(shape, bool), np.zeros(shape, bool)
        self.log_probs = np.zeros(shape, np.float32)
        self.used = np.zeros(rows, np.int32)
        self.route: np.ndarray | None = None
        if samples.route is not None:
            columns = self.width + limits.tokens - 1
            self.route = np.zeros((*samples.route.shape[:-1], columns), samples.route.dtype)
        self.routed = np.zeros(rows, np.int32)  # columns of the route that are known
        # What was said.
        self.turn = 0
        self.going = set(self.prompts)
        self.turns: dict[int, list[str]] = {row: [] for row in self.going}
        self.talks: dict[int, Talk] = {}

    def take_in(self, samples: Samples) -> None:
        """Wait for a turn of the model in each conversation that goes on, and add it and the environment's answer."""
        tokens, mask, log_probs = (fetch_own(array) for array in samples[:3])
        route = None if samples.route is None else fetch_own(samples.route)
        self.turn += 1
        for row in sorted(self.going):
            reading = read_response(tokens[row][mask[row]].tolist(), self.task.tokenizer)
            start, end = int(self.used[row]), int(self.used[row]) + reading.length
            self.tokens[row, start:end] = tokens[row, : reading.length]
            self.log_probs[row, start:end] = log_probs[row, : reading.length]
            self.mask[row, start:end] = True
            if self.route is not None and route is not None:
                # What this turn was the first to read: the experts that its own tokens were drawn with.
                known, now = int(self.routed[row]), self.width + end - 1
                shift = (route.shape[-1] + 1 - tokens.shape[-1]) - self.width - start
                self.route[row, ..., known:now] = route[row, ..., known + shift : now + shift]
                self.routed[row] = now
            self.used[row] = end
            self.turns[row].append(reading.text)
            self._answer(row, reading.stopped)

    def _answer(self, row: int, stopped: bool) -> None:
        """Add the environment's answer to a turn, or end the conversation."""
        answer = None
        if stopped:
            answer = self.task.respond(self.problems[row], tuple(self.turns[row]))
        if answer is None:
            token_limited = not stopped and self.used[row] == self.limits.tokens
            return self._end(row, stopped, token_limited=token_limited)
        if not isinstance(answer, str):
            raise ValueError(
                f"{type(self.task).__name__}.respond returned {answer!r:.200}: return the text that the environment "
                "says, or None where the conversation has ended"
            )
        if self.turn == self.limits.turns:
            return self._end(row, True, turn_limited=True)
        ids = self.task.tokenizer.encode(answer)
        start, end = int(self.used[row]), int(self.used[row]) + len(ids)
        if end >= self.limits.tokens:
            return self._end(row, False, token_limited=True)
        self.tokens[row, start:end] = ids
        self.environment[row, start:end] = True
        self.used[row] = end
        self.turns[row].append(answer)

    def _end(self, row: int, stopped: bool, turn_limited: bool = False, token_limited: bool = False) -> None:
        self.going.remove(row)
        ids, length = self.tokens[row, : self.used[row]].tolist(), int(self.mask[row].sum())
        self.talks[row] = Talk(tuple(self.turns[row]), ids, length, stopped, turn_limited, token_limited)

    def contexts(self, max_new_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return all that the model reads before its next turn, left-padded, and the tokens that it may draw.

        Returns:
          int32 [rows, P + R − 1] tokens, bool mask, and int32 [rows] limits; conversations that have ended are empty.
        """
        shape = (len(self.used), self.width + self.limits.tokens - 1)
        tokens, mask = np.full(shape, self.task.tokenizer.pad_id, np.int32), np.zeros(shape, bool)
        limits = np.zeros(shape[0], np.int32)
        for row in self.going:
            said = np.concatenate([self.prompts[row], self.tokens[row, : self.used[row]]])
            tokens[row, -len(said) :], mask[row, -len(said) :] = said, True
            limits[row] = min(max_new_tokens, self.limits.tokens - self.used[row])
        return tokens, mask, limits

    def ended(self) -> Conversations:
        """Return the conversations, back on the device."""
        samples = Samples(
            tokens=from_own(self.tokens, "rows", None),
            mask=from_own(self.mask, "rows", None),
            log_probs=from_own(self.log_probs, "rows", None),
            route=None if self.route is None else from_own(self.route, "rows", None, None, None),
            environment=from_own(self.environment, "rows", None),
        )
        return Conversations(samples, self.talks)


def _draw_next(policy: Policy, params: Params, chunk: _Chunk, keys: Array, sampler: SamplerConfig) -> Samples | None:
    """Start to draw the next turn of the conversations that go on, in any process; None if there are none."""
    going = bool(chunk.going)
    if jax.process_count() > 1:
        of_rows = np.zeros(len(chunk.used), bool)
        of_rows[list(chunk.going)] = True
        going = bool(fetch(jnp.any(from_own(of_rows, "rows"))))
    if not going:
        return None
    tokens, mask, limits = chunk.contexts(sampler.max_new_tokens)
    return generate(
        policy,
        params,
        from_own(tokens, "rows", None),
        from_own(mask, "rows", None),
        _keys_of_turn(keys, np.uint32(chunk.turn)),
        sampler,
        chunk.task.tokenizer.stop_ids,
        chunk.task.tokenizer.pad_id,
        record_route=chunk.route is not None,
        limits=from_own(limits, "rows"),
    )


@jax.jit
def _keys_of_turn(keys: Array, turn: Array) -> Array:
    """Return the keys of the turn after so many."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, jnp.uint32(_LATER_TURNS) + turn)


# Worked conversations


def worked_conversation(task: Task, problem: Any) -> Conversation:
    """Return the worked conversation of a problem, or its worked solution as a conversation of one turn.

    Raises:
      ValueError: if a conversation does not end with the model's turn.
    """
    if not isinstance(task, DemonstrationTask):
        return (task.solution(problem),)
    turns = tuple(task.demonstration(problem))
    if len(turns) % 2 == 0:
        raise ValueError(
            f"{type(task).__name__}.demonstration returned {len(turns)} turns: the first turn and the last one are the "
            "model's, so there must be an odd number of them"
        )
    return turns


def encode_conversation(turns: Conversation, task: Task) -> tuple[list[int], list[bool]]:
    """Return the ids of a worked conversation, each turn tokenised alone, and True for the model's own.

    A stop token is appended to each of the model's turns.
    """
    ids: list[int] = []
    own: list[bool] = []
    for index, text in enumerate(turns):
        is_own = index % 2 == 0
        encoded = [*task.tokenizer.encode(text), *([task.tokenizer.eos_id] if is_own else [])]
        ids += encoded
        own += [is_own] * len(encoded)
    return ids, own


def with_solutions(
    task: Task, problems: UsableProblems | UsableStream, sampler: SamplerConfig, limits: Limits
) -> UsableProblems | UsableStream:
    """Return the problems of a warm start; a stream then skips those without a worked solution within the limits.

    Raises:
      ValueError: if a solution of a finite split does not fit, with the limit that the longest one needs; if hardly any
        of a stream fits.
    """
    if isinstance(problems, UsableProblems):
        check_solutions(task, problems.problems, sampler, limits)
        return problems
    stream = problems._replace(check=lambda problem: check_solutions(task, [problem], sampler, limits))
    stream.take((0, 0), 0, 1)
    return stream


def check_solutions(task: Task, problems: Sequence[Any], sampler: SamplerConfig, limits: Limits) -> None:
    """Refuse worked solutions or conversations that do not fit into the limits of those that are drawn.

    Raises:
      ValueError: with the limit that the longest one needs.
    """
    turn_tokens, turns, tokens = 0, 0, 0
    for problem in problems:
        conversation = worked_conversation(task, problem)
        turns = max(turns, (len(conversation) + 1) // 2)
        for text in conversation[::2]:
            turn_tokens = max(turn_tokens, len(task.tokenizer.encode(text)) + 1)
        if isinstance(task, ConversationTask):
            tokens = max(tokens, len(encode_conversation(conversation, task)[0]))
    what = "worked solution" if turns == 1 else "turn of a worked conversation"
    mistakes = [
        f"the longest {thing} has {found} {unit}, but {name} is {limit}: raise it to {found} or more"
        for thing, found, unit, name, limit in (
            (what, turn_tokens, "tokens", "sampler.max_new_tokens", sampler.max_new_tokens),
            ("worked conversation", turns, "turns", "conversation.max_turns", limits.turns),
            ("worked conversation", tokens, "tokens", "conversation.max_tokens", limits.tokens),
        )
        if found > limit
    ]
    if mistakes:
        raise ValueError("; ".join(mistakes))
