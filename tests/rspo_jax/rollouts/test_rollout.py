"""From problems to rollouts with a task of letters and a policy that recites the alphabet: which response belongs to
which problem, what a truncated one is worth, and where everything stands in a row. Knows no model."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles

from rspo_jax.rollouts import (
    Packing,
    ResponseLengths,
    SamplerConfig,
    assemble,
    cut,
    encode_prompts,
    encode_solutions,
    judge,
    judge_texts,
    pack,
    refilling_pays,
    sample_in_chunks,
    sample_texts,
    solve,
    usable_problems,
)
from rspo_jax.types import Judgement, ModelOutput, Samples

LETTERS = "abcdef"
PAD, EOS, FIRST = 0, 1, 2


class Letters:
    """One id a letter; the end of a sequence is no text, and nothing follows it."""

    pad_id = PAD
    eos_id, stop_ids = EOS, (EOS,)
    vocabulary_size = FIRST + len(LETTERS)

    def encode(self, text):
        return [FIRST + LETTERS.index(letter) for letter in text]

    def decode(self, ids):
        assert EOS not in ids and PAD not in ids
        return "".join(LETTERS[token - FIRST] for token in ids)


class ReciteTask:
    """Go on from the last letter of the problem up to f. Half a point for any response."""

    tokenizer = Letters()

    def problems(self, split):
        return ["a", "abc", "de", "f", "cab", "e"]

    def prompt(self, problem):
        return problem

    def solution(self, problem):
        return LETTERS[LETTERS.index(problem[-1]) + 1 :]

    def judge(self, problems, responses):
        correct = [response == self.solution(problem) for problem, response in zip(problems, responses, strict=True)]
        return [Judgement(0.5 + is_correct, is_correct) for is_correct in correct]


class AlphabetPolicy:
    """The next letter, and the end after f; the parameters are the table of next-token logits."""

    def apply(self, variables, tokens, positions=None, segment_ids=None, cache=None):
        return ModelOutput(variables["params"][tokens], None, cache)

    def init_cache(self, batch_size, length):
        return jnp.zeros((batch_size, length))

    def repeat_cache(self, cache, repeats):
        return jnp.repeat(cache, repeats, axis=0)


TASK, POLICY = ReciteTask(), AlphabetPolicy()
PROBLEMS = TASK.problems("train")
GREEDY = SamplerConfig(max_new_tokens=4, temperature=0.0)


def alphabet_table(certainty=4.0):
    table = np.random.default_rng(0).random((8, 8)).astype(np.float32)
    table[np.arange(FIRST, 8), [*range(FIRST + 1, 8), EOS]] += certainty
    table[:, PAD] = -50.0  # padding is never drawn, so that it can be told from responses
    return table


def test_prompts_are_repeated_in_place_at_one_width():
    prompts = encode_prompts(TASK, PROBLEMS[:3], 4, repeats=2)
    np.testing.assert_array_equal(prompts.tokens, np.repeat([[0, 0, 0, 2], [0, 2, 3, 4], [0, 0, 5, 6]], 2, axis=0))
    np.testing.assert_array_equal(prompts.mask, np.asarray(prompts.tokens) != PAD)
    with pytest.raises(ValueError, match="prompt 1 has 3 tokens, which does not fit the range 1 to 2"):
        encode_prompts(TASK, PROBLEMS, 2)


def test_problems_whose_prompts_are_too_long_are_left_out_and_counted():
    everything = usable_problems(TASK, PROBLEMS)
    assert everything == (PROBLEMS, 3, 0) and everything.problems is PROBLEMS
    assert usable_problems(TASK, PROBLEMS, 3) == (PROBLEMS, 3, 0)
    assert usable_problems(TASK, PROBLEMS, 2) == (["a", "de", "f", "e"], 2, 2)
    assert usable_problems(TASK, PROBLEMS, 100).width == 3  # what they need, not what they may
    with pytest.raises(ValueError, match=r"none of 2 problems .* at most max_prompt_tokens, 1: raise it to 2 or more"):
        usable_problems(TASK, ["abc", "de"], 1)
    with pytest.raises(ValueError, match="ReciteTask has no problems in this split"):
        usable_problems(TASK, [])


def samples(*responses):
    """Responses of at most four tokens, as text; "." is the end of a sequence."""
    ids = [[EOS if letter == "." else FIRST + LETTERS.index(letter) for letter in text] for text in responses]
    tokens = np.array([row + [PAD] * (4 - len(row)) for row in ids], np.int32)
    mask = np.arange(4) < np.array([[len(row)] for row in ids])
    return Samples(jnp.asarray(tokens), jnp.asarray(mask), jnp.where(mask, -0.25, 0.0))


def test_judging():
    problems = ["c", "b", "e", "f", "f", "d"]
    chunks = [samples("def.", "cdef", "f."), samples(".", "a.", "efab")]
    judged = judge(TASK, problems, chunks)
    assert judged.texts == ["def", "cdef", "f", "", "a", "efab"]
    np.testing.assert_array_equal(judged.truncated, [False, True, False, False, False, True])
    # "cdef" would be right, but was cut off before its end.
    np.testing.assert_array_equal(judged.correct, [True, False, True, True, False, False])
    np.testing.assert_array_equal(judged.rewards, np.array([1.5, 0, 1.5, 1.5, 0.5, 0], np.float32))
    assert (judged.rewards.dtype, judged.correct.dtype, judged.truncated.dtype) == (np.float32, bool, bool)


def test_a_truncated_response_is_not_shown_to_the_judge():
    class StrictTask(ReciteTask):
        def judge(self, problems, responses):
            raise AssertionError(responses)

    assert judge(StrictTask(), ["b"], [samples("cdef")]).rewards == [0]


def test_the_judge_is_called_once_a_chunk():
    class CountingTask(ReciteTask):
        def judge(self, problems, responses):
            calls.append((problems, responses))
            return super().judge(problems, responses)

    calls = []
    judge(CountingTask(), ["c", "b", "e", "f"], [samples("def.", "cdef"), samples("f.", "a.")])
    assert calls == [(["c"], ["def"]), (["e", "f"], ["f", "a"])]


def test_responses_that_the_judge_gave_up_on_are_told_apart():
    class LimitedTask(ReciteTask):
        def judge(self, problems, responses):
            return [Judgement(-1.0, False, unjudged=response == "f") for response in responses]

    judged = judge(LimitedTask(), ["e", "c", "c"], [samples("f.", "def.", "def")])
    np.testing.assert_array_equal(judged.unjudged, [True, False, False])
    np.testing.assert_array_equal(judged.rewards, [-1, -1, 0])


def test_rows_without_a_problem_are_not_judged():
    judged = judge(TASK, ["c", "b", "e"], [samples("def.", "cdef"), samples("f.", "a."), samples("f.", "a.")])
    np.testing.assert_array_equal(judged.rewards, np.array([1.5, 0, 1.5, 0, 0, 0], np.float32))
    assert judged.texts[3:] == ["", "", ""]


def test_responses_without_the_text_to_judge_after_are_counted():
    class MarkedTask(ReciteTask):
        def judge(self, problems, responses):
            return [Judgement(0.0, False, unmarked=response == "f") for response in responses]

    judged = judge(MarkedTask(), ["e", "c", "c"], [samples("f.", "def.", "def")])
    np.testing.assert_array_equal(judged.unmarked, [True, False, False])


class RewardedTask(ReciteTask):
    """Two rewards: one for the length, and one for an f, which does not apply to the empty response. A response of b's
    is left out. It does not tell which ones are correct."""

    reward_names, tells_correct, judges_truncated = ("length", "f"), False, True

    def judge(self, problems, responses):
        judged = []
        for text in responses:
            parts = (float(len(text)), float("f" in text) if text else float("nan"))
            judged.append(Judgement(np.nansum(parts).item(), False, left_out="b" in text, parts=parts))
        return judged


def test_rewards_of_their_own_names():
    judged = judge(RewardedTask(), ["c"] * 4, [samples("def.", "cdef"), samples(".", "bf.")])
    assert judged.correct is None
    np.testing.assert_array_equal(judged.truncated, [False, True, False, False])
    np.testing.assert_array_equal(judged.left_out, [False, False, False, True])
    np.testing.assert_array_equal(judged.parts, np.array([[3, 1], [4, 1], [0, np.nan], [2, 1]], np.float32))
    np.testing.assert_array_equal(judged.rewards, np.array([4, 5, 0, 0], np.float32))  # 0 for what is left out
    # Another task is not asked about what was cut off: no reward applies, and the whole is 0.
    stricter = type("Stricter", (RewardedTask,), {"judges_truncated": False, "tells_correct": True})()
    judged = judge(stricter, ["c"] * 2, [samples("def.", "cdef")])
    np.testing.assert_array_equal(judged.parts, np.array([[3, 1], [np.nan, np.nan]], np.float32))
    np.testing.assert_array_equal(judged.rewards, [4, 0])
    np.testing.assert_array_equal(judged.correct, [False, False])
    solved = solve(POLICY, alphabet_table(), RewardedTask(), ["abc", "e", "d"], jax.random.key(0), GREEDY, 3)
    assert solved.correct is None and solved.parts.shape == (3, 2) and solved.texts == ["def", "f", "ef"]


@pytest.mark.parametrize(
    ("judgement", "message"),
    [
        (
            Judgement(1.0, True, parts=(1.0,)),
            "gave a response 1 parts, but the task names 2 rewards: length, f;",
        ),
        (Judgement(1.0, True), "gave a response 0 parts, but the task names 2 rewards"),
        (
            Judgement(1.0, True, parts=(1.0, math.inf)),
            r"to the response 'f', with the parts \(1\.0, inf",
        ),
        (Judgement(math.nan, True, parts=(1.0, 1.0)), "rewards must be finite in float32"),
    ],
)
def test_mistakes_of_a_task_that_names_its_rewards(judgement, message):
    class Broken(RewardedTask):
        def judge(self, problems, responses):
            return [judgement] * len(responses)

    with pytest.raises(ValueError, match=message):
        judge(Broken(), ["e"], [samples("f.")])


def test_a_judge_may_look_at_the_tokens():
    class TokensTask(ReciteTask):
        def judge_tokens(self, problems, responses, token_ids):
            seen.append((list(problems), list(responses), list(token_ids)))
            return [Judgement(float(len(ids)), False) for ids in token_ids]

    seen = []
    judged = judge(TokensTask(), ["c", "c", "e"], [samples("def.", "cdef", "f.")])
    np.testing.assert_array_equal(judged.rewards, [4, 0, 2])
    assert seen == [(["c", "e"], ["def", "f"], [[5, 6, 7, EOS], [7, EOS]])]
    # Where only texts are known, the other judge is asked.
    np.testing.assert_array_equal(judge_texts(TokensTask(), ["e"], ["f"])[:, 0], [1.5])


def test_texts_for_prompts_without_a_task():
    texts = sample_texts(POLICY, alphabet_table(), Letters(), ["abc", "e", "f"], jax.random.key(0), GREEDY)
    assert texts == ["def", "f", ""]


class Pairs(Letters):
    """Every id stands for its letter twice, so that a stop string may end within a token."""

    stop_strings = ("eef", "dc")

    def decode(self, ids):
        return "".join(2 * letter for letter in super().decode(ids))


class PairsTask(ReciteTask):
    tokenizer = Pairs()


def test_a_stop_string_ends_a_response_before_it():
    drawn = ["defa", "def.", "edcb", "def", "ffff", "ed.", "dc.", "dcef"]
    judged = judge(PairsTask(), ["c"] * 8, [samples(*drawn)])
    assert judged.texts == ["dd", "dd", "eed", "dd", "ffffffff", "eedd", "d", "d"]
    np.testing.assert_array_equal(judged.lengths, [3, 3, 3, 3, 4, 3, 2, 2])
    np.testing.assert_array_equal(judged.truncated, [False] * 4 + [True] + [False] * 3)
    # An evaluation, without stop strings, counts all that was drawn.
    np.testing.assert_array_equal(judge(TASK, ["c"] * 2, [samples("def.", "de")]).lengths, [4, 2])


def test_what_was_drawn_after_a_stop_string_is_cut():
    chunks = [samples("defa", "def.", "ab", "ffff")]
    rollout = assemble(encode_prompts(TASK, ["abc", "c", "c", "e"], 3), chunks)
    shorter = cut(rollout, np.array([3, 3, 2, 1], np.int32))
    expected = assemble(encode_prompts(TASK, ["abc", "c", "c", "e"], 3), [samples("def", "def", "ab", "f")])
    np.testing.assert_array_equal(shorter.mask, expected.mask)
    np.testing.assert_array_equal(shorter.segment_ids, expected.segment_ids)
    np.testing.assert_array_equal(shorter.tokens, rollout.tokens)


def test_any_stop_token_ends_a_response():
    class ManyStops(Letters):
        stop_ids = (EOS, FIRST + LETTERS.index("f"))

    class ManyStopsTask(ReciteTask):
        tokenizer = ManyStops()

    judged = judge(ManyStopsTask(), ["c", "c", "c", "c"], [samples("def", "de.", "de", "df.")])
    assert judged.texts == ["de", "de", "de", "df"]
    np.testing.assert_array_equal(judged.truncated, [False, False, True, False])


RIGHT = Judgement(1.0, True)


@pytest.mark.parametrize(
    ("judgements", "message"),
    [
        ([], r"Broken\.judge was given 2 responses and returned a list of 0, of type none: return one Judgement"),
        ([RIGHT] * 3, "was given 2 responses and returned a list of 3, of type Judgement: return one Judgement for"),
        ([1.0, 0.0], "was given 2 responses and returned a list of 2, of type float: return one Judgement for each"),
        ([RIGHT, Judgement(float("nan"), False)], r"Broken\.judge gave the reward nan to the response 'f'"),
        ([Judgement(float("inf"), True), RIGHT], "the reward inf to the response 'def': rewards must be finite"),
        ([RIGHT, Judgement(-1e39, True)], r"the reward -1e\+39 to the response 'f': rewards must be finite in float32"),
    ],
)
def test_mistakes_of_a_task(judgements, message):
    class Broken(ReciteTask):
        def judge(self, problems, responses):
            return judgements

    with pytest.raises(ValueError, match=message):
        judge(Broken(), ["c", "b", "e"], [samples("def.", "cdef", "f.")])


def test_assembling_aligns_everything_with_the_targets():
    prompts = encode_prompts(TASK, ["abc", "d", "ef"], 3)
    chunks = [samples("def.", "ef."), samples("a")]
    chunks[0] = chunks[0]._replace(log_probs=jnp.array([[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0, -7.0, 0.0]]))
    batch = assemble(prompts, chunks)
    np.testing.assert_array_equal(batch.tokens, [[2, 3, 4, 5, 6, 7, 1], [0, 0, 5, 6, 7, 1, 0], [0, 6, 7, 2, 0, 0, 0]])
    np.testing.assert_array_equal(
        batch.segment_ids, [[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0, 0]]
    )
    np.testing.assert_array_equal(batch.mask, [[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0], [0, 0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(
        batch.sampler_log_probs, [[0, 0, -1, -2, -3, -4], [0, 0, -5, -6, -7, 0], [0, 0, -0.25, 0, 0, 0]]
    )
    np.testing.assert_array_equal(batch.advantages, [0, 0, 0])
    dtypes = [array.dtype for array in batch[:5]]
    assert dtypes == [jnp.int32, jnp.int32, jnp.bool_, jnp.float32, jnp.float32]
    assert batch.route is None
    # A recorded route is aligned with the inputs of whole rows already.
    route = np.random.default_rng(0).integers(0, 9, (3, 2, 2, 6)).astype(np.uint8)
    chunks = [chunk._replace(route=part) for chunk, part in zip(chunks, (route[:2], route[2:]), strict=True)]
    np.testing.assert_array_equal(assemble(prompts, chunks).route, route)


def test_a_route_is_recorded_only_on_request():
    class NotingPolicy(AlphabetPolicy):
        def apply(self, *arguments, router_reader=None, **options):
            readers.append(router_reader is not None)
            return super().apply(*arguments, **options)

    readers, keys = [], jax.random.split(jax.random.key(0), 1)
    arguments = (encode_prompts(TASK, ["a"], 1), keys, GREEDY, TASK.tokenizer, 1)
    assert sample_in_chunks(NotingPolicy(), alphabet_table(), *arguments)[0].route is None
    assert set(readers) == {False}
    with pytest.raises(ValueError, match="this model has no experts"):
        sample_in_chunks(NotingPolicy(), alphabet_table(), *arguments, record_route=True)
    assert readers[-1]


def test_chunks_keep_the_order_of_rows_and_are_assembled_where_they_were_drawn():
    table = alphabet_table(certainty=1.0)
    prompts = encode_prompts(TASK, PROBLEMS, 3, repeats=2)
    config = SamplerConfig(max_new_tokens=4)
    chunks = sample_in_chunks(
        POLICY, table, prompts, jax.random.split(jax.random.key(0), 12), config, TASK.tokenizer, chunks=3
    )
    assert [chunk.tokens.shape for chunk in chunks] == [(4, 4)] * 3
    assert len({np.asarray(chunk.tokens).tobytes() for chunk in chunks}) == 3
    batch = jax.tree.map(np.asarray, assemble(prompts, chunks))
    np.testing.assert_array_equal(batch.tokens[:, :3], prompts.tokens)
    np.testing.assert_array_equal(batch.mask, np.pad(batch.tokens[:, 3:] != PAD, ((0, 0), (2, 0))))
    np.testing.assert_array_equal(batch.segment_ids, batch.tokens != PAD)
    # What the policy says of each target, found where the trainer will look for it.
    log_probs = oracles.log_softmax(table)[batch.tokens[:, :-1], batch.tokens[:, 1:]]
    np.testing.assert_allclose(batch.sampler_log_probs, np.where(batch.mask, log_probs, 0), rtol=0, atol=1e-5)


def test_solutions_are_a_rollout():
    batch = encode_solutions(TASK, ["abc", "d", "f"], 3, 4)
    np.testing.assert_array_equal(batch.tokens, [[2, 3, 4, 5, 6, 7, 1], [0, 0, 5, 6, 7, 1, 0], [0, 0, 7, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch.segment_ids, np.asarray(batch.tokens) != PAD)
    np.testing.assert_array_equal(batch.mask, [[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0], [0, 0, 1, 0, 0, 0]])


@pytest.mark.parametrize(("mini_batches", "micro_batches"), [(1, 1), (3, 1), (2, 3), (1, 6)])
@pytest.mark.parametrize("row_length", [None, 13])
def test_packing_keeps_every_response_with_its_own(mini_batches, micro_batches, row_length):
    chunks = [samples("def.", "ef.", "a"), samples("bc.", "f.", "cdef")]
    prompts = encode_prompts(TASK, ["abc", "d", "ef", "ca", "e", "fab"], 3)
    rollout = assemble(prompts, chunks)._replace(advantages=jnp.arange(6, dtype=jnp.float32))
    order = np.array([3, 1, 5, 0, 2, 4])
    batch, metrics = pack(rollout, 4, order, Packing(mini_batches, micro_batches, row_length))
    parts = mini_batches * micro_batches
    assert batch.mask.shape == (parts, 6 // parts, 4) and batch.rows.inputs.shape[-1] == (row_length or 6)
    rows = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(parts, -1), batch.rows)
    seen = []
    for part in range(parts):
        for line, mask in enumerate(np.asarray(batch.mask[part])):
            response = int(batch.advantages[part, line])
            seen.append(response)
            np.testing.assert_array_equal(mask, rollout.mask[response, -4:])
            places = np.asarray(batch.places[part, line])[mask]
            np.testing.assert_array_equal(rows.targets[part][places], rollout.tokens[response, 3:][mask])
            np.testing.assert_array_equal(rows.inputs[part][places], rollout.tokens[response, 2:-1][mask])
            log_probs = rollout.sampler_log_probs[response, -4:]
            np.testing.assert_array_equal(batch.sampler_log_probs[part, line], log_probs)
    assert sorted(seen) == list(range(6))
    assert set(metrics) == {"padding_fraction"}
    assert metrics["padding_fraction"] == pytest.approx(np.mean(rows.segment_ids == 0))


def test_what_is_drawn_does_not_depend_on_the_chunks():
    prompts = encode_prompts(TASK, ["a"], 1, repeats=12)
    config = SamplerConfig(max_new_tokens=4)
    keys, flat = jax.random.split(jax.random.key(1), 12), np.zeros((8, 8), np.float32)
    drawn = []
    for chunks in (1, 3, 4):
        parts = sample_in_chunks(POLICY, flat, prompts, keys, config, TASK.tokenizer, chunks)
        assert len(parts) == chunks
        drawn.append(np.concatenate([np.asarray(part.tokens) for part in parts]))
    np.testing.assert_array_equal(drawn[1], drawn[0])
    np.testing.assert_array_equal(drawn[2], drawn[0])
    assert len({tuple(row) for row in drawn[0]}) > 6


@pytest.mark.parametrize(
    ("mean_prompt", "mean", "longest", "pays"),
    [(8, 21.5, 128, True), (14, 9, 20, False), (0, 0, 0, False), (6, 4, 10, False), (5, 4, 10, True)],
)
def test_when_refilling_pays(mean_prompt, mean, longest, pays):
    assert refilling_pays(mean_prompt, ResponseLengths(np.float32(mean), np.float32(longest))) is pays


@pytest.mark.parametrize("count", [1, 6, 700])
def test_solving_any_number_of_problems(count):
    problems = [PROBLEMS[index] for index in np.random.default_rng(3).integers(0, len(PROBLEMS), count)]
    judged = solve(POLICY, alphabet_table(), TASK, problems, jax.random.key(0), GREEDY, width=3)
    solutions = [TASK.solution(problem) for problem in problems]
    fits = np.array([len(solution) < 4 for solution in solutions])
    assert judged.texts == [solution[:4] for solution in solutions]
    np.testing.assert_array_equal(judged.truncated, ~fits)
    np.testing.assert_array_equal(judged.correct, fits)
    np.testing.assert_array_equal(judged.rewards, np.where(fits, 1.5, 0))
