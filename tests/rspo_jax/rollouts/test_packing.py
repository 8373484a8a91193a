"""Packing plans against loops that walk every row and every response."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rollouts import P, R, make_rollout

from rspo_jax.rollouts import unpack
from rspo_jax.rollouts.packing import (
    balanced_parts,
    pack_rollout,
    pack_rows,
    padded_plan,
    padding_fraction,
    plan_packing,
)


def random_lengths(seed, count, prompt_width=P, response_width=R):
    rng = np.random.default_rng(seed)
    return rng.integers(1, prompt_width + 1, count), rng.integers(1, response_width + 1, count)


def long_tailed_lengths(seed, count, prompt_width=256, response_width=2048):
    """Log-normal responses, 7.5 % of them cut off at the maximum."""
    rng = np.random.default_rng(seed)
    responses = np.sort(np.ceil(rng.lognormal(np.log(600), 0.8, count)).astype(int))
    cut_off = count * 3 // 40
    responses = np.concatenate([np.minimum(responses[:-cut_off], response_width - 1), [response_width] * cut_off])
    return rng.integers(40, prompt_width + 1, count), rng.permutation(responses)


def in_parts(count, parts, seed=0):
    return np.random.default_rng(seed).permutation(count).reshape(parts, -1)


def segments_of_row(source, segment_ids):
    """(first source, tokens) of each segment, walking a row from the left; padding may stand anywhere."""
    found, previous = [], 0
    for index, segment in zip(source.tolist(), segment_ids.tolist(), strict=True):
        assert (index == -1) == (segment == 0)
        if segment and segment == previous:
            first, tokens = found[-1]
            assert index == first + tokens, "a segment is a run of consecutive tokens"
            found[-1] = (first, tokens + 1)
        elif segment:
            assert segment == len(found) + 1, "segments are numbered 1, 2, ... from the left"
            found.append((index, 1))
        previous = segment
    return found


def check_plan(plan, prompts, answers, prompt_width=P, response_width=R):
    """Every promise of a plan, by walking it."""
    width = prompt_width + response_width
    sequences = {}  # (first source, places) of each response
    for response, (prompt, answer) in enumerate(zip(prompts.tolist(), answers.tolist(), strict=True)):
        sequences[response] = (response * width + prompt_width - prompt, prompt + answer - 1)
    for part, responses in enumerate(plan.responses.tolist()):
        segments = [
            segment
            for row in range(plan.source.shape[1])
            for segment in segments_of_row(plan.source[part, row], plan.segment_ids[part, row])
        ]
        assert sorted(segments) == sorted(sequences[response] for response in responses)
        flat = plan.source[part].reshape(-1)
        for at, response in enumerate(responses):
            for token in range(response_width):
                place = plan.places[part, at, token]
                if token >= answers[response]:
                    assert place == 0
                else:
                    target = flat[place] + 1
                    assert divmod(target, width) == (response, prompt_width + token)
    assert sorted(np.ravel(plan.responses)) == list(range(len(prompts)))
    assert {array.dtype for array in plan} == {np.dtype(np.int32)}


def naive_best_fit(costs, row_length):
    """Rows that best-fit decreasing needs, trying every open row."""
    spaces = []
    for cost in sorted(costs, reverse=True):
        fitting = [row for row, space in enumerate(spaces) if space >= cost]
        if not fitting:
            spaces.append(row_length)
            fitting = [len(spaces) - 1]
        spaces[min(fitting, key=lambda row: spaces[row])] -= cost
    return len(spaces)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 12),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(0, 9),
    st.integers(1, 3),
    st.integers(0, 2**32 - 1),
)
def test_plan_keeps_its_promises(parts, size, prompt_width, response_width, more, rows_multiple, seed):
    prompts, answers = random_lengths(seed, parts * size, prompt_width, response_width)
    responses = in_parts(parts * size, parts, seed)
    row_length = int((prompts + answers - 1).max()) + more
    plan = plan_packing(prompts, answers, prompt_width, response_width, responses, row_length, rows_multiple)
    check_plan(plan, prompts, answers, prompt_width, response_width)
    np.testing.assert_array_equal(plan.responses, responses)
    num_rows = plan.source.shape[1]
    assert plan.source.shape == plan.segment_ids.shape == (parts, num_rows, row_length)
    assert plan.places.shape == (parts, size, response_width)
    needed = max(naive_best_fit((prompts + answers - 1)[part].tolist(), row_length) for part in responses)
    assert num_rows == -(-needed // rows_multiple) * rows_multiple  # so few rows are not rounded further
    started = plan.source >= 0
    assert np.all(started[..., :-1] | ~started[..., 1:]), "padding only ends a row"
    assert 1 - padding_fraction(plan) == pytest.approx((prompts + answers - 1).sum() / plan.source.size)


def test_padded_plan_is_the_rollout_as_it_stands():
    prompts, answers = random_lengths(1, 12)
    responses = in_parts(12, 3)
    plan = padded_plan(prompts, answers, P, R, responses)
    check_plan(plan, prompts, answers)
    tokens = make_rollout(2, prompts, answers).tokens
    rows = pack_rows(jnp.asarray(tokens), *map(jnp.asarray, plan[1:3]))
    is_input = (tokens[:, :-1] * tokens[:, 1:])[responses] != 0  # the last token of a sequence is only a target
    np.testing.assert_array_equal(rows.inputs, np.where(is_input, tokens[:, :-1][responses], 0))
    np.testing.assert_array_equal(rows.targets, np.where(is_input, tokens[:, 1:][responses], 0))
    np.testing.assert_array_equal(rows.segment_ids, is_input)


def test_row_length_is_the_longest_possible_sequence_unless_given():
    prompts, answers = np.array([2, 1, 3]), np.array([1, 2, 1])
    assert plan_packing(prompts, answers, P, R, [[0, 1, 2]]).source.shape == (1, 1, P + R - 1)
    assert plan_packing(prompts, answers, P, R, [[0, 1, 2]], row_length=3).source.shape == (1, 3, 3)


@pytest.mark.parametrize(
    ("needed", "rows_multiple", "rows"),
    [
        (1, 1, 1),
        (17, 1, 17),
        (31, 1, 31),
        (33, 1, 34),
        (64, 1, 64),
        (101, 1, 104),
        (130, 1, 136),
        (5, 4, 8),
        (101, 8, 104),
        (130, 3, 132),
        (300, 5, 300),
        (301, 5, 315),
    ],
)
def test_rows_are_rounded_to_few_sizes(needed, rows_multiple, rows):
    # Two of these sequences fill a row.
    ones = np.ones(2 * needed, int)
    plan = plan_packing(ones, 3 * ones, 1, 3, np.arange(2 * needed)[None, :], 6, rows_multiple)
    assert plan.source.shape == (1, rows, 6)


@pytest.mark.parametrize(("responses", "rows_multiple", "rows"), [(33, 1, 33), (101, 2, 102), (129, 1, 129)])
def test_never_more_rows_than_responses(responses, rows_multiple, rows):
    ones = np.ones(responses, int)
    plan = plan_packing(ones, 3 * ones, 1, 3, np.arange(responses)[None, :], 3, rows_multiple)
    assert plan.source.shape == (1, rows, 3)


def test_the_part_that_needs_most_sets_the_rows_of_all():
    prompts, answers = np.ones(8, int), np.array([3, 3, 3, 3, 1, 1, 1, 1])
    plan = plan_packing(prompts, answers, 1, 3, [[0, 1, 2, 3], [4, 5, 6, 7]], row_length=6)
    assert plan.source.shape == (2, 2, 6)
    assert np.count_nonzero(plan.segment_ids[1, 0]) == 4 and not plan.segment_ids[1, 1].any()
    np.testing.assert_array_equal(plan.segment_ids[1, 0], [1, 2, 3, 4, 0, 0])


@pytest.mark.parametrize("seed", range(5))
def test_little_padding_on_long_tailed_responses(seed):
    prompts, answers = long_tailed_lengths(seed, 512)
    responses = balanced_parts(prompts + answers, np.random.default_rng(seed).permutation(512), 4)
    assert padding_fraction(plan_packing(prompts, answers, 256, 2048, responses)) < 0.1
    assert padding_fraction(padded_plan(prompts, answers, 256, 2048, responses)) > 0.55


def test_same_arguments_same_plan():
    prompts, answers = random_lengths(3, 64)
    first, second = (
        plan_packing(list(prompts), list(answers), P, R, balanced_parts(prompts + answers, in_parts(64, 1)[0], 8))
        for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def naive_balanced(lengths, order, parts):
    """Longest first, ties in the order given, to the open part with the fewest tokens, ties to the first."""
    members, sums = [[] for _ in range(parts)], [0] * parts
    for at in sorted(range(len(order)), key=lambda at: (-lengths[order[at]], at)):
        part = min((p for p in range(parts) if len(members[p]) < len(order) // parts), key=lambda p: (sums[p], p))
        members[part].append(at)
        sums[part] += lengths[order[at]]
    return [[order[at] for at in sorted(part)] for part in members]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_parts_against_a_naive_search(parts, size, seed):
    rng = np.random.default_rng(seed)
    order, lengths = rng.permutation(parts * size), rng.integers(1, 12, parts * size)
    actual = balanced_parts(lengths, order, parts)
    np.testing.assert_array_equal(actual, naive_balanced(lengths, order, parts))
    assert actual.dtype == np.int32


def test_parts_are_balanced():
    prompts, answers = long_tailed_lengths(7, 512)
    lengths = prompts + answers
    sums = lengths[balanced_parts(lengths, np.arange(512), 4)].sum(axis=1)
    assert np.ptp(sums) <= 0.001 * sums.mean() < np.ptp(lengths.reshape(4, -1).sum(axis=1))


def test_one_part_keeps_its_order():
    order = np.array([3, 0, 2, 1])
    np.testing.assert_array_equal(balanced_parts([5, 1, 9, 2], order, 1), [order])


def test_the_order_decides_between_equals():
    for order in ([3, 0, 2, 1], [1, 2, 3, 0]):
        parts = balanced_parts([5, 5, 5, 5], np.array(order), 2)
        np.testing.assert_array_equal(parts, [[order[0], order[2]], [order[1], order[3]]])


def test_rows_hold_the_tokens_compiled_and_for_all_parts_at_once():
    prompts, answers = random_lengths(4, 24)
    plan = plan_packing(prompts, answers, P, R, in_parts(24, 3))
    tokens = np.arange(1, 24 * (P + R) + 1, dtype=np.int32).reshape(24, P + R)
    padding = plan.source < 0
    assert padding.any()
    for pack in (pack_rows, jax.jit(pack_rows)):
        rows = pack(jnp.asarray(tokens), *map(jnp.asarray, plan[1:3]))
        assert rows.inputs.dtype == rows.targets.dtype == jnp.int32
        np.testing.assert_array_equal(rows.inputs, np.where(padding, 0, plan.source + 1))
        np.testing.assert_array_equal(rows.targets, np.where(padding, 0, plan.source + 2))
        np.testing.assert_array_equal(rows.segment_ids, plan.segment_ids)


def test_unpack_and_its_gradient():
    prompts, answers = random_lengths(5, 12)
    plan = plan_packing(prompts, answers, P, R, np.arange(12)[None, :])
    places = plan.places[0]
    rng = np.random.default_rng(6)
    # Small integers add up exactly.
    per_token = rng.integers(-9, 10, (*plan.source.shape[1:], 2)).astype(np.float32)
    weights = rng.integers(-9, 10, (*places.shape, 2)).astype(np.float32)
    expected = np.zeros((12, R, 2), np.float32)
    expected_gradient = np.zeros_like(per_token)
    for response in range(12):
        for token in range(R):
            row, column = divmod(int(places[response, token]), per_token.shape[1])
            expected[response, token] = per_token[row, column]
            expected_gradient[row, column] += weights[response, token]
    np.testing.assert_array_equal(jax.jit(unpack)(per_token, places), expected)
    np.testing.assert_array_equal(jax.jit(unpack)(per_token[..., 0], places), expected[..., 0])
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(unpack(x, places) * weights)))(per_token)
    np.testing.assert_array_equal(gradient, expected_gradient)


def test_a_rollout_goes_into_parts():
    prompts, answers = random_lengths(8, 12)
    rollout = make_rollout(11, prompts, answers)
    plan = plan_packing(prompts, answers, P, R, in_parts(12, 3))
    batch = pack_rollout(rollout, plan)
    rows = pack_rows(jnp.asarray(rollout.tokens), *map(jnp.asarray, plan[1:3]))
    for array, expected in zip(batch.rows, rows, strict=True):
        np.testing.assert_array_equal(array, expected)
    np.testing.assert_array_equal(batch.places, plan.places)
    for part, responses in enumerate(plan.responses):
        for at, response in enumerate(responses):
            answer = answers[response]
            assert batch.advantages[part, at] == rollout.advantages[response]
            np.testing.assert_array_equal(batch.mask[part, at], np.arange(R) < answer)
            np.testing.assert_array_equal(
                batch.sampler_log_probs[part, at], rollout.sampler_log_probs[response, P - 1 :]
            )
            # The targets at the places of a response are its tokens.
            targets = unpack(batch.rows.targets[part], batch.places[part])[at]
            np.testing.assert_array_equal(targets[:answer], rollout.tokens[response, P : P + answer])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_experts_go_where_their_tokens_go(dtype):
    prompts, answers = random_lengths(13, 12)
    rollout, rng = make_rollout(14, prompts, answers), np.random.default_rng(15)
    route = rng.integers(1, np.iinfo(dtype).max, (12, 3, 2, P + R - 1)).astype(dtype)
    for plan in (
        plan_packing(prompts, answers, P, R, in_parts(12, 2), row_length=25),
        padded_plan(prompts, answers, P, R, in_parts(12, 2)),
    ):
        assert pack_rollout(rollout, plan).route is None
        packed = np.asarray(pack_rollout(rollout._replace(route=route), plan).route)
        assert packed.dtype == dtype and packed.shape == (*plan.source.shape[:2], 3, 2, plan.source.shape[2])
        for part, row, place in np.ndindex(plan.source.shape):
            source = plan.source[part, row, place]
            response, column = divmod(source, P + R)
            expected = 0 if source < 0 else route[response, :, :, column]
            np.testing.assert_array_equal(packed[part, row, :, :, place], expected)


def test_a_route_of_other_tokens_is_refused():
    prompts, answers = random_lengths(13, 12)
    rollout = make_rollout(14, prompts, answers)._replace(route=np.zeros((12, 3, 2, P + R), np.uint8))
    with pytest.raises(AssertionError, match="12, 3, 2, 12"):
        pack_rollout(rollout, padded_plan(prompts, answers, P, R, in_parts(12, 2)))


GOOD = {
    "prompt_lengths": [2, 3, 1, 5],
    "response_lengths": [1, 7, 2, 4],
    "prompt_width": P,
    "response_width": R,
    "responses": [[3, 0], [1, 2]],
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"row_length": 8}, ValueError, "row_length is 8, but the longest sequence takes 9 places: raise it to 9"),
        ({"rows_multiple": 0}, ValueError, "rows_multiple must be at least 1, got 0"),
        ({"prompt_lengths": [2, 3, 1]}, ValueError, "3 prompt_lengths but 4 response_lengths"),
        (
            {"prompt_lengths": [2, 3, 0, 5]},
            ValueError,
            "prompt_lengths .* between 1 and the width, 5; response 2 has 0",
        ),
        (
            {"prompt_lengths": [2, 6, 1, 5]},
            ValueError,
            "prompt_lengths .* between 1 and the width, 5; response 1 has 6",
        ),
        ({"response_lengths": [0, 7, 2, 4]}, ValueError, "response_lengths .* the width, 7; response 0 has 0"),
        ({"response_lengths": [1, 7, 2, 8]}, ValueError, "response_lengths .* the width, 7; response 3 has 8"),
        ({"prompt_lengths": [2.0, 3.0, 1.0, 5.0]}, TypeError, "prompt_lengths must be integers, got float64"),
        ({"response_lengths": [[1, 7, 2, 4]]}, ValueError, r"response_lengths must have 1 axes .* got shape \(1, 4\)"),
        ({"responses": [3, 0, 1, 2]}, ValueError, r"responses must have 2 axes .* got shape \(4,\)"),
        ({"responses": [[3, 0], [1, 1]]}, ValueError, "each of the 4 responses exactly once, .* 3 of them different"),
        ({"responses": [[3, 0, 1]]}, ValueError, "each of the 4 responses exactly once, 0 to 3; got 3 indices"),
        ({"responses": [[3, 0], [1, 4]]}, ValueError, "each of the 4 responses exactly once, .* from 0 to 4"),
        ({"responses": [[]]}, ValueError, r"responses must .* not be empty, got shape \(1, 0\)"),
        ({"responses": [[3.0, 0.0], [1.0, 2.0]]}, TypeError, "responses must be integers"),
        ({"prompt_width": 2**30}, ValueError, "tokens places are more than an int32 can count, 2147483647"),
        ({"row_length": 2**31}, ValueError, "rows places are more than an int32 can count, 2147483647"),
    ],
)
def test_bad_plans_are_refused(change, error, message):
    plan_packing(**GOOD)
    with pytest.raises(error, match=message):
        plan_packing(**(GOOD | change))
    if not {"row_length", "rows_multiple"} & set(change):
        with pytest.raises(error, match=message):
            padded_plan(**(GOOD | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"order": [0, 1, 2, 2]}, ValueError, "order must hold each of the 4 responses exactly once"),
        ({"order": [0, 1, 2]}, ValueError, "order must hold each of the 4 responses exactly once"),
        ({"order": [0.0, 1.0, 2.0, 3.0]}, TypeError, "order must be integers"),
        ({"lengths": [[4, 3, 2, 1]]}, ValueError, "lengths must have 1 axes"),
        ({"parts": 3}, ValueError, "4 responses do not divide into 3 parts"),
        ({"parts": 0}, ValueError, "4 responses do not divide into 0 parts"),
    ],
)
def test_bad_parts_are_refused(change, error, message):
    good = {"order": [2, 0, 1, 3], "parts": 2, "lengths": [4, 3, 2, 1]}
    balanced_parts(**good)
    with pytest.raises(error, match=message):
        balanced_parts(**(good | change))
