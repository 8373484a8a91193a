"""The routes that each kind of routing forces on sampler, scoring pass and update."""

import functools

import jax
import numpy as np
import pytest
from support import oracles

from rspo_jax.routing import ROUTINGS, records_route, scoring_route, trace_router, update_route
from rspo_jax.types import PackedBatch, PackedRows

L, N, K, T = 3, 2, 2, 4
ROUTER_LOGITS = np.random.default_rng(0).normal(size=(L, N, T, 8)).astype(np.float32)
ZEROS = np.zeros((N, T), np.int32)
BATCH = PackedBatch(PackedRows(ZEROS, ZEROS, ZEROS), ZEROS, ZEROS > 0, ZEROS, np.zeros(N))
TRACE = jax.jit(functools.partial(trace_router, k=K))(ROUTER_LOGITS)
ROUTE = np.random.default_rng(1).integers(0, 8, (N, L, K, T)).astype(np.uint8)


def test_only_one_kind_needs_the_experts_of_the_sampler():
    assert [routing for routing in ROUTINGS if records_route(routing)] == ["replay_sampler"]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_what_scoring_is_forced_to(routing):
    forced = scoring_route(routing, BATCH._replace(route=ROUTE))
    if routing != "replay_sampler":
        assert forced is None and scoring_route(routing, BATCH) is None
        return
    assert forced.weights is None
    expert_ids = np.asarray(forced.expert_ids)
    for layer, row, place in np.ndindex(L, N, T):
        np.testing.assert_array_equal(expert_ids[layer, row, place], ROUTE[row, layer, :, place])


@pytest.mark.parametrize("routing", ROUTINGS)
def test_what_an_update_is_forced_to(routing):
    forced = jax.jit(functools.partial(update_route, routing))(TRACE)
    if routing in ("free", "frozen"):
        assert forced is None
        return
    order = np.argsort(-ROUTER_LOGITS, axis=-1)[..., :K]
    np.testing.assert_array_equal(forced.expert_ids, order)
    assert (forced.weights is not None) == (routing == "copy")
    if routing == "copy":
        scores = np.exp(np.take_along_axis(oracles.log_softmax(ROUTER_LOGITS), order, axis=-1))
        np.testing.assert_allclose(forced.weights, scores, rtol=5e-4)


def test_unknown_kinds_are_refused():
    for call in (
        records_route,
        lambda routing: scoring_route(routing, BATCH),
        lambda routing: update_route(routing, None),
    ):
        with pytest.raises(ValueError, match=r"routing must be one of .*, replay_sampler; got 'replay'"):
            call("replay")


def test_missing_routes_are_refused():
    with pytest.raises(ValueError, match="the rollout has no route: draw it with record_route=True"):
        scoring_route("replay_sampler", BATCH)
    assert update_route("free", None) is None
    for routing in ROUTINGS[1:]:
        with pytest.raises(ValueError, match=f"routing is '{routing}', but this model has no router: leave routing at"):
            update_route(routing, None)
