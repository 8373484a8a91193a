"""Rigid alternatives to the router shift: ways to hold the routers instead of weighing how far they moved.

    free            routers choose, as in every other run
    frozen          router parameters are not updated
    copy            updates use the old policy's experts with its own scores of them: no router gradient
    replay_trainer  R2, vanilla routing replay: updates use the experts of the old policy as the trainer computes it
    replay_sampler  R3, rollout routing replay: scoring and updates use the experts of the sampler

Sources: RSPO (arXiv 2510.23027) compares itself with a frozen router, copied router scores and replayed experts. R3:
Ma et al., "Stabilizing MoE Reinforcement Learning by Aligning Training and Inference Routers", arXiv 2510.11370. R2 has
its name from Zheng et al., "Stabilizing Reinforcement Learning with LLMs: Formulation and Practices", arXiv 2512.01374.

Under both replays the weights come from the current logits at the old experts, so router gradients still flow. Only the
choice is held: γ is computed from the natural current logits, at the old experts, and still moves.
"""

from typing import Literal, get_args

import jax.numpy as jnp

from rspo_jax.routing.shift import forced_route_of
from rspo_jax.types import ForcedRoute, PackedBatch, RouterTrace, check_choice

Routing = Literal["free", "frozen", "copy", "replay_trainer", "replay_sampler"]
ROUTINGS = get_args(Routing)


def records_route(routing: Routing) -> bool:
    """Return whether the sampler must record the experts that it uses.

    Raises:
      ValueError: on an unknown routing.
    """
    check_choice("routing", routing, Routing)
    return routing == "replay_sampler"


def scoring_route(routing: Routing, batch: PackedBatch) -> ForcedRoute | None:
    """Return the experts that the scoring pass must use: the sampler's for R3, else None, and the routers choose.

    R3 forces them here too, and not in updates alone, so that old log-probabilities come from the experts that the
    tokens were drawn with. The trace that this pass leaves then holds the sampler's experts, and the old policy's
    scores of them as the trainer computes them.

    Args:
      routing: how the routers are held.
      batch: one part of a rollout. Its route, [N, L, K, T], has no more use after this.

    Raises:
      ValueError: on an unknown routing, or if the sampler's experts are needed and were not recorded.
    """
    if not records_route(routing):
        return None
    if batch.route is None:
        raise ValueError(
            "routing is 'replay_sampler', but the rollout has no route: draw it with record_route=True from a model "
            "with experts"
        )
    return ForcedRoute(jnp.transpose(batch.route, (1, 0, 3, 2)))


def update_route(routing: Routing, old_route: RouterTrace | None) -> ForcedRoute | None:
    """Return the experts that an update's forward pass must use: the old route's, or None where the routers choose.

    Both replays take them from the same trace: R2's scoring pass left the experts that the old policy chose in the
    trainer, R3's the ones that the sampler used (`scoring_route`). `copy` takes the old scores as well, rounded as
    `rspo_jax.routing.shift.forced_route_of` states, so on-policy ratios are not exactly 1.

    Args:
      routing: how the routers are held.
      old_route: the trace of one part of a scored rollout; None for a model without experts.

    Raises:
      ValueError: on an unknown routing, or on any but `free` for a model without experts.
    """
    check_choice("routing", routing, Routing)
    if routing == "free":
        return None
    if old_route is None:
        raise ValueError(f"routing is {routing!r}, but this model has no router: leave routing at 'free'")
    if routing == "frozen":
        return None
    return forced_route_of(old_route, with_weights=routing == "copy")
