"""Rollouts: responses are drawn on the device for prompts, decoded and judged on the host.

Sampling runs in chunks, so that the host judges one chunk while the device draws the next.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rspo_jax.rollouts.conversation import (
    Conversations,
    FirstTurns,
    Limits,
    Talk,
    converse,
    encode_conversation,
    worked_conversation,
)
from rspo_jax.rollouts.prompts import Prompts, encode_prompts
from rspo_jax.rollouts.reading import read_response
from rspo_jax.rollouts.sampler import SamplerConfig, generate, pad_prompts
from rspo_jax.sharding import fetch, fetch_own, from_own, own_rows, parts_of
from rspo_jax.stopwatch import Lap, unmeasured
from rspo_jax.types import (
    Array,
    Conversation,
    ConversationTask,
    Judgement,
    Params,
    Policy,
    RewardsTask,
    RolloutBatch,
    Samples,
    Task,
    Tokenizer,
    TokensTask,
    TruncatedTask,
)


class Turns(NamedTuple):
    """The turns of a set of conversations."""

    counts: np.ndarray
    """int32 [B]: turns of the model."""
    tokens: np.ndarray
    """int32 [B]: tokens after the prompt, those of the environment included."""
    turn_limited: np.ndarray
    """bool [B]: True if the limit of turns has ended the conversation, though the environment had more to say."""
    token_limited: np.ndarray
    """bool [B]: True if the limit of tokens has truncated the conversation."""
    texts: list[Conversation]
    """The texts of the turns; () for a row on another process's devices."""


class Judged(NamedTuple):
    """The verdicts on a set of responses."""

    rewards: np.ndarray
    """float32 [B]; 0 for a response that was cut off before its stop token, unless the task judges those too
    (`rspo_jax.types.TruncatedTask`), and for one that was left out."""
    correct: np.ndarray | None
    """bool [B]; None for a task that does not tell."""
    truncated: np.ndarray
    """bool [B]."""
    unjudged: np.ndarray
    """bool [B]: True if the judge gave up."""
    unmarked: np.ndarray
    """bool [B]: True if the response lacks the text after which responses are judged."""
    left_out: np.ndarray
    """bool [B]: True if no reward applies to the response, which then counts for nothing."""
    parts: np.ndarray
    """float32 [B, M]: the M rewards that the task names, NaN where one does not apply or was not asked for."""
    lengths: np.ndarray
    """int32 [B]: tokens that the model drew up to where the response ends, which a stop string may put before the last
    one drawn."""
    texts: list[str]
    """The responses, without what ends them, and the turns of a conversation line by line; "" for a row on another
    process's devices."""
    turns: Turns | None = None
    """The turns of conversations; None for a task without an environment."""


class ResponseLengths(NamedTuple):
    """Lengths of the responses of a rollout, in tokens."""

    mean: Array
    """float32 scalar; 0 before the first rollout."""
    longest: Array
    """float32 scalar."""


def sample_in_chunks(
    policy: Policy,
    params: Params,
    prompts: Prompts,
    keys: Array,
    sampler: SamplerConfig,
    tokenizer: Tokenizer,
    chunks: int,
    repeats: int = 1,
    record_route: bool = False,
) -> list[Samples]:
    """Start to draw one response for each row of the prompts, in equal chunks, without waiting for any of them.

    Args:
      policy: the model.
      params: its parameters.
      prompts: B rows; each prompt fills `repeats` consecutive rows and is read once where a chunk holds whole groups.
      keys: PRNG keys [B], one a response: the number of chunks does not change what is drawn.
      sampler: temperature, limits and slots.
      tokenizer: names the stop and padding tokens.
      chunks: number of equal parts; must divide B.
      repeats: responses to each prompt.
      record_route: if True, the samples say which experts each token went through.

    Raises:
      ValueError: if the chunks do not divide the rows.
    """
    rows, rest = divmod(prompts.tokens.shape[0], chunks)
    if rest or not rows:
        raise ValueError(f"{prompts.tokens.shape[0]} prompts do not divide into {chunks} chunks")
    # On a mesh the rows of a chunk, and the prompts that are read once for several, go to equal parts of it.
    repeats = repeats if rows % (repeats * parts_of("rows")) == 0 else 1
    return [
        generate(
            policy,
            params,
            prompts.tokens[start : start + rows : repeats],
            prompts.mask[start : start + rows : repeats],
            keys[start : start + rows],
            sampler,
            tokenizer.stop_ids,
            tokenizer.pad_id,
            repeats,
            record_route,
        )
        for start in range(0, prompts.tokens.shape[0], rows)
    ]


def refilling_pays(mean_prompt: float, lengths: ResponseLengths) -> bool:
    """Return whether refilling free slots of the sampler is faster than drawing batch after batch.

    A slot reads its prompt token by token, so a response takes it prompt + response steps; a batch reads all prompts at
    once and takes as many steps as its longest response. Before the first rollout nothing is known, and the answer is
    no.

    Args:
      mean_prompt: mean length of the prompts, in tokens.
      lengths: response lengths of the last rollout.
    """
    return mean_prompt + float(np.asarray(lengths.mean)) < float(np.asarray(lengths.longest))


@jax.jit
def assemble(prompts: Prompts, chunks: list[Samples]) -> RolloutBatch:
    """Join prompts and responses into rows; the advantages are 0 until the rewards are known."""
    samples = jax.tree.map(lambda *parts: jnp.concatenate(parts), *chunks)
    before_response = jnp.zeros((prompts.tokens.shape[0], prompts.tokens.shape[1] - 1), bool)
    used = samples.mask if samples.environment is None else samples.mask | samples.environment
    return RolloutBatch(
        tokens=jnp.concatenate([prompts.tokens, samples.tokens], axis=1),
        segment_ids=jnp.concatenate([prompts.mask, used], axis=1).astype(jnp.int32),
        mask=jnp.concatenate([before_response, samples.mask], axis=1),
        sampler_log_probs=jnp.concatenate([before_response.astype(jnp.float32), samples.log_probs], axis=1),
        advantages=jnp.zeros(prompts.tokens.shape[0]),
        route=samples.route,
    )


def encode_solutions(task: Task, problems: Sequence[Any], width: int, response_width: int) -> RolloutBatch:
    """Return the prompt and worked solution of each problem as a rollout; each process encodes its own rows.

    Args:
      task: writes prompts and solutions, or whole conversations (`DemonstrationTask`).
      problems: one a row.
      width: P, the tokens that prompts are padded to.
      response_width: R, the limit of tokens after the prompt.
    """
    tokens = np.full((len(problems), response_width), task.tokenizer.pad_id, np.int32)
    mask, environment = (np.zeros((len(problems), response_width), bool) for _ in range(2))
    for row in own_rows(len(problems)):
        ids, drawn = encode_conversation(worked_conversation(task, problems[row]), task)
        tokens[row, : len(ids)] = ids
        mask[row, : len(ids)] = drawn
        environment[row, : len(ids)] = np.logical_not(drawn)
    arrays = (tokens, mask, np.zeros(mask.shape, np.float32), environment)
    tokens, mask, log_probs, environment = (from_own(array, "rows", None) for array in arrays)
    samples = Samples(tokens, mask, log_probs, environment=environment)
    return assemble(encode_prompts(task, problems, width), [samples])


def judge(
    task: Task, problems: Sequence[Any], chunks: Iterable[Samples | Conversations], lap: Lap = unmeasured
) -> Judged:
    """Decode and judge the responses chunk by chunk, waiting for each only when its turn comes.

    Each process judges the rows on its own devices; only the verdicts cross between processes. A response ends before
    the first stop string in its text, if the tokenizer has any, or else at its stop token. One that was cut off before
    either is shown only to the judge of a `TruncatedTask` that asks for it.

    Args:
      task: the judge.
      problems: one a row, in the order of the chunks' rows. Rows without one are not judged.
      chunks: from `sample_in_chunks`, equally long; for a `ConversationTask`, from `converse`.
      lap: told of waiting for each chunk (draw), the environment's answers included, and of judging it (judge), beside
        the next one that is being drawn.

    Returns:
      The verdicts of all processes, one a row.

    Raises:
      ValueError: if the task gives a reward that is not finite, or not one judgement a response.
    """
    names, conversing = reward_names(task), isinstance(task, ConversationTask)
    judges_truncated = isinstance(task, TruncatedTask) and task.judges_truncated
    # Per chunk and response: tokens, truncated, the counts of `Turns`, and what `judge_texts` returns.
    of_chunks: list[np.ndarray] = []
    turns: list[Conversation] = []
    for chunk in chunks:
        start = len(turns)
        rows, talks = _talks(task, chunk, len(problems) - start, lap)
        turns += [talks[row].turns if row in talks else () for row in range(rows)]
        verdict = np.zeros((rows, 11 + len(names)), np.float32)
        verdict[:, 11:] = np.nan
        for row, talk in talks.items():
            verdict[row, :2] = talk.length, not talk.stopped
            verdict[row, 2:6] = (len(talk.turns) + 1) // 2, len(talk.token_ids), talk.turn_limited, talk.token_limited
        judged = sorted(row for row, talk in talks.items() if talk.stopped or judges_truncated)
        if judged:
            responses: list[Any] = [turns[start + row] for row in judged]
            if not conversing:
                responses = [text for (text,) in responses]
            token_ids = [talks[row].token_ids for row in judged]
            verdict[judged, 6:] = judge_texts(task, [problems[start + row] for row in judged], responses, token_ids)
        of_chunks.append(verdict)
        following = chunks[len(of_chunks)] if isinstance(chunks, Sequence) and len(of_chunks) < len(chunks) else None
        lap("judge", beside=following.tokens if isinstance(following, Samples) else None)
    verdicts = np.stack(of_chunks)
    if jax.process_count() > 1:
        verdicts = fetch(from_own(verdicts, None, "rows", None))
    verdicts = verdicts.reshape(-1, verdicts.shape[-1])
    lengths, truncated, counts, tokens, turn_limited, token_limited = verdicts[:, :6].T
    rewards, correct, unjudged, unmarked, left_out = verdicts[:, 6:11].T
    of_turns = Turns(counts.astype(np.int32), tokens.astype(np.int32), turn_limited > 0, token_limited > 0, turns)
    return Judged(
        rewards=rewards.copy(),
        correct=correct > 0 if tells_correct(task) else None,
        truncated=truncated > 0,
        unjudged=unjudged > 0,
        unmarked=unmarked > 0,
        left_out=left_out > 0,
        parts=verdicts[:, 11:].copy(),
        lengths=lengths.astype(np.int32),
        texts=["\n".join(texts) for texts in turns],
        turns=of_turns if conversing else None,
    )


def _talks(task: Task, chunk: Samples | Conversations, count: int, lap: Lap) -> tuple[int, dict[int, Talk]]:
    """Return the rows of a chunk, and the responses in its first `count` rows, those of this process, as text."""
    if isinstance(chunk, Conversations):
        lap("draw")
        return chunk.samples.tokens.shape[0], chunk.talks
    rows, tokens, mask = chunk.tokens.shape[0], fetch_own(chunk.tokens), fetch_own(chunk.mask)
    lap("draw")
    own = own_rows(rows)
    talks = {}
    for row in own[own < count].tolist():
        drawn = tokens[row][mask[row]].tolist()
        length, text, stopped = read_response(drawn, task.tokenizer)
        talks[row] = Talk((text,), drawn[:length], length, stopped, False, False)
    return rows, talks


@jax.jit
def cut(rollout: RolloutBatch, lengths: ArrayLike) -> RolloutBatch:
    """Leave out of a rollout what was drawn after the ends of its responses.

    Args:
      rollout: B rows.
      lengths: int32 [B], the tokens of each response that belong to it (`Judged.lengths`).
    """
    drawn = rollout.mask.astype(jnp.int32)
    kept = rollout.mask & (jnp.cumsum(drawn, axis=1) <= jnp.asarray(lengths)[:, None])
    dropped = jnp.pad(rollout.mask & ~kept, ((0, 0), (1, 0)))
    return rollout._replace(mask=kept, segment_ids=jnp.where(dropped, 0, rollout.segment_ids))


def reward_names(task: Task) -> tuple[str, ...]:
    """Return the names of a task's rewards; none for a task that does not name them."""
    return tuple(task.reward_names) if isinstance(task, RewardsTask) else ()


def tells_correct(task: Task) -> bool:
    """Return whether a task's judgements say which responses are correct."""
    return not isinstance(task, RewardsTask) or task.tells_correct


def judge_texts(
    task: Task,
    problems: Sequence[Any],
    responses: Sequence[Any],
    token_ids: Sequence[Sequence[int]] | None = None,
) -> np.ndarray:
    """Return the task's judgements of responses, checked.

    Args:
      task: the judge.
      problems: one a response.
      responses: B texts; for a `ConversationTask`, the texts of the turns of B conversations.
      token_ids: their tokens, for a `TokensTask`; None where they are not known.

    Returns:
      float32 [B, 5 + M]: the fields of `Judgement`, the last of which has M parts. The reward of a response that is
      left out is 0.

    Raises:
      ValueError: if the task gives a reward that is not finite, not one judgement a response, or not one part for each
        of the rewards that it names.
    """
    name = f"{type(task).__name__}.judge"
    if token_ids is not None and isinstance(task, TokensTask):
        judgements = task.judge_tokens(problems, responses, token_ids)
    else:
        judgements = task.judge(problems, responses)
    if len(judgements) != len(responses) or not all(isinstance(one, Judgement) for one in judgements):
        types = sorted({type(one).__name__ for one in judgements})
        raise ValueError(
            f"{name} was given {len(responses)} responses and returned a list of {len(judgements)}, of type "
            f"{', '.join(types) or 'none'}: return one Judgement for each response"
        )
    names = reward_names(task)
    if lengths := {len(one.parts) for one in judgements} - {len(names)}:
        raise ValueError(
            f"{name} gave a response {min(lengths)} parts, but the task names {len(names)} rewards"
            f"{': ' if names else ''}{', '.join(names)}; return one part for each, NaN where it does not apply"
        )
    with np.errstate(over="ignore"):
        checked = np.array([[*one[:5], *one.parts] for one in judgements], np.float32)
    checked[checked[:, 4] > 0, 0] = 0
    wrong = np.flatnonzero(~np.isfinite(checked[:, 0]) | np.isinf(checked[:, 5:]).any(axis=1))
    if wrong.size:
        raise ValueError(
            f"{name} gave the reward {judgements[wrong[0]].reward} to the response {responses[wrong[0]]!r:.200}"
            f"{f', with the parts {judgements[wrong[0]].parts}' if names else ''}: rewards must be finite in float32"
        )
    return checked


def sample_texts(
    policy: Policy, params: Params, tokenizer: Tokenizer, prompts: Sequence[str], key: Array, sampler: SamplerConfig
) -> list[str]:
    """Return the text of one response to each prompt, without what ends it.

    Args:
      policy: the model.
      params: its parameters, in the form that the sampler needs.
      tokenizer: of the model.
      prompts: all that the model reads, chat markup included.
      key: decides the responses.
      sampler: temperature and limits.
    """
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    encoded += [encoded[-1]] * (-len(encoded) % parts_of("rows"))  # on a mesh, rows divide
    tokens, mask = pad_prompts(encoded, max(map(len, encoded)), tokenizer.pad_id)
    prompt_rows = Prompts(from_own(tokens, "rows", None), from_own(mask, "rows", None))
    keys = jax.random.split(key, len(encoded))
    (samples,) = sample_in_chunks(policy, params, prompt_rows, keys, sampler, tokenizer, 1)
    drawn, kept = fetch(samples.tokens), fetch(samples.mask)
    return [read_response(drawn[row][kept[row]].tolist(), tokenizer).text for row in range(len(prompts))]


def solve(
    policy: Policy,
    params: Params,
    task: Task,
    problems: Sequence[Any],
    key: Array,
    sampler: SamplerConfig,
    width: int,
    limits: Limits | None = None,
) -> Judged:
    """Draw and judge one response to every problem, for evaluation, in batches of about 512 rows.

    Args:
      policy: the model.
      params: its parameters.
      task: the problems' judge and, for a `ConversationTask`, their environment.
      problems: what to solve.
      key: of the responses' keys.
      sampler: temperature and limits.
      width: P, the tokens that prompts are padded to.
      limits: those of conversations; only a `ConversationTask` needs them.

    Returns:
      The verdicts, one a problem.
    """
    parts = parts_of("rows")
    batch_size = -(-min(512, len(problems)) // parts) * parts
    batches: list[Iterable[Samples | Conversations]] = []
    for start in range(0, len(problems), batch_size):
        # The last batch is filled up with copies, so that one shape is compiled.
        batch = [problems[min(row, len(problems) - 1)] for row in range(start, start + batch_size)]
        prompts = encode_prompts(task, batch, width)
        keys = jax.random.split(jax.random.fold_in(key, start), batch_size)
        chunks = sample_in_chunks(policy, params, prompts, keys, sampler, task.tokenizer, 1)
        if isinstance(task, ConversationTask):
            assert limits is not None, "a task of several turns has limits of its conversations"
            own = problems[start : start + batch_size]
            batches.append(converse(policy, params, task, own, FirstTurns(prompts, keys, chunks), sampler, limits))
        else:
            batches.append(chunks)
    judged = judge(task, problems, itertools.chain.from_iterable(batches))
    own = slice(len(problems))
    return jax.tree.map(lambda values: values[own], judged, is_leaf=lambda values: isinstance(values, list))
