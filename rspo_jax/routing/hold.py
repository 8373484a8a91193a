"""The rigid alternatives to router shift: what a run does to its routers, beside weighing how far they moved.

    free            routers choose, as in every other run
    frozen          router parameters are not updated
    copy            updates use the old policy's experts with its own scores of them: no router gradient
    replay_trainer  R2, vanilla routing replay: updates use the experts of the old policy as the trainer computes it
    replay_sampler  R3, rollout routing replay (arXiv 2510.11370): scoring and updates use the experts of the sampler

RSPO's paper (arXiv 2510.23027) compares itself with a frozen router, copied router scores and replayed experts. Under
both replays the weights come from the current logits at the old experts, so that router gradients still flow. Only the
choice is held: γ is computed from the natural current logits, at the old experts, and still moves.

Everything here is a pure function of arrays. It must never know a model, an objective or an optimizer.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from rspo_jax.routing.shift import forced_route_of
from rspo_jax.types import Array, ForcedRoute, PackedBatch, RouterTrace

Routing = Literal["free", "frozen", "copy", "replay_trainer", "replay_sampler"]
ROUTINGS = get_args(Routing)


def records_route(routing: str) -> bool:
    """Whether the sampler must note the experts that it uses (`record_route` of `rspo_jax.rollouts.sampler.generate`).

    Raises:
      ValueError: on a name that is not in `ROUTINGS`.
    """
    _check(routing)
    return routing == "replay_sampler"


def scoring_route(routing: str, batch: PackedBatch) -> ForcedRoute | None:
    """The experts that the scoring pass must use: R3's are those of the sampler, else the routers choose.

    R3 forces them here too, and not in updates alone, so that old log-probabilities come from the experts that the
    tokens were drawn with. The trace that this pass leaves then holds the sampler's experts, and the old policy's
    scores of them as the trainer computes them.

    Args:
      routing: one of `ROUTINGS`.
      batch: one part of a rollout. Its route, [N, L, K, T], has no more use after this.

    Raises:
      ValueError: on a name that is not in `ROUTINGS`, or if the sampler's experts are needed and were not recorded.
    """
    if not records_route(routing):
        return None
    if batch.route is None:
        raise ValueError(
            "routing is 'replay_sampler', but the rollout has no route: draw it with record_route=True from a model "
            "with experts"
        )
    return ForcedRoute(jnp.transpose(batch.route, (1, 0, 3, 2)))


def update_route(routing: str, old_route: RouterTrace | None) -> ForcedRoute | None:
    """The experts that an update's forward pass must use: those of the old route, or None where the routers choose.

    Both replays take them from the same trace: R2's scoring pass left those that the old policy chose in the trainer,
    R3's those that the sampler used (`scoring_route`). `copy` takes the old scores as well, with the rounding that
    `rspo_jax.routing.shift.forced_route_of` states, so that on-policy ratios are not exactly 1.

    Args:
      routing: one of `ROUTINGS`.
      old_route: of one part of a scored rollout; None for a model without experts.

    Raises:
      ValueError: on a name that is not in `ROUTINGS`, or on any but `free` for a model without experts.
    """
    _check(routing)
    if routing == "free":
        return None
    if old_route is None:
        raise ValueError(f"routing is {routing!r}, but this model has no router: leave routing at 'free'")
    if routing == "frozen":
        return None
    return forced_route_of(old_route, with_weights=routing == "copy")


def freeze(tree: Any, frozen: Any) -> Any:
    """Zeros in place of what belongs to frozen parameters.

    Twice in an update: on the gradient, before its norm and before the optimizer, whose moments then stay 0, and on
    the changes that the optimizer returns, because weight decay makes some of no gradient at all.

    Args:
      tree: arrays, such as a gradient.
      frozen: bools, a pytree like it (`Policy.router_params`).
    """

    def leaf_of(leaf: Array, is_frozen: bool) -> Array:
        return jnp.zeros_like(leaf) if is_frozen else leaf

    return jax.tree.map(leaf_of, tree, frozen)


def _check(routing: str) -> None:
    if routing not in ROUTINGS:
        raise ValueError(f"routing must be one of {ROUTINGS}, got {routing!r}")
