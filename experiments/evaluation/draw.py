"""Draws and judges the responses that an evaluation still lacks, batch after batch.

The key of a response depends on seed, problem and sample alone, and the batches on how many of them there are, not on
which were drawn before: an evaluation that was interrupted ends with the responses of one that was not, bit for bit.
This file must never know where a model or a task comes from, nor what is counted in the end.
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.evaluation.responses import Response
from experiments.evaluation.subject import Subject, Votes
from rspo_jax.rollouts import Judged, SamplerConfig, encode_prompts, judge, sample_in_chunks, usable_problems
from rspo_jax.sharding import fetch, parts_of
from rspo_jax.types import Array, Samples, Task

Pair = tuple[int, int]
"""A problem and a sample."""


@dataclass(frozen=True)
class Drawing:
    """How responses are drawn."""

    sampler: SamplerConfig
    samples: int
    """Responses to each problem."""
    batch: int
    """Responses at once."""
    seed: int


def wanted_pairs(problems: int, samples: int) -> list[Pair]:
    """All that there is to draw, in the order in which it is drawn: the first sample of every problem first, so that
    asking for more samples later changes no batch but the last."""
    return [(problem, sample) for sample in range(samples) for problem in range(problems)]


def response_keys(seed: int, pairs: Sequence[Pair]) -> Array:
    """One PRNG key a response: [B]."""
    key = jax.random.key(seed)
    problems, samples = (jnp.asarray(column, jnp.int32) for column in zip(*pairs, strict=True))
    return jax.vmap(lambda problem, sample: jax.random.fold_in(jax.random.fold_in(key, problem), sample))(
        problems, samples
    )


class _Batch(NamedTuple):
    """Responses that the device is still drawing."""

    pairs: list[Pair]
    """Of the first rows; the last batch is filled up."""
    samples: Samples


def draw_missing(
    subject: Subject,
    problems: Sequence[Any],
    drawing: Drawing,
    present: Container[Pair],
    keep: Callable[[list[Response]], None],
) -> None:
    """Draws all responses that are not present, and hands them on batch by batch.

    Args:
      subject: who answers, with the mesh in use that its parameters are on.
      problems: all that are asked for.
      drawing: how.
      present: pairs of problem and sample that were drawn before, with the same settings. A batch of which some are
        missing is drawn again as a whole, so that every row has the neighbours that it had.
      keep: called with the new responses of a batch, while the device draws the next one.
    """
    width = usable_problems(subject.task, problems).width
    pairs, parts = wanted_pairs(len(problems), drawing.samples), parts_of("rows")
    rows = -(-min(drawing.batch, len(pairs)) // parts) * parts
    waiting: _Batch | None = None
    for start in range(0, len(pairs), rows):
        own = pairs[start : start + rows]
        if all(pair in present for pair in own):
            continue
        # Filled up with copies, so that one shape is compiled, and the longest response stays the longest.
        samples = _start(subject, problems, drawing, own + [own[-1]] * (rows - len(own)), width)
        if waiting is not None:
            keep(_finish(subject, problems, waiting, present))
        waiting = _Batch(own, samples)
    if waiting is not None:
        keep(_finish(subject, problems, waiting, present))


def _start(subject: Subject, problems: Sequence[Any], drawing: Drawing, pairs: list[Pair], width: int) -> Samples:
    prompts = encode_prompts(subject.task, [problems[problem] for problem, _ in pairs], width)
    keys = response_keys(drawing.seed, pairs)
    tokenizer = subject.task.tokenizer
    (samples,) = sample_in_chunks(subject.policy, subject.params, prompts, keys, drawing.sampler, tokenizer, 1)
    return samples


def _finish(subject: Subject, problems: Sequence[Any], batch: _Batch, present: Container[Pair]) -> list[Response]:
    """Waits for a batch and judges it; the responses in it that are not present yet."""
    asked = [problems[problem] for problem, _ in batch.pairs]
    judged = judge(subject.task, asked, [batch.samples])
    lengths = fetch(batch.samples.mask).sum(axis=1)
    answers = _answers(subject.task, asked, judged)
    return [
        Response(
            problem=problem,
            sample=sample,
            reward=float(judged.rewards[row]),
            correct=bool(judged.correct[row]),
            truncated=bool(judged.truncated[row]),
            tokens=int(lengths[row]),
            answer=answers[row],
            text=judged.texts[row],
        )
        for row, (problem, sample) in enumerate(batch.pairs)
        if (problem, sample) not in present
    ]


def _answers(task: Task, problems: list[Any], judged: Judged) -> list[str | None]:
    """What each response votes for; one that was cut off does not."""
    answers: list[str | None] = [None] * len(problems)
    if isinstance(task, Votes):
        ended = [row for row in range(len(problems)) if not judged.truncated[row]]
        given = task.answers([problems[row] for row in ended], [judged.texts[row] for row in ended])
        for row, answer in zip(ended, given, strict=True):
            answers[row] = answer
    return answers
