"""From problems to a rollout: prompts in, sampled and judged responses out.

The only seam between host and device: text is encoded and judged here, everything after it is arrays. Sampling runs in
chunks, so that the host judges one chunk while the device draws the next. This file must never know how a policy is
updated, nor a concrete task.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rspo_jax.rollouts.packing import balanced_parts, pack_rollout, padding_fraction, plan_packing
from rspo_jax.rollouts.sampler import SamplerConfig, generate, pad_prompts
from rspo_jax.sharding import fetch, fetch_own, from_own, own_rows, parts_of
from rspo_jax.types import Array, Judgement, PackedBatch, Params, Policy, RolloutBatch, Samples, Task, Tokenizer


class Prompts(NamedTuple):
    """Left-padded prompts on the device."""

    tokens: Array
    """int32 [B, P]."""
    mask: Array
    """bool [B, P]."""


class Judged(NamedTuple):
    """What the host found in a set of responses."""

    rewards: np.ndarray
    """float32 [B]; 0 for a response that was cut off before its stop token."""
    correct: np.ndarray
    """bool [B]."""
    truncated: np.ndarray
    """bool [B]."""
    unjudged: np.ndarray
    """bool [B]: where the judge gave up."""
    texts: list[str]
    """The responses; "" for a row on another process's devices."""


class UsableProblems(NamedTuple):
    """Those problems of a split whose prompts are short enough."""

    problems: Sequence[Any]
    """In their order."""
    width: int
    """The longest prompt among them, in tokens; one width for a whole run compiles once."""
    dropped: int
    """How many were left out."""


def usable_problems(task: Task, problems: Sequence[Any], max_prompt_tokens: int | None = None) -> UsableProblems:
    """Leaves out the problems with prompts that are too long. A prompt is never cut: its end is what it asks.

    Raises:
      ValueError: if nothing is left.
    """
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


def encode_prompts(task: Task, problems: Sequence[Any], width: int, repeats: int = 1) -> Prompts:
    """Encodes each problem's prompt `repeats` times in a row; each process those of its own rows."""
    rows = own_rows(len(problems) * repeats)
    own, copies = np.unique(rows // repeats, return_counts=True)
    encoded = [task.tokenizer.encode(task.prompt(problems[index])) for index in own]
    tokens, mask = (np.repeat(array, copies, axis=0) for array in pad_prompts(encoded, width, task.tokenizer.pad_id))
    return Prompts(*(_from_own_rows(array, rows, len(problems) * repeats) for array in (tokens, mask)))


def _from_own_rows(values: np.ndarray, rows: np.ndarray, count: int) -> Array:
    """The global array [count, …] to which this process gives these rows."""
    whole = np.zeros((count, *values.shape[1:]), values.dtype)
    whole[rows] = values
    return from_own(whole, "rows", *(None,) * (whole.ndim - 1))


def check_solutions(task: Task, problems: Sequence[Any], response_width: int) -> None:
    """Refuses worked solutions that do not fit.

    Raises:
      ValueError: with the width that the longest one needs.
    """
    longest = max(len(task.tokenizer.encode(task.solution(problem))) for problem in problems) + 1
    if longest > response_width:
        raise ValueError(
            f"the longest worked solution has {longest} tokens, but sampler.max_new_tokens is {response_width}: "
            f"raise it to {longest} or more"
        )


def encode_solutions(task: Task, problems: Sequence[Any], width: int, response_width: int) -> RolloutBatch:
    """Prompt and worked solution of each problem, as a rollout that nobody drew; each process encodes its own rows."""
    tokenizer = task.tokenizer
    tokens = np.full((len(problems), response_width), tokenizer.pad_id, np.int32)
    mask = np.zeros((len(problems), response_width), bool)
    for row in own_rows(len(problems)):
        solution = [*tokenizer.encode(task.solution(problems[row])), tokenizer.eos_id]
        tokens[row, : len(solution)] = solution
        mask[row, : len(solution)] = True
    samples = (from_own(array, "rows", None) for array in (tokens, mask, np.zeros(mask.shape, np.float32)))
    return assemble(encode_prompts(task, problems, width), [Samples(*samples)])


class Packing(NamedTuple):
    """How a rollout is cut into updates and packed into rows."""

    mini_batches: int = 1
    micro_batches: int = 1
    row_length: int | None = None


def pack(
    rollout: RolloutBatch, response_width: int, order: np.ndarray, packing: Packing
) -> tuple[PackedBatch, dict[str, float]]:
    """Cuts a rollout into parts and packs the responses of each into rows.

    Args:
      rollout: B responses.
      response_width: how many of its last columns are for responses.
      order: int [B], a permutation, which makes the cut random; see `balanced_parts`.
      packing: how many parts, and rows of which length.

    Returns:
      The parts, [mini_batches · micro_batches, ...], those of a mini-batch one after the other, and the metric
      `padding_fraction`, the share of the places in all rows that hold no token.
    """
    prompt_width = rollout.tokens.shape[1] - response_width
    prompt_lengths, response_lengths = (fetch(lengths) for lengths in _lengths(rollout.segment_ids, prompt_width))
    parts = packing.mini_batches * packing.micro_batches
    responses = balanced_parts(prompt_lengths + response_lengths, order, parts)
    plan = plan_packing(
        prompt_lengths,
        response_lengths,
        prompt_width,
        response_width,
        responses,
        packing.row_length,
        rows_multiple=parts_of("rows"),
    )
    return pack_rollout(rollout, plan), {"padding_fraction": padding_fraction(plan)}


@functools.partial(jax.jit, static_argnames="prompt_width")
def _lengths(segment_ids: Array, prompt_width: int) -> tuple[Array, Array]:
    used = (segment_ids > 0).astype(jnp.int32)
    return jnp.sum(used[:, :prompt_width], axis=1), jnp.sum(used[:, prompt_width:], axis=1)


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
    """Starts to draw one response a row of the prompts, in equal chunks, without waiting for any of them.

    Each prompt stands in `repeats` rows in a row; where a chunk holds whole such groups, it reads a prompt once.
    `keys`, [B], are one a row: into how many chunks the rows are cut does not change what is drawn. With
    `record_route` the samples say which experts each token went through.
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


class ResponseLengths(NamedTuple):
    """Of the responses of a rollout, in tokens."""

    mean: Array
    """float32 scalar; 0 before the first rollout."""
    longest: Array
    """float32 scalar."""


def refilling_pays(mean_prompt: float, lengths: ResponseLengths) -> bool:
    """Whether slots that take the next prompt once they are free are faster than batch after batch.

    A slot reads its prompt token by token, so a response takes it prompt + response steps; a batch reads all prompts at
    once and takes as many steps as its longest response. Before the first rollout nothing is known, and batches it is.
    """
    return mean_prompt + float(np.asarray(lengths.mean)) < float(np.asarray(lengths.longest))


@jax.jit
def assemble(prompts: Prompts, chunks: list[Samples]) -> RolloutBatch:
    """Joins prompts and responses into rows; the advantages are 0 until the rewards are known."""
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


def judge(task: Task, problems: Sequence[Any], chunks: list[Samples]) -> Judged:
    """Decodes and judges the responses chunk by chunk, waiting for each only when its turn comes.

    Args:
      task: the judge.
      problems: one a row, in the order of the chunks' rows. Rows without one are not judged.
      chunks: from `sample_in_chunks`, equally long.

    Returns:
      What all processes found. Each judges the rows on its own devices, and then only the verdicts cross. A response
      that was cut off before its end is not shown to the judge.

    Raises:
      ValueError: if the task gives a reward that is not finite, or not one judgement a response.
    """
    rows = chunks[0].tokens.shape[0]
    verdicts = np.zeros((len(chunks), rows, 4), np.float32)  # truncated, reward, correct, unjudged
    texts = [""] * (len(chunks) * rows)
    for index, chunk in enumerate(chunks):
        tokens, mask = fetch_own(chunk.tokens), fetch_own(chunk.mask)
        own, ended = own_rows(rows), []
        for row in own[own < len(problems) - index * rows]:
            response, stopped = _without_stop(tokens[row][mask[row]].tolist(), task.tokenizer)
            texts[index * rows + row] = task.tokenizer.decode(response)
            verdicts[index, row, 0] = not stopped
            ended += [row] if stopped else []
        if ended:
            at = [index * rows + row for row in ended]
            verdicts[index, ended, 1:] = _judgements(task, [problems[row] for row in at], [texts[row] for row in at])
    if jax.process_count() > 1:
        verdicts = fetch(from_own(verdicts, None, "rows", None))
    truncated, rewards, correct, unjudged = verdicts.reshape(-1, 4).T
    return Judged(rewards.copy(), correct > 0, truncated > 0, unjudged > 0, texts)


def _without_stop(response: list[int], tokenizer: Tokenizer) -> tuple[list[int], bool]:
    """The response up to its stop token, and whether it has one: it is the last if there is one."""
    stopped = response[-1] in tokenizer.stop_ids
    return response[:-1] if stopped else response, stopped


def _judgements(task: Task, problems: list[Any], responses: list[str]) -> np.ndarray:
    """The task's judgements, checked: float32 [B, 3], reward, correctness and whether it gave up."""
    name, judgements = f"{type(task).__name__}.judge", task.judge(problems, responses)
    if len(judgements) != len(responses) or not all(isinstance(one, Judgement) for one in judgements):
        types = sorted({type(one).__name__ for one in judgements})
        raise ValueError(
            f"{name} was given {len(responses)} responses and returned a list of {len(judgements)}, of type "
            f"{', '.join(types) or 'none'}: return one Judgement for each response"
        )
    with np.errstate(over="ignore"):
        checked = np.array([tuple(one) for one in judgements], np.float32)
    wrong = np.flatnonzero(~np.isfinite(checked[:, 0]))
    if wrong.size:
        raise ValueError(
            f"{name} gave the reward {judgements[wrong[0]].reward} to the response {responses[wrong[0]][:200]!r}: "
            "rewards must be finite in float32"
        )
    return checked


def solve(
    policy: Policy, params: Params, task: Task, problems: Sequence[Any], key: Array, sampler: SamplerConfig, width: int
) -> Judged:
    """One response to every problem, for evaluation, in batches of about 512 rows."""
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
    rewards, correct, truncated, unjudged, texts = judged
    return Judged(rewards[own], correct[own], truncated[own], unjudged[own], texts[own])
