"""Rollouts: responses are drawn on the device for prompts, decoded and judged on the host.

Sampling runs in chunks, so that the host judges one chunk while the device draws the next.
"""

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rspo_jax.rollouts.prompts import Prompts, encode_prompts
from rspo_jax.rollouts.sampler import SamplerConfig, generate, pad_prompts
from rspo_jax.sharding import fetch, fetch_own, from_own, own_rows, parts_of
from rspo_jax.stopwatch import Lap, unmeasured
from rspo_jax.types import (
    Array,
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
    """int32 [B]: tokens of the response up to where it ends, which a stop string may put before the last one drawn."""
    texts: list[str]
    """The responses, without what ends them; "" for a row on another process's devices."""


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
    return RolloutBatch(
        tokens=jnp.concatenate([prompts.tokens, samples.tokens], axis=1),
        segment_ids=jnp.concatenate([prompts.mask, samples.mask], axis=1).astype(jnp.int32),
        mask=jnp.concatenate([before_response, samples.mask], axis=1),
        sampler_log_probs=jnp.concatenate([before_response.astype(jnp.float32), samples.log_probs], axis=1),
        advantages=jnp.zeros(prompts.tokens.shape[0]),
        route=samples.route,
    )


def encode_solutions(task: Task, problems: Sequence[Any], width: int, response_width: int) -> RolloutBatch:
    """Return the prompt and worked solution of each problem as a rollout; each process encodes its own rows."""
    tokenizer = task.tokenizer
    tokens = np.full((len(problems), response_width), tokenizer.pad_id, np.int32)
    mask = np.zeros((len(problems), response_width), bool)
    for row in own_rows(len(problems)):
        solution = [*tokenizer.encode(task.solution(problems[row])), tokenizer.eos_id]
        tokens[row, : len(solution)] = solution
        mask[row, : len(solution)] = True
    samples = (from_own(array, "rows", None) for array in (tokens, mask, np.zeros(mask.shape, np.float32)))
    return assemble(encode_prompts(task, problems, width), [Samples(*samples)])


def judge(task: Task, problems: Sequence[Any], chunks: list[Samples], lap: Lap = unmeasured) -> Judged:
    """Decode and judge the responses chunk by chunk, waiting for each only when its turn comes.

    Each process judges the rows on its own devices; only the verdicts cross between processes. A response ends before
    the first stop string in its text, if the tokenizer has any, or else at its stop token. One that was cut off before
    either is shown only to the judge of a `TruncatedTask` that asks for it.

    Args:
      task: the judge.
      problems: one a row, in the order of the chunks' rows. Rows without one are not judged.
      chunks: from `sample_in_chunks`, equally long.
      lap: told of waiting for each chunk (draw) and of judging it (judge), beside the next one that is being drawn.

    Returns:
      The verdicts of all processes, one a row.

    Raises:
      ValueError: if the task gives a reward that is not finite, or not one judgement a response.
    """
    rows, names = chunks[0].tokens.shape[0], reward_names(task)
    judges_truncated = isinstance(task, TruncatedTask) and task.judges_truncated
    # Per response: tokens, truncated, and what `judge_texts` returns.
    verdicts = np.zeros((len(chunks), rows, 7 + len(names)), np.float32)
    verdicts[..., 7:] = np.nan
    texts, token_ids = [""] * (len(chunks) * rows), [[] for _ in range(len(chunks) * rows)]
    for index, chunk in enumerate(chunks):
        tokens, mask = fetch_own(chunk.tokens), fetch_own(chunk.mask)
        lap("draw")
        own, judged = own_rows(rows), []
        for row in own[own < len(problems) - index * rows]:
            drawn = tokens[row][mask[row]].tolist()
            length, text, stopped = _read(drawn, task.tokenizer)
            texts[index * rows + row], token_ids[index * rows + row] = text, drawn[:length]
            verdicts[index, row, :2] = length, not stopped
            judged += [row] if stopped or judges_truncated else []
        if judged:
            at = [index * rows + row for row in judged]
            verdicts[index, judged, 2:] = judge_texts(
                task, [problems[row] for row in at], [texts[row] for row in at], [token_ids[row] for row in at]
            )
        lap("judge", beside=chunks[index + 1].tokens if index + 1 < len(chunks) else None)
    if jax.process_count() > 1:
        verdicts = fetch(from_own(verdicts, None, "rows", None))
    verdicts = verdicts.reshape(-1, verdicts.shape[-1])
    lengths, truncated, rewards, correct, unjudged, unmarked, left_out = verdicts[:, :7].T
    return Judged(
        rewards=rewards.copy(),
        correct=correct > 0 if tells_correct(task) else None,
        truncated=truncated > 0,
        unjudged=unjudged > 0,
        unmarked=unmarked > 0,
        left_out=left_out > 0,
        parts=verdicts[:, 7:].copy(),
        lengths=lengths.astype(np.int32),
        texts=texts,
    )


def _read(response: list[int], tokenizer: Tokenizer) -> tuple[int, str, bool]:
    """Return the number of tokens that belong to a response, its text, and whether it has ended."""
    stopped = response[-1] in tokenizer.stop_ids
    text = tokenizer.decode(response[:-1] if stopped else response)
    stop_strings = getattr(tokenizer, "stop_strings", ())
    if not any(stop in text for stop in stop_strings):
        return len(response), text, stopped

    def contains_stop(length: int) -> bool:
        return any(stop in tokenizer.decode(response[:length]) for stop in stop_strings)

    # The token that completes a stop string is the last one, as if the sampler had seen it.
    length = bisect.bisect_left(range(len(response)), True, key=contains_stop)
    text = tokenizer.decode(response[:length])
    return length, text[: min(text.index(stop) for stop in stop_strings if stop in text)], True


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
    responses: Sequence[str],
    token_ids: Sequence[Sequence[int]] | None = None,
) -> np.ndarray:
    """Return the task's judgements of responses, checked.

    Args:
      task: the judge.
      problems: one a response.
      responses: B texts.
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
            f"{name} gave the reward {judgements[wrong[0]].reward} to the response {responses[wrong[0]][:200]!r}"
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
    return [_read(drawn[row][kept[row]].tolist(), tokenizer)[1] for row in range(len(prompts))]


def solve(
    policy: Policy, params: Params, task: Task, problems: Sequence[Any], key: Array, sampler: SamplerConfig, width: int
) -> Judged:
    """Draw and judge one response to every problem, for evaluation, in batches of about 512 rows."""
    parts = parts_of("rows")
    batch_size = -(-min(512, len(problems)) // parts) * parts
    chunks: list[Samples] = []
    for start in range(0, len(problems), batch_size):
        # The last batch is filled up with copies, so that one shape is compiled.
        batch = [problems[min(row, len(problems) - 1)] for row in range(start, start + batch_size)]
        prompts = encode_prompts(task, batch, width)
        keys = jax.random.split(jax.random.fold_in(key, start), batch_size)
        chunks += sample_in_chunks(policy, params, prompts, keys, sampler, task.tokenizer, 1)
    judged = judge(task, problems, chunks)
    own = slice(len(problems))
    return Judged._make(None if of_responses is None else of_responses[own] for of_responses in judged)
