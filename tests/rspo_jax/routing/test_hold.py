"""What each kind of routing asks of sampler, scoring pass and update, and that frozen parameters stay as they are.
Arrays alone; knows no model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rspo_jax.routing import ROUTINGS, freeze, records_route, scoring_route, trace_router, update_route
from rspo_jax.types import PackedBatch, PackedRows

L, N, K, T = 3, 2, 2, 4
ROUTER_LOGITS = np.random.default_rng(0).normal(size=(L, N, T, 8)).astype(np.float32)
ZEROS = np.zeros((N, T), np.int32)
BATCH = PackedBatch(PackedRows(ZEROS, ZEROS, ZEROS), ZEROS, ZEROS > 0, ZEROS, np.zeros(N))
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
    for layer, row, place in np.ndindex(L, N, T):
        np.testing.assert_array_equal(forced.expert_ids[layer, row, place], ROUTE[row, layer, :, place])


@pytest.mark.parametrize("routing", ROUTINGS)
def test_what_an_update_is_forced_to(routing):
    forced = update_route(routing, trace_router(ROUTER_LOGITS, K))
    if routing in ("free", "frozen"):
        assert forced is None
        return
    order = np.argsort(-ROUTER_LOGITS, axis=-1)[..., :K]
    np.testing.assert_array_equal(forced.expert_ids, order)
    assert (forced.weights is not None) == (routing == "copy")
    if routing == "copy":
        scores = np.take_along_axis(np.asarray(jax.nn.softmax(ROUTER_LOGITS)), order, axis=-1)
        np.testing.assert_allclose(forced.weights, scores, rtol=5e-4)


def test_a_frozen_parameter_meets_no_part_of_an_update():
    """Neither norm, nor moments, nor weight decay; the others move as if it were not there."""
    params = {"frozen": jnp.array([3.0, -2.0]), "free": jnp.array([1.0, 5.0])}
    frozen = {"frozen": True, "free": False}
    gradient = {"frozen": jnp.array([1e3, jnp.nan]), "free": jnp.array([0.3, -0.4])}
    optimizer = optax.chain(optax.clip_by_global_norm(0.25), optax.adamw(0.1, weight_decay=0.5))

    def step(params, state, gradient, frozen):
        gradient = freeze(gradient, frozen)
        changes, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, freeze(changes, frozen)), state, optax.tree.norm(gradient)

    alone = {"free": params["free"]}
    state, state_alone = optimizer.init(params), optimizer.init(alone)
    with jax.numpy_dtype_promotion("standard"):  # Optax promotes
        for _ in range(2):
            params, state, norm = step(params, state, gradient, frozen)
            alone, state_alone, _ = step(alone, state_alone, {"free": gradient["free"]}, {"free": False})
            assert norm == pytest.approx(0.5)
    np.testing.assert_array_equal(params["frozen"], [3.0, -2.0])
    np.testing.assert_array_equal(params["free"], alone["free"])
    assert np.all(params["free"] != jnp.array([1.0, 5.0]))
    adam = optax.tree.get(state, "ScaleByAdamState", filtering=lambda _, node: hasattr(node, "mu"))
    assert not np.any(adam.mu["frozen"]) and not np.any(adam.nu["frozen"])


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
