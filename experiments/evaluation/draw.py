"""Drawing and judging of the responses that an evaluation still lacks, batch after batch.

The key of a response depends only on seed, problem and sample, and the batches only on the numbers of problems and
samples, not on which responses were drawn before. An interrupted evaluation therefore ends with the same responses as
one that was not interrupted, bit for bit.
"""

import dataclasses
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.evaluation.responses import Response
from experiments.evaluation.subject import Subject, Votes
from rspo_jax.rollouts import (
    FirstTurns,
    SamplerConfig,
    converse,
    encode_prompts,
    judge,
    judge_texts,
    limits_of,
    sample_in_chunks,
    tells_correct,
    usable_problems,
)
from rspo_jax.sharding import parts_of
from rspo_jax.types import Array, ConversationTask, Judgement, Task, TruncatedTask

Pair = tuple[int, int]
"""Index of a problem, and index of a response to it."""


@dataclass(frozen=True)
class Drawing:
    """Settings with which responses are drawn."""

    sampler: SamplerConfig
    samples: int
    """Number of responses to each problem."""
    batch: int
    """Number of responses that are drawn at once."""
    seed: int


def wanted_pairs(problems: int, samples: int) -> list[Pair]:
    """Return all pairs in the order in which they are drawn.

    The first sample of every problem comes first, so that asking for more samples later changes no batch but the last.
    """
    return [(problem, sample) for sample in range(samples) for problem in range(problems)]


def response_keys(seed: int, pairs: Sequence[Pair]) -> Array:
    """Return one PRNG key per response, [B]."""
    key = jax.random.key(seed)
    problems, samples = (jnp.asarray(column, jnp.int32) for column in zip(*pairs, strict=True))
    return jax.vmap(lambda problem, sample: jax.random.fold_in(jax.random.fold_in(key, problem), sample))(
        problems, samples
    )


class _Batch(NamedTuple):
    """A batch that the device is still drawing."""

    pairs: list[Pair]
    """Pairs of the first rows; the other rows only fill up the last batch."""
    first: FirstTurns
    """The responses; of conversations, the first turns."""


def draw_missing(
    subject: Subject,
    problems: Sequence[Any],
    drawing: Drawing,
    present: Container[Pair],
    keep: Callable[[list[Response]], None],
) -> None:
    """Draw all responses that are not present, and hand them on batch by batch.

    Args:
      subject: the model and its task; its parameters are on the mesh in use.
      problems: all problems of the evaluation.
      drawing: settings.
      present: pairs that were drawn before with the same settings. A batch of which some are missing is drawn again as
        a whole, so that every row has the same neighbours as before.
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
        # Filled up with copies, so that only one shape is compiled and no response is longer than the batch's own.
        filled = own + [own[-1]] * (rows - len(own))
        prompts = encode_prompts(subject.task, [problems[problem] for problem, _ in filled], width)
        keys, tokenizer = response_keys(drawing.seed, filled), subject.task.tokenizer
        (samples,) = sample_in_chunks(subject.policy, subject.params, prompts, keys, drawing.sampler, tokenizer, 1)
        if waiting is not None:
            keep(_judge_batch(subject, problems, drawing.sampler, waiting, present))
        waiting = _Batch(own, FirstTurns(prompts, keys, [samples]))
    if waiting is not None:
        keep(_judge_batch(subject, problems, drawing.sampler, waiting, present))


def _judge_batch(
    subject: Subject, problems: Sequence[Any], sampler: SamplerConfig, batch: _Batch, present: Container[Pair]
) -> list[Response]:
    """Wait for a batch, going on with conversations, and judge it; return its responses that are not present yet."""
    task, asked = subject.task, [problems[problem] for problem, _ in batch.pairs]
    if isinstance(task, ConversationTask):
        limits = limits_of(task, sampler, subject.conversation)
        judged = judge(task, asked, converse(subject.policy, subject.params, task, asked, batch.first, sampler, limits))
    else:
        judged = judge(task, asked, batch.first.chunks)
    turns = None if judged.turns is None else [tuple(texts) for texts in judged.turns.texts]
    answers = _answers(task, asked, turns or judged.texts, judged.truncated)
    return [
        Response(
            problem=problem,
            sample=sample,
            reward=float(judged.rewards[row]),
            correct=None if judged.correct is None else bool(judged.correct[row]),
            truncated=bool(judged.truncated[row]),
            tokens=int(judged.lengths[row]),
            unmarked=bool(judged.unmarked[row]),
            left_out=bool(judged.left_out[row]),
            answer=answers[row],
            text=judged.texts[row],
            turns=None if turns is None else turns[row],
        )
        for row, (problem, sample) in enumerate(batch.pairs)
        if (problem, sample) not in present
    ]


def judge_again(task: Task, problems: Sequence[Any], responses: Sequence[Response]) -> list[Response]:
    """Return responses with the verdicts that the task gives now.

    Args:
      task: the judge.
      problems: all problems of the evaluation.
      responses: responses that were drawn before.

    Raises:
      ValueError: if a response is to a problem that does not exist, or the task's judgements are wrong.
    """
    if strange := [response.problem for response in responses if response.problem >= len(problems)]:
        raise ValueError(f"there is a response to problem {strange[0]}, but there are only {len(problems)} problems")
    asked = [problems[response.problem] for response in responses]
    texts = [response.text if response.turns is None else response.turns for response in responses]
    truncated = np.array([response.truncated for response in responses], bool)
    judged = np.flatnonzero(~truncated | (isinstance(task, TruncatedTask) and task.judges_truncated))
    verdicts = np.zeros((len(responses), 5), np.float32)
    if judged.size:
        verdicts[judged] = judge_texts(task, [asked[row] for row in judged], [texts[row] for row in judged])[:, :5]
    answers, told = _answers(task, asked, texts, truncated), tells_correct(task)
    judgements = [
        Judgement(row[0], bool(row[1]), bool(row[2]), bool(row[3]), bool(row[4])) for row in verdicts.tolist()
    ]
    return [
        dataclasses.replace(
            response,
            reward=judgement.reward,
            correct=judgement.correct if told else None,
            unmarked=judgement.unmarked,
            left_out=judgement.left_out,
            answer=answer,
        )
        for response, judgement, answer in zip(responses, judgements, answers, strict=True)
    ]


def _answers(
    task: Task, problems: Sequence[Any], texts: Sequence[Any], truncated: Sequence[bool] | np.ndarray
) -> list[str | None]:
    """Return the answer that each response votes for; a response that was cut off does not vote."""
    answers: list[str | None] = [None] * len(problems)
    if isinstance(task, Votes):
        ended = [row for row in range(len(problems)) if not truncated[row]]
        given = task.answers([problems[row] for row in ended], [texts[row] for row in ended])
        for row, answer in zip(ended, given, strict=True):
            answers[row] = answer
    return answers
