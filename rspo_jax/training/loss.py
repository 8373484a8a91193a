"""The loss of a mini-batch as a function of parameters: forward pass, router shift, correction, objective, penalties.

It composes the formulas of other rooms and adds none of its own. A mini-batch comes in parts, and sums over them equal
those of the whole.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rspo_jax.log_probs import TokenScores, head_log_probs, token_entropy, token_log_probs
from rspo_jax.objectives import OBJECTIVES, correct, token_penalty, weighted_gradient
from rspo_jax.rollouts import unpack
from rspo_jax.routing import (
    check_covers,
    drift_reader,
    drift_reading,
    expert_fractions,
    gamma_of,
    join_readers,
    load_balance_reader,
    ratio_statistics,
    response_inputs,
    router_loss_of,
    routing_reader,
    routing_statistics,
    scaled,
    update_route,
    z_loss_reader,
)
from rspo_jax.statistics import Mean, Statistic
from rspo_jax.training.config import LearnerConfig
from rspo_jax.types import (
    Array,
    ForcedRoute,
    PackedRows,
    Params,
    Policy,
    RouterReader,
    RouterReading,
    ScoredBatch,
)


class BatchContext(NamedTuple):
    """Totals of a whole mini-batch that the router losses of each part need, known before any part has run."""

    fractions: Array
    """float32 [L, E]: the share of slots that the old policy gave to each expert."""
    weight: Array
    """float32 scalar: the objective's denominator."""
    tokens: Array
    """float32 scalar: real tokens, prompts included."""


def score_rows(
    policy: Policy,
    params: Params,
    rows: PackedRows,
    temperature: float,
    router_reader: RouterReader | None = None,
    forced_route: ForcedRoute | None = None,
    entropy_gradient: bool = False,
) -> tuple[TokenScores, RouterReading | None]:
    """Score the targets of packed rows in one forward pass.

    Args:
      policy: the model.
      params: its parameters; they carry the gradient.
      rows: N rows of T places.
      temperature: the sampler's.
      router_reader: sees the routers at the inputs that score the targets.
      forced_route: experts to use in place of the routers' choice.
      entropy_gradient: if True, the entropy is differentiable.

    Returns:
      Log-probability and entropy of each target, float32 [N, T], and the reading of the router reader.
    """
    forced: dict[str, Any] = {} if forced_route is None else {"forced_route": forced_route}
    output = policy.apply(
        {"params": params}, rows.inputs, segment_ids=rows.segment_ids, router_reader=router_reader, **forced
    )
    if output.hidden is not None and output.head is not None:
        scores = head_log_probs(
            output.hidden, output.head, rows.targets, temperature, entropy_gradient=entropy_gradient
        )
        return scores, output.reading
    log_probs = token_log_probs(output.logits, rows.targets, temperature)
    logits = output.logits if entropy_gradient else jax.lax.stop_gradient(output.logits)
    return TokenScores(log_probs, token_entropy(logits, temperature)), output.reading


def batch_context(policy: Policy, params: Params, parts: ScoredBatch, config: LearnerConfig) -> BatchContext | None:
    """Return the totals of a mini-batch, [parts, ...], or None where no router loss needs them.

    Raises:
      ValueError: if a router loss is asked for and the model has no router.
    """
    if not config.regularizers.needs_routers:
        return None
    if parts.old_route is None:
        raise ValueError("this model has no router to balance: leave the coefficients of the router losses at 0")
    batch = parts.batch

    def router_logits(params: Params, rows: PackedRows) -> Array:
        return policy.apply({"params": params}, rows.inputs[0], segment_ids=rows.segment_ids[0]).router_logits

    num_experts = jax.eval_shape(router_logits, params, batch.rows).shape[-1]

    def learned(old_log_probs: Array, sampler_log_probs: Array, mask: Array) -> Array:
        return correct(old_log_probs, sampler_log_probs, mask, config.correction).mask

    masks = jax.vmap(learned)(parts.old_log_probs, batch.sampler_log_probs, batch.mask)
    return BatchContext(
        expert_fractions(parts.old_route.expert_ids, batch.rows.segment_ids, num_experts),
        OBJECTIVES[config.objective].weight(masks, config.objective_config),
        jnp.sum(batch.rows.segment_ids != 0, dtype=jnp.float32),
    )


def part_terms(
    policy: Policy,
    params: Params,
    part: ScoredBatch,
    config: LearnerConfig,
    context: BatchContext | None = None,
    shift_log_scale: Array | None = None,
) -> tuple[Mean, dict[str, Statistic]]:
    """Return the loss of one part before its division, and its statistics.

    Args:
      policy: the model.
      params: its parameters; they carry the gradient.
      part: responses with the old policy's log-probabilities and route.
      config: objective, penalties, correction and routing.
      context: totals of the mini-batch that the part belongs to, from `batch_context`.
      shift_log_scale: float32 scalar, the log scale of an adaptive router shift (`rspo_jax.routing.adaptive`).
    """
    batch, route = part.batch, part.old_route
    # Forward pass: log-probs and entropies, with the routers read while the layers run.
    readers = _readers(policy, part, config, context)
    scores, reading = score_rows(
        policy,
        params,
        batch.rows,
        config.temperature,
        join_readers(*readers.values()) if readers else None,
        update_route(config.routing, route),
        entropy_gradient=config.regularizers.entropy_coefficient > 0,
    )
    readings = {}
    if reading is not None:
        separate = map(RouterReading, reading.carry, reading.layers)
        readings = dict(zip(readers, separate, strict=True))
    log_probs, entropy = (unpack(per_token, batch.places) for per_token in scores)
    # Router shift: γ of each response token.
    gamma = None
    if route is not None:
        drift = drift_reading(readings["routing"]) if config.diagnostics else readings["routing"]
        gamma = unpack(gamma_of(drift, route, config.layer_aggregation), batch.places)
    # Correction for the sampler's numerics, which may mask responses out; penalties; diagnostics.
    correction = correct(part.old_log_probs, batch.sampler_log_probs, batch.mask, config.correction)
    mask = correction.mask
    penalty, statistics = token_penalty(config.regularizers, log_probs, entropy, mask, part.reference_log_probs)
    if config.diagnostics:
        log_ratio = jnp.where(mask, log_probs - part.old_log_probs, 0)
        statistics |= ratio_statistics(log_ratio, mask, gamma, config.gamma_min)
        statistics |= routing_statistics(readings["routing"]) if route is not None else {}
    # Objective.
    if gamma is not None and shift_log_scale is not None:
        gamma = scaled(gamma, shift_log_scale)
    if config.correction.kind != "none":
        log_probs = weighted_gradient(log_probs, correction.weights)
    loss, objective_statistics = OBJECTIVES[config.objective].terms(
        log_probs, part.old_log_probs, batch.advantages, mask, gamma, config.objective_config, penalty=penalty
    )
    statistics |= objective_statistics | correction.statistics
    if context is None:
        return loss, statistics
    return _with_router_losses(loss, statistics, readings, part, config, context)


def _readers(
    policy: Policy, part: ScoredBatch, config: LearnerConfig, context: BatchContext | None
) -> dict[str, RouterReader]:
    """Return the router readers that the configuration needs, by name; none for a model without experts."""
    route, rows, score = part.old_route, part.batch.rows, policy.router_score
    if route is None:
        return {}
    check_covers(route, rows.inputs.shape)
    readers = {"routing": drift_reader(route, score, config.gamma_gradient)}
    if config.diagnostics:
        learned = response_inputs(part.batch.places, part.batch.mask, rows.inputs.shape)
        readers["routing"] = routing_reader(readers["routing"], route.expert_ids, learned, score)
    if context is not None and config.regularizers.load_balance_coefficient > 0:
        readers["load_balance_loss"] = load_balance_reader(context.fractions, rows.inputs.shape, score)
    if context is not None and config.regularizers.router_z_coefficient > 0:
        readers["router_z_loss"] = z_loss_reader(rows.inputs.shape, score)
    return readers


def _with_router_losses(
    loss: Mean,
    statistics: dict[str, Statistic],
    readings: dict[str, RouterReading],
    part: ScoredBatch,
    config: LearnerConfig,
    context: BatchContext,
) -> tuple[Mean, dict[str, Statistic]]:
    """Add the router losses, rescaled from their own denominator to the objective's, by which the sum is divided."""
    coefficients = {
        "load_balance_loss": config.regularizers.load_balance_coefficient,
        "router_z_loss": config.regularizers.router_z_coefficient,
    }
    for name in [name for name in coefficients if name in readings]:
        mean = router_loss_of(readings[name], part.batch.rows.segment_ids)
        share = mean.total / jnp.maximum(context.tokens, 1)
        loss = Mean(loss.total + coefficients[name] * context.weight * share, loss.weight)
        statistics |= {name: Mean(jax.lax.stop_gradient(mean.total), mean.weight)}
    return loss, statistics
