"""The two device programs of a training step: score a rollout under the old policy, and update the parameters on it.

Both run the same scoring function, so that the old log-probabilities and the old route have the numerics of the loss.
Gradients are summed over micro-batches and divided once by the global weight. An update whose loss or gradient is not
finite leaves parameters and optimizer untouched and is counted. This file must never know a concrete model, a task,
or where rewards come from.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rspo_jax.rollouts import unpack
from rspo_jax.routing import ROUTE_AXES, freeze, mismatch_statistics, scoring_route, trace_of, trace_reader
from rspo_jax.sharding import MeshConfig, constrain, free_axes
from rspo_jax.statistics import Mean, Statistic, Sum, masked_mean
from rspo_jax.training.config import LearnerConfig, OptimizerConfig
from rspo_jax.training.loss import part_terms, score_rows, whole_of
from rspo_jax.training.state import TrainState
from rspo_jax.types import (
    Array,
    PackedBatch,
    Params,
    Policy,
    RouterTrace,
    ScoredBatch,
)


def to_host(batch: ScoredBatch) -> ScoredBatch:
    """Moves the old route to the host's memory."""
    return batch._replace(old_route=jax.device_put(batch.old_route, jax.memory.Space.Host))


def to_device(batch: ScoredBatch) -> ScoredBatch:
    """Moves the old route back."""
    return batch._replace(old_route=jax.device_put(batch.old_route, jax.memory.Space.Device))


@functools.partial(jax.jit, static_argnames=("pieces",))
def split_parts(batch: Any, pieces: int) -> list[Any]:
    """Splits a batch of parts, [parts, ...] on every leaf, into equal pieces, such as the mini-batches of a rollout."""

    def piece(index: int) -> Any:
        return jax.tree.map(
            lambda leaf: leaf[index * (len(leaf) // pieces) : (index + 1) * (len(leaf) // pieces)], batch
        )

    return [piece(index) for index in range(pieces)]


@functools.partial(jax.jit, static_argnames=("policy", "config"))
def score(
    policy: Policy, params: Params, batch: PackedBatch, config: LearnerConfig, reference: Params | None = None
) -> tuple[ScoredBatch, dict[str, Statistic]]:
    """The scoring pass: what the policy that generated a rollout says of it, in the trainer's own numerics.

    Args:
      policy: the model.
      params: those that the responses were drawn with.
      batch: parts of a rollout, one after the other, [parts, ...].
      config: scoring.
      reference: parameters of the policy that a KL penalty holds on to.

    Returns:
      The batch with old log-probabilities, those of the reference if there is one, and old route, and statistics: the
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
        of_reference = None
        if reference is not None:
            reference_scores, _ = score_rows(policy, reference, part.rows, config.temperature)
            of_reference = unpack(reference_scores.log_probs, part.places)
        return log_probs, of_reference, route, statistics

    log_probs, of_reference, route, statistics = jax.lax.map(score_part, batch)
    # The sampler's route has done its work: the old route holds it from here on.
    return ScoredBatch(batch._replace(route=None), log_probs, route, of_reference), statistics


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
    """One optimizer update of the policy objective on one mini-batch.

    Args:
      policy: the model.
      optimizer: the Optax chain's config.
      state: donated.
      batch: the micro-batches of a mini-batch, one after the other, [parts, ...].
      config: objective and scoring.
      mesh: its rules say where the next state lies, if a mesh is in use (`jax.set_mesh`).
      shift_log_scale: float32 scalar, of an adaptive router shift.

    Returns:
      The next state and the objective's statistics, with `loss`, `grad_norm` (before clipping) and `skipped_updates`.
    """
    whole = whole_of(policy, state.params, batch, config)

    def terms(params: Params, part: ScoredBatch) -> tuple[Mean, dict[str, Statistic]]:
        return part_terms(policy, params, part, config, whole, shift_log_scale)

    frozen = policy.router_params() if config.routing == "frozen" else None
    return _apply_gradient(optimizer, state, terms, batch, _Places(policy, mesh), frozen)


@functools.partial(jax.jit, static_argnames=("policy", "optimizer", "mesh"), donate_argnames=("state",))
def supervised_update(
    policy: Policy,
    optimizer: OptimizerConfig,
    state: TrainState,
    batch: PackedBatch,
    mesh: MeshConfig = MeshConfig(),
) -> tuple[TrainState, dict[str, Statistic]]:
    """One optimizer update of the mean negative log-likelihood of the response tokens, for the warm start.

    Args: as for `update`; of the batch, rows, places and mask count.
    """

    def terms(params: Params, part: PackedBatch) -> tuple[Mean, dict[str, Statistic]]:
        scores, _ = score_rows(policy, params, part.rows, temperature=1.0)
        return masked_mean(-unpack(scores.log_probs, part.places), part.mask), {}

    return _apply_gradient(optimizer, state, terms, batch, _Places(policy, mesh))


def keep_like_params(policy: Policy, tree: Params, mesh: MeshConfig) -> Params:
    """Asks for a pytree like the parameters, a gradient say, to lie where they do on the mesh in use."""
    if not free_axes():
        return tree
    leaves, structure = jax.tree.flatten(tree)
    axes, rules = structure.flatten_up_to(policy.param_axes()), mesh.parameter_rules
    return structure.unflatten([constrain(leaf, *names, rules=rules) for leaf, names in zip(leaves, axes, strict=True)])


class _Places(NamedTuple):
    """Where parameters, and what is shaped like them, lie on the mesh in use."""

    policy: Policy
    mesh: MeshConfig

    def keep(self, params: Params) -> Params:
        """Asks for a pytree like the parameters to lie where they do."""
        return keep_like_params(self.policy, params, self.mesh)

    def keep_in(self, optimizer: OptimizerConfig, opt_state: optax.OptState) -> optax.OptState:
        """The same for what an optimizer keeps of each parameter."""
        if not free_axes():
            return opt_state
        rules = self.mesh.parameter_rules
        return optax.tree.map_params(
            optimizer.build(),
            lambda leaf, axes: constrain(leaf, *axes, rules=rules),
            opt_state,
            self.policy.param_axes(),
        )


def _apply_gradient(
    optimizer: OptimizerConfig,
    state: TrainState,
    terms: Callable[[Params, Any], tuple[Mean, dict[str, Statistic]]],
    parts: Any,
    places: _Places,
    frozen: Any = None,
) -> tuple[TrainState, dict[str, Statistic]]:
    """Sums the gradient of `terms` over the parts, divides by the summed weight, and applies it if it is finite.

    `frozen` is None, or says of each parameter whether it stays as it is.
    """

    def total(params: Params, part: Any) -> tuple[Array, tuple[Mean, dict[str, Statistic]]]:
        mean, statistics = terms(params, part)
        return mean.total, (mean, statistics)

    def accumulate(gradient: Params, part: Any) -> tuple[Params, tuple[Mean, dict[str, Statistic]]]:
        part_gradient, auxiliary = jax.grad(total, has_aux=True)(state.params, part)
        part_gradient = places.keep(part_gradient)
        return jax.tree.map(lambda total, leaf: total + leaf.astype(total.dtype), gradient, part_gradient), auxiliary

    if len(jax.tree.leaves(parts)[0]) == 1:  # nothing to add up: no float32 sum beside the gradient
        only_part = jax.tree.map(lambda leaf: leaf[0], parts)
        gradient, (loss, statistics) = jax.grad(total, has_aux=True)(state.params, only_part)
        gradient = places.keep(gradient)
    else:
        zeros = places.keep(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), state.params))
        gradient, (loss, statistics) = jax.lax.scan(accumulate, zeros, parts)
    weight = jnp.maximum(jnp.sum(loss.weight), 1)
    gradient = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) / weight, gradient)
    if frozen is not None:
        gradient = freeze(gradient, frozen)
    gradient_norm = optax.tree.norm(gradient)
    gradient = jax.tree.map(lambda leaf, param: leaf.astype(param.dtype), gradient, state.params)
    finite = jnp.isfinite(loss.reduce()) & jnp.isfinite(gradient_norm)
    changes, opt_state = optimizer.build().update(gradient, state.opt_state, state.params)
    if frozen is not None:
        changes = freeze(changes, frozen)
    params = places.keep(optax.apply_updates(state.params, changes))
    opt_state = places.keep_in(optimizer, opt_state)

    def keep_if_finite(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    skipped = (~finite).astype(jnp.int32)
    next_state = TrainState(
        keep_if_finite(params, state.params),
        keep_if_finite(opt_state, state.opt_state),
        state.updates + 1 - skipped,
        state.skipped + skipped,
    )
    statistics = dict(statistics) | {
        "loss": loss,
        "grad_norm": Mean(gradient_norm, jnp.ones_like(gradient_norm)),
        "skipped_updates": Sum(skipped.astype(jnp.float32)),
    }
    return next_state, statistics
