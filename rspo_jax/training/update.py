"""The device programs of a training step: score a rollout under the old policy, update the parameters on it, and, where
somebody wants to see it, score responses once more under the new ones.

All run the same scoring function, so that old log-probabilities and old route have the numerics of the loss. Gradients
are summed over micro-batches and divided once by the global weight. An update whose loss or gradient is not finite
leaves parameters and optimizer untouched and is counted; so are the updates that learned something.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rspo_jax.objectives import OBJECTIVES
from rspo_jax.rollouts import unpack
from rspo_jax.routing import (
    ROUTE_AXES,
    drift_reader,
    gamma_of,
    mismatch_statistics,
    scoring_route,
    trace_of,
    trace_reader,
    update_route,
)
from rspo_jax.sharding import MeshConfig, constrain, free_axes
from rspo_jax.statistics import Mean, Statistic, Sum, masked_mean
from rspo_jax.training.config import LearnerConfig, OptimizerConfig
from rspo_jax.training.loss import batch_context, part_terms, score_rows
from rspo_jax.training.rounding import round_like, widen
from rspo_jax.training.state import TrainState
from rspo_jax.types import Array, PackedBatch, Params, Policy, RouterTrace, ScoredBatch

PartTerms = Callable[[Params, Any], tuple[Mean, dict[str, Statistic]]]
"""(parameters, one part of a batch) -> its loss before the division, and its statistics."""


@functools.partial(jax.jit, static_argnames=("policy", "config"))
def score(
    policy: Policy, params: Params, batch: PackedBatch, config: LearnerConfig, reference: Params | None = None
) -> tuple[ScoredBatch, dict[str, Statistic]]:
    """Score a rollout under the policy that drew it, in the trainer's own numerics.

    Args:
      policy: the model.
      params: the parameters that the responses were drawn with.
      batch: parts of a rollout, [parts, ...].
      config: temperature, routing and diagnostics.
      reference: parameters of the policy that a KL penalty holds on to.

    Returns:
      The batch with old log-probabilities, old route and, given a reference, its log-probabilities; and statistics: the
      entropy of the policy in nats, and `sampler_kl`, an estimate of KL(sampler ‖ trainer) from the sampler's
      log-probabilities.
    """

    def score_part(part: PackedBatch) -> tuple[Array, Array | None, RouterTrace | None, dict[str, Statistic]]:
        scores, reading = score_rows(
            policy,
            params,
            part.rows,
            config.temperature,
            trace_reader(policy.router_score),
            scoring_route(config.routing, part),
        )
        log_probs, entropy = (unpack(per_token, part.places) for per_token in scores)
        log_ratio = jnp.where(part.mask, log_probs - part.sampler_log_probs, 0)
        statistics: dict[str, Statistic] = {
            "entropy": masked_mean(entropy, part.mask),
            "sampler_kl": masked_mean(jnp.expm1(log_ratio) - log_ratio, part.mask),
        }
        if config.diagnostics:
            statistics |= mismatch_statistics(log_probs, part.sampler_log_probs, part.mask)
        route = None if reading is None else RouterTrace(*(constrain(leaf, *ROUTE_AXES) for leaf in trace_of(reading)))
        reference_log_probs = None
        if reference is not None:
            reference_scores, _ = score_rows(policy, reference, part.rows, config.temperature)
            reference_log_probs = unpack(reference_scores.log_probs, part.places)
        return log_probs, reference_log_probs, route, statistics

    log_probs, reference_log_probs, route, statistics = jax.lax.map(score_part, batch)
    # The sampler's route has served its purpose: from here on the old route stands for it.
    return ScoredBatch(batch._replace(route=None), log_probs, route, reference_log_probs), statistics


@functools.partial(jax.jit, static_argnames=("policy", "config"))
def rescore(policy: Policy, params: Params, batch: ScoredBatch, config: LearnerConfig) -> tuple[Array, Array | None]:
    """Score responses once more, under other parameters than those that drew them.

    Args:
      policy: the model.
      params: θ.
      batch: scored responses in parts, [parts, ...].
      config: temperature, routing and aggregation of the layers.

    Returns:
      log π_θ and raw γ of each response token, float32 [parts, B, T]; no γ for a dense model.
    """

    def of_part(part: ScoredBatch) -> tuple[Array, Array | None]:
        route, places = part.old_route, part.batch.places
        reader = None if route is None else drift_reader(route, policy.router_score)
        forced = update_route(config.routing, route)
        scores, reading = score_rows(policy, params, part.batch.rows, config.temperature, reader, forced)
        log_probs = unpack(scores.log_probs, places)
        if route is None or reading is None:
            return log_probs, None
        return log_probs, unpack(gamma_of(reading, route, config.layer_aggregation), places)

    return jax.lax.map(of_part, batch)


@functools.partial(jax.jit, static_argnames=("policy", "optimizer", "config", "mesh"), donate_argnames=("state",))
def update(
    policy: Policy,
    optimizer: OptimizerConfig,
    state: TrainState,
    batch: ScoredBatch,
    config: LearnerConfig,
    mesh: MeshConfig = MeshConfig(),
    shift_log_scale: Array | None = None,
) -> tuple[TrainState, dict[str, Statistic]]:
    """Make one optimizer update of the policy objective on one mini-batch.

    Args:
      policy: the model.
      optimizer: configuration of the Optax chain.
      state: donated.
      batch: the micro-batches of a mini-batch, [parts, ...].
      config: objective, penalties and routing.
      mesh: its rules say where the next state lies, if a mesh is in use (`jax.set_mesh`).
      shift_log_scale: float32 scalar, the log scale of an adaptive router shift.

    Returns:
      The next state and the objective's statistics, with `loss`, `grad_norm` (before clipping), `skipped_updates` and
      `learned_updates`. An update learns if it is made, has a gradient, and a response has a share in it: penalties
      alone teach nothing about rewards.
    """
    context = batch_context(policy, state.params, batch, config)

    def terms(params: Params, part: ScoredBatch) -> tuple[Mean, dict[str, Statistic]]:
        return part_terms(policy, params, part, config, context, shift_log_scale)

    gradient, loss, statistics = _mean_gradient(policy, state.params, terms, batch, mesh)
    frozen = policy.router_params() if config.routing == "frozen" else None
    state, statistics = _apply(policy, optimizer, state, gradient, (loss, statistics), mesh, frozen)
    taught = OBJECTIVES[config.objective].learned_tokens(statistics) > 0
    learned = jnp.where(taught, statistics["learned_updates"].reduce(), 0)
    return state, statistics | {"learned_updates": Sum(learned)}


@functools.partial(jax.jit, static_argnames=("policy", "optimizer", "mesh"), donate_argnames=("state",))
def supervised_update(
    policy: Policy,
    optimizer: OptimizerConfig,
    state: TrainState,
    batch: PackedBatch,
    mesh: MeshConfig = MeshConfig(),
) -> tuple[TrainState, dict[str, Statistic]]:
    """Make one optimizer update of the mean negative log-likelihood of the response tokens, for the warm start.

    Args and results as for `update`; only the rows, places and mask of the batch are read.
    """

    def terms(params: Params, part: PackedBatch) -> tuple[Mean, dict[str, Statistic]]:
        scores, _ = score_rows(policy, params, part.rows, temperature=1.0)
        return masked_mean(-unpack(scores.log_probs, part.places), part.mask), {}

    gradient, loss, statistics = _mean_gradient(policy, state.params, terms, batch, mesh)
    return _apply(policy, optimizer, state, gradient, (loss, statistics), mesh)


def _mean_gradient(
    policy: Policy, params: Params, terms: PartTerms, parts: Any, mesh: MeshConfig
) -> tuple[Params, Mean, dict[str, Statistic]]:
    """Sum the gradient over the parts and divide it once by their summed weight.

    Returns:
      The gradient in float32; the loss and the statistics, not reduced yet.
    """

    def total(params: Params, part: Any) -> tuple[Array, tuple[Mean, dict[str, Statistic]]]:
        mean, statistics = terms(params, part)
        return mean.total, (mean, statistics)

    def accumulate(gradient: Params, part: Any) -> tuple[Params, tuple[Mean, dict[str, Statistic]]]:
        part_gradient, auxiliary = jax.grad(total, has_aux=True)(params, part)
        part_gradient = keep_like_params(policy, part_gradient, mesh)
        return jax.tree.map(lambda total, leaf: total + leaf.astype(total.dtype), gradient, part_gradient), auxiliary

    if len(jax.tree.leaves(parts)[0]) == 1:  # nothing to add up: no float32 sum beside the gradient
        only_part = jax.tree.map(lambda leaf: leaf[0], parts)
        gradient, (loss, statistics) = jax.grad(total, has_aux=True)(params, only_part)
        gradient = keep_like_params(policy, gradient, mesh)
    else:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        zeros = keep_like_params(policy, zeros, mesh)
        gradient, (loss, statistics) = jax.lax.scan(accumulate, zeros, parts)
    weight = jnp.maximum(jnp.sum(loss.weight), 1)
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) / weight, gradient), loss, statistics


def _apply(
    policy: Policy,
    optimizer: OptimizerConfig,
    state: TrainState,
    gradient: Params,
    measured: tuple[Mean, dict[str, Statistic]],
    mesh: MeshConfig,
    frozen: Any = None,
) -> tuple[TrainState, dict[str, Statistic]]:
    """Apply a gradient, or skip it and count it if the gradient or the loss is not finite.

    Args:
      policy: knows where its parameters lie.
      optimizer: configuration of the Optax chain.
      state: the state to change.
      gradient: float32, like the parameters.
      measured: loss and statistics of the update.
      mesh: its rules say where the next state lies.
      frozen: bools like the parameters, True for those that stay as they are; None for none.
    """
    loss, statistics = measured
    if frozen is not None:
        gradient = freeze(gradient, frozen)
    gradient_norm = optax.tree.norm(gradient)
    # In float32 at least, whatever the dtype that parameters and moments are kept in.
    wide, wide_opt_state = widen((state.params, state.opt_state))
    gradient = jax.tree.map(lambda leaf, param: leaf.astype(param.dtype), gradient, wide)
    finite = jnp.isfinite(loss.reduce()) & jnp.isfinite(gradient_norm)
    changes, opt_state = optimizer.build().update(gradient, wide_opt_state, wide)
    if frozen is not None:  # once more, as weight decay changes parameters that have no gradient
        changes = freeze(changes, frozen)
    moved = (optax.apply_updates(wide, changes), opt_state)
    params, opt_state = round_like(moved, (state.params, state.opt_state), state.updates)
    params = keep_like_params(policy, params, mesh)
    opt_state = _keep_moments_like_params(policy, optimizer, opt_state, mesh)

    def keep_if_finite(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    skipped = (~finite).astype(jnp.int32)
    next_state = TrainState(
        keep_if_finite(params, state.params),
        keep_if_finite(opt_state, state.opt_state),
        state.updates + 1 - skipped,
        state.skipped + skipped,
    )
    return next_state, dict(statistics) | {
        "loss": loss,
        "grad_norm": Mean(gradient_norm, jnp.ones_like(gradient_norm)),
        "skipped_updates": Sum(skipped.astype(jnp.float32)),
        "learned_updates": Sum((finite & (gradient_norm > 0)).astype(jnp.float32)),
    }


def freeze(tree: Params, frozen: Any) -> Params:
    """Return a pytree like the parameters, such as a gradient, with zeros in place of what belongs to frozen ones.

    Optax's transform by itself, outside of the chain: the tree of the optimizer's state stays as it is.
    """
    freezer = optax.transforms.freeze(frozen)
    return freezer.update(tree, freezer.init(tree))[0]  # pyright: ignore[reportReturnType]


def keep_like_params(policy: Policy, tree: Params, mesh: MeshConfig) -> Params:
    """Constrain a pytree like the parameters, such as a gradient, to lie where they do on the mesh in use."""
    if not free_axes():
        return tree
    leaves, structure = jax.tree.flatten(tree)
    axes, rules = structure.flatten_up_to(policy.param_axes()), mesh.parameter_rules
    return structure.unflatten([constrain(leaf, *names, rules=rules) for leaf, names in zip(leaves, axes, strict=True)])


def _keep_moments_like_params(
    policy: Policy, optimizer: OptimizerConfig, opt_state: optax.OptState, mesh: MeshConfig
) -> optax.OptState:
    """Constrain what the optimizer keeps of each parameter to lie beside it."""
    if not free_axes():
        return opt_state
    rules = mesh.parameter_rules
    return optax.tree.map_params(
        optimizer.build(),
        lambda leaf, axes: constrain(leaf, *axes, rules=rules),
        opt_state,
        policy.param_axes(),
    )


def route_to_host(batch: ScoredBatch) -> ScoredBatch:
    """Move the old route into the host's memory."""
    return batch._replace(old_route=jax.device_put(batch.old_route, jax.memory.Space.Host))


def route_to_device(batch: ScoredBatch) -> ScoredBatch:
    """Move the old route back into the device's memory."""
    return batch._replace(old_route=jax.device_put(batch.old_route, jax.memory.Space.Device))


@functools.partial(jax.jit, static_argnames=("pieces",))
def split_parts(batch: Any, pieces: int) -> list[Any]:
    """Split a batch of parts, [parts, ...] on every leaf, into equal pieces, such as the mini-batches of a rollout."""

    def piece(index: int) -> Any:
        return jax.tree.map(
            lambda leaf: leaf[index * (len(leaf) // pieces) : (index + 1) * (len(leaf) // pieces)], batch
        )

    return [piece(index) for index in range(pieces)]
