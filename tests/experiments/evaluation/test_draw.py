"""Responses that an evaluation draws: one that was interrupted ends like one that was not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from experiments.evaluation import draw
from experiments.evaluation.draw import Drawing, draw_missing, response_keys, wanted_pairs
from experiments.evaluation.subject import Subject
from experiments.tasks.countdown import CharacterTokenizer
from rspo_jax.rollouts import SamplerConfig
from rspo_jax.types import Judgement, ModelOutput

PROBLEMS = ["1+1=", "2*3=", "9=", "10-2=", "7+8="]
DRAWING = Drawing(SamplerConfig(max_new_tokens=5), samples=3, batch=4, seed=6)


class DigitTask:
    """A task in which a response is right if it contains a digit, and votes for its first digit."""

    tokenizer = CharacterTokenizer()

    def prompt(self, problem):
        return problem

    def judge(self, problems, responses):
        assert len(problems) == len(responses)
        return [Judgement(len(response) / 8, self._digit(response) is not None) for response in responses]

    def answers(self, problems, responses):
        assert len(problems) == len(responses)
        return [self._digit(response) for response in responses]

    def _digit(self, response):
        return next((character for character in response if character.isdigit()), None)


class TablePolicy:
    """A policy whose next token depends only on the last one; its parameters are the table of logits."""

    def apply(self, variables, tokens, positions=None, segment_ids=None, cache=None):
        return ModelOutput(variables["params"][tokens], None, cache)

    def init_cache(self, batch_size, length):
        return jnp.zeros((batch_size, length))

    def repeat_cache(self, cache, repeats):
        return cache


@pytest.fixture(scope="module")
def subject():
    size = CharacterTokenizer.vocabulary_size
    table = 2 * jax.random.normal(jax.random.key(1), (size, size)) + jnp.where(jnp.arange(size) == 1, 3.0, 0.0)[None, :]
    return Subject("", {}, TablePolicy(), table, DigitTask(), 5, None, epath.Path("."))  # pyright: ignore[reportArgumentType]


def drawn(subject, drawing=DRAWING, present=()):
    """Return the batches that were handed on."""
    batches = []
    draw_missing(subject, PROBLEMS, drawing, set(present), batches.append)
    return batches


def by_pair(*batches):
    responses = [response for batch in batches for response in batch]
    pairs = {(response.problem, response.sample): response for response in responses}
    assert len(pairs) == len(responses)
    return pairs


@pytest.fixture(scope="module")
def whole(subject):
    return drawn(subject)


def test_every_response_once_and_the_first_samples_first(whole):
    assert [len(batch) for batch in whole] == [4, 4, 4, 3]
    assert list(by_pair(*whole)) == wanted_pairs(5, 3) == [(p, s) for s in range(3) for p in range(5)]


def test_what_a_response_says_of_itself(whole):
    task = DigitTask()
    responses = by_pair(*whole).values()
    for response in responses:
        ids = task.tokenizer.encode(response.text)
        padding = response.tokens - len(ids) - (not response.truncated)
        assert padding >= 0  # the padding token may be drawn; it has no text
        if response.truncated:
            assert (response.tokens, response.reward, response.correct, response.answer) == (5, 0.0, False, None)
        else:
            assert response.reward == len(response.text) / 8
            assert response.correct == (response.answer is not None)
            assert response.answer == task.answers([None], [response.text])[0]
    assert {response.truncated for response in responses} == {True, False}
    assert len({response.text for response in responses}) > 5


def test_interrupted_after_each_batch_it_goes_on_as_if_it_had_not_been(subject, whole):
    for done in range(5):
        before = whole[:done]
        assert by_pair(*before, *drawn(subject, present=by_pair(*before))) == by_pair(*whole)


def test_batches_of_which_lines_are_missing_are_made_whole(subject, whole, monkeypatch):
    rows = []
    real = draw.sample_in_chunks
    monkeypatch.setattr(draw, "sample_in_chunks", lambda *args: rows.append(args[2].tokens.shape[0]) or real(*args))
    everything = by_pair(*whole)
    missing = [(1, 0), (4, 1), (4, 2)]
    present = everything.keys() - set(missing)
    found = by_pair(*drawn(subject, present=present))
    assert found == {pair: everything[pair] for pair in missing}
    assert rows == [4, 4, 4]  # nothing of the second batch was missing
    assert drawn(subject, present=everything) == []


def test_more_samples_later(subject, whole):
    more = by_pair(*drawn(subject, Drawing(DRAWING.sampler, 4, DRAWING.batch, DRAWING.seed), by_pair(*whole)))
    assert list(more) == [(problem, 3) for problem in range(5)]


def test_batches_of_another_size_say_the_same(subject, whole):
    other = by_pair(*drawn(subject, Drawing(DRAWING.sampler, 3, 100, DRAWING.seed)))
    assert {pair: one.text for pair, one in other.items()} == {p: one.text for p, one in by_pair(*whole).items()}


def test_keys_depend_on_seed_problem_and_sample_alone():
    pairs = [(problem, sample) for problem in range(9) for sample in range(7)]

    def key_data(seed, pairs):
        return [tuple(row) for row in np.asarray(jax.random.key_data(response_keys(seed, pairs))).tolist()]

    data = key_data(3, pairs)
    assert len(set(data)) == len(pairs)
    assert key_data(3, pairs[::-1]) == data[::-1]
    assert not set(key_data(4, pairs)) & set(data)


def test_another_seed_draws_otherwise(subject, whole):
    other = by_pair(*drawn(subject, Drawing(DRAWING.sampler, 3, DRAWING.batch, seed=7)))
    assert [one.text for one in other.values()] != [one.text for one in by_pair(*whole).values()]


def test_an_interruption_between_batches_keeps_what_was_drawn(subject, whole):
    batches = []

    def keep(responses):
        batches.append(responses)
        if len(batches) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_missing(subject, PROBLEMS, DRAWING, set(), keep)
    assert batches == whole[:2]
