"""Packing of responses of different lengths into rows, so that a model spends less of its time on padding.

The host plans from lengths alone, in NumPy. The device only gathers: tokens into rows before the model runs, and its
outputs back into one line a response afterwards. The losses never see a row.

The planner is our own because libraries for packing (such as Grain's) stream examples into rows in the order they come;
here all parts of an update need equally many rows of one shape, and each response has to be found again.

Letters: B responses of a rollout, b of them in a part, P prompt and R response columns, W = P + R, N rows of T places.
A sequence of p prompt tokens and r response tokens takes p + r − 1 places: its last token is only ever a target.
"""

import bisect
import functools
import heapq
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rspo_jax.routing import ROUTE_AXES
from rspo_jax.sharding import constrain, fetch, parts_of
from rspo_jax.types import Array, PackedBatch, PackedRows, RolloutBatch

_INT32_MAX = np.iinfo(np.int32).max


class PackingPlan(NamedTuple):
    """The place of every token in the rows of each part of a rollout.

    NumPy arrays from the planner. Every array leads with the parts, so that `jax.lax.scan` or indexing cuts all alike.
    """

    responses: Any
    """int32 [parts, b]: the responses of the rollout that each part holds, in order."""
    source: Any
    """int32 [parts, N, T]: the flat index into `tokens` [B, W] of the input at each place; its target is the next
    token there. −1 on padding."""
    segment_ids: Any
    """int32 [parts, N, T]: 1, 2, … within a row, 0 on padding."""
    places: Any
    """int32 [parts, b, R]: the flat index into [N, T] of the place that scores each response token; 0 where a response
    has no such token."""


class Packing(NamedTuple):
    """The shape of the updates that a rollout is cut into."""

    mini_batches: int = 1
    micro_batches: int = 1
    """Parts of each mini-batch."""
    row_length: int | None = None
    """Places of a row, T; None for P + R − 1, which fits any sequence."""


class _Lengths(NamedTuple):
    """The checked arguments of a plan."""

    prompts: np.ndarray  # [B]
    responses: np.ndarray  # [B]
    prompt_width: int
    response_width: int

    @property
    def costs(self) -> np.ndarray:
        """Places that each sequence takes, [B]."""
        return self.prompts + self.responses - 1


def pack(
    rollout: RolloutBatch, response_width: int, order: np.ndarray, packing: Packing
) -> tuple[PackedBatch, dict[str, float]]:
    """Cut a rollout into parts and pack the responses of each part into rows.

    Args:
      rollout: B responses.
      response_width: R, the number of its last columns that hold responses.
      order: int [B], a permutation, which makes the cut random; see `balanced_parts`.
      packing: number of parts and length of a row.

    Returns:
      The parts, [mini_batches · micro_batches, ...], those of a mini-batch one after the other, and the metric
      `padding_fraction`, the share of places in all rows that hold no token.
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


def plan_packing(
    prompt_lengths: Any,
    response_lengths: Any,
    prompt_width: int,
    response_width: int,
    responses: Any,
    row_length: int | None = None,
    rows_multiple: int = 1,
) -> PackingPlan:
    """Pack the responses of each part into as few rows as best-fit decreasing needs; a response is never split.

    All parts get the same number of rows N: the number that the largest part needs, rounded up by at most a sixteenth
    (or to `rows_multiple`), so that rollouts of about the same length share one compiled program. N never exceeds one
    row a response. The plan is a pure function of its arguments.

    Args:
      prompt_lengths: int [B], each in [1, P]. Prompts end at column P − 1 of the rollout.
      response_lengths: int [B], each in [1, R]. Responses start at column P.
      prompt_width: P.
      response_width: R.
      responses: int [parts, b], from `balanced_parts`: the responses of each part; every response is in exactly one.
      row_length: T; None for P + R − 1, which fits any sequence.
      rows_multiple: divisor of N, such as the number of devices that share the rows.

    Returns:
      The plan, in NumPy.

    Raises:
      TypeError: naming the argument that is not an integer array.
      ValueError: naming the argument that does not fit and, for `row_length`, the length needed.
    """
    lengths, responses = _checked(prompt_lengths, response_lengths, prompt_width, response_width, responses)
    row_length = prompt_width + response_width - 1 if row_length is None else row_length
    if lengths.costs.max() > row_length:
        raise ValueError(
            f"row_length is {row_length}, but the longest sequence takes {lengths.costs.max()} places: "
            f"raise it to {lengths.costs.max()} or more"
        )
    if rows_multiple < 1:
        raise ValueError(f"rows_multiple must be at least 1, got {rows_multiple}")
    placed = [_best_fit(lengths.costs[part], row_length) for part in responses]
    needed = max(int(rows.max()) + 1 for rows, _ in placed)
    # One of sixteen sizes between a power of two and the next: few programs, and little waste.
    size = max((1 << (needed.bit_length() - 1)) // 16 // rows_multiple, 1) * rows_multiple
    num_rows = min(-(-needed // size) * size, -(-responses.shape[1] // rows_multiple) * rows_multiple)
    rows, offsets = (np.stack(arrays) for arrays in zip(*placed, strict=True))
    return _fill(lengths, responses, rows, offsets, (num_rows, row_length))


def padded_plan(
    prompt_lengths: Any, response_lengths: Any, prompt_width: int, response_width: int, responses: Any
) -> PackingPlan:
    """Return the plan without packing: row i of a part is its response i, padded as in the rollout; N = b, T = W − 1.

    Packing is measured against it. Arguments and errors as in `plan_packing`.
    """
    lengths, responses = _checked(prompt_lengths, response_lengths, prompt_width, response_width, responses)
    rows = np.broadcast_to(np.arange(responses.shape[1])[None, :], responses.shape)
    offsets = prompt_width - lengths.prompts[responses]
    return _fill(lengths, responses, rows, offsets, (responses.shape[1], prompt_width + response_width - 1))


def balanced_parts(lengths: Any, order: Any, parts: int) -> np.ndarray:
    """Distribute responses over parts of equal count and nearly equal token sums, which then need equally many rows.

    The longest response goes first, to the part with the fewest tokens so far that still has room. `order`, random for
    updates, decides between equals, and responses keep it inside a part. An update thus sees a random sample whose mix
    of lengths is that of the whole rollout.

    Args:
      lengths: int [B], tokens of each response, prompt included.
      order: int [B], a permutation.
      parts: number of parts; must divide B.

    Returns:
      int32 [parts, b], the `responses` of a plan.

    Raises:
      TypeError: naming the argument that is not an integer array.
      ValueError: if `order` is not a permutation, the parts do not divide it, or there is not one length a response.
    """
    order, lengths = _integers("order", order, 1), _integers("lengths", lengths, 1)
    _check_permutation("order", order, len(lengths))
    if parts < 1 or len(order) % parts:
        raise ValueError(f"{len(order)} responses do not divide into {parts} parts")
    size = len(order) // parts
    members: list[list[int]] = [[] for _ in range(parts)]
    open_parts = [(0, part) for part in range(parts)]  # a heap: tokens so far, part
    for at in np.argsort(-lengths[order], kind="stable").tolist():
        tokens, part = heapq.heappop(open_parts)
        members[part].append(at)
        if len(members[part]) < size:
            heapq.heappush(open_parts, (tokens + int(lengths[order[at]]), part))
    return order[np.sort(np.array(members, np.int64), axis=1)].astype(np.int32)


def padding_fraction(plan: PackingPlan) -> float:
    """Return the share of the places of all rows that hold no token."""
    return 1 - np.count_nonzero(plan.segment_ids) / np.size(plan.segment_ids)


def pack_rows(tokens: Array, source: Array, segment_ids: Array) -> PackedRows:
    """Gather the tokens of a rollout into rows.

    Args:
      tokens: int32 [B, W].
      source: int32 [..., N, T], from a plan.
      segment_ids: int32 [..., N, T], from the same plan.
    """
    flat, first = tokens.reshape(-1), jnp.maximum(source, 0)
    is_token = source >= 0
    return PackedRows(jnp.where(is_token, flat[first], 0), jnp.where(is_token, flat[first + 1], 0), segment_ids)


def pack_route(route: Array, source: Array) -> Array:
    """Gather the experts of a rollout's tokens into rows.

    Args:
      route: uint8 or uint16 [B, L, K, W − 1], aligned with the inputs.
      source: int32 [..., N, T], from a plan.

    Returns:
      [..., N, L, K, T]; 0 on padding.
    """
    rows, num_layers, k, columns = route.shape
    by_token = jnp.moveaxis(route, -1, 1).reshape(rows, columns, num_layers * k)
    row, column = jnp.divmod(jnp.maximum(source, 0), columns + 1)
    packed = jnp.where((source >= 0)[..., None], by_token[row, column], 0)
    return jnp.moveaxis(packed, -2, -1).reshape(*source.shape[:-1], num_layers, k, source.shape[-1])


@jax.jit
def pack_rollout(rollout: RolloutBatch, plan: PackingPlan) -> PackedBatch:
    """Gather a whole rollout into the rows and parts of a plan."""
    response_width = plan.places.shape[-1]

    def by_response(array: Array) -> Array:
        # [B, T] over whole sequences, or [B] -> [parts, b, R] or [parts, b].
        of_parts = (array[:, -response_width:] if array.ndim == 2 else array)[plan.responses]
        return constrain(of_parts, None, "rows", *(None,) * (of_parts.ndim - 2))

    rows, route = pack_rows(rollout.tokens, plan.source, plan.segment_ids), rollout.route
    if route is not None:
        chex.assert_shape(route, (rollout.tokens.shape[0], None, None, rollout.tokens.shape[1] - 1))
        route = constrain(pack_route(route, plan.source), None, *ROUTE_AXES)
    return PackedBatch(
        rows=PackedRows(*(constrain(array, None, "rows", "tokens") for array in rows)),
        places=plan.places,
        mask=by_response(rollout.mask),
        sampler_log_probs=by_response(rollout.sampler_log_probs),
        advantages=by_response(rollout.advantages),
        route=route,
        responses=plan.responses,
    )


def unpack(per_token: Array, places: Array) -> Array:
    """Gather the values of tokens in rows back to one line a response.

    Args:
      per_token: [N, T, ...], aligned with the inputs of the rows.
      places: int32 [b, R], from the plan.

    Returns:
      [b, R, ...]. Beyond the end of a response it holds values of other tokens: mask them.
    """
    return per_token.reshape(-1, *per_token.shape[2:])[places]


def _best_fit(costs: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the row of each sequence and its offset there: longest first, each into the row that it fills up best."""
    rows, offsets = np.zeros(len(costs), np.int64), np.zeros(len(costs), np.int64)
    spaces: list[int] = []  # sorted amounts of space that some open row has left
    rows_with: dict[int, list[int]] = {}
    num_rows = 0
    order = np.argsort(-costs, kind="stable")
    for at, cost in zip(order.tolist(), costs[order].tolist(), strict=True):
        index = bisect.bisect_left(spaces, cost)
        if index == len(spaces):
            row, space, num_rows = num_rows, row_length, num_rows + 1
        else:
            space = spaces[index]
            row = rows_with[space].pop()
            if not rows_with[space]:
                del rows_with[space], spaces[index]
        rows[at], offsets[at] = row, row_length - space
        left = space - cost
        if left and left not in rows_with:
            rows_with[left] = []
            bisect.insort(spaces, left)
        if left:
            rows_with[left].append(row)
    return rows, offsets


def _fill(
    lengths: _Lengths, responses: np.ndarray, rows: np.ndarray, offsets: np.ndarray, shape: tuple[int, int]
) -> PackingPlan:
    """Write down a plan, given the row and the offset of each response, [parts, b]."""
    num_rows, row_length = shape
    width = lengths.prompt_width + lengths.response_width
    _check_index("tokens", len(lengths.prompts) * width)
    _check_index("rows", num_rows * row_length)
    source = np.full((len(responses), num_rows, row_length), -1, np.int32)
    segment_ids = np.zeros_like(source)
    prompts, costs = lengths.prompts[responses], lengths.costs[responses]
    # Count up from each sequence's first token, row by row.
    first_tokens = responses * width + lengths.prompt_width - prompts
    counting = np.arange(row_length, dtype=np.int32)
    for part, order in enumerate(np.argsort(offsets, axis=1, kind="stable")):  # segments count up from the left
        segments = [0] * num_rows
        columns = (array[part, order].tolist() for array in (rows, offsets, costs, first_tokens))
        for row, start, cost, first in zip(*columns, strict=True):
            segments[row] += 1
            np.add(counting[:cost], first, out=source[part, row, start : start + cost])
            segment_ids[part, row, start : start + cost] = segments[row]
    # The place that scores a response's first token holds the last token of its prompt.
    token = np.arange(lengths.response_width, dtype=np.int32)[None, None, :]
    first_places = (rows * row_length + offsets + prompts - 1).astype(np.int32)
    places = first_places[:, :, None] + token
    places[token >= lengths.responses[responses][:, :, None]] = 0
    return PackingPlan(responses.astype(np.int32), source, segment_ids, places)


def _checked(
    prompt_lengths: Any, response_lengths: Any, prompt_width: int, response_width: int, responses: Any
) -> tuple[_Lengths, np.ndarray]:
    prompts = _integers("prompt_lengths", prompt_lengths, 1)
    answers = _integers("response_lengths", response_lengths, 1)
    responses = _integers("responses", responses, 2)
    if len(prompts) != len(answers):
        raise ValueError(f"there are {len(prompts)} prompt_lengths but {len(answers)} response_lengths: give one each")
    for name, values, limit in (
        ("prompt_lengths", prompts, prompt_width),
        ("response_lengths", answers, response_width),
    ):
        wrong = np.flatnonzero((values < 1) | (values > limit))
        if wrong.size:
            at = wrong[0]
            raise ValueError(f"{name} must lie between 1 and the width, {limit}; response {at} has {values[at]}")
    _check_permutation("responses", responses.reshape(-1), len(prompts))
    return _Lengths(prompts, answers, prompt_width, response_width), responses


def _integers(name: str, values: Any, ndim: int) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != ndim or not array.size:
        raise ValueError(f"{name} must have {ndim} axes and not be empty, got shape {array.shape}")
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name} must be integers, got {array.dtype}")
    return array.astype(np.int64)


def _check_permutation(name: str, indices: np.ndarray, count: int) -> None:
    if len(indices) != count or not np.array_equal(np.sort(indices), np.arange(count)):
        raise ValueError(
            f"{name} must hold each of the {count} responses exactly once, 0 to {count - 1}; got {len(indices)} "
            f"indices, {len(np.unique(indices))} of them different, from {indices.min()} to {indices.max()}"
        )


def _check_index(name: str, size: int) -> None:
    if size > _INT32_MAX:
        raise ValueError(
            f"{size} {name} places are more than an int32 can count, {_INT32_MAX}: learn from fewer responses at a "
            "time or make them shorter"
        )
