"""The loss of a mini-batch as a function of parameters: forward pass, router shift, correction, objective, penalties.

Composes what other files define and adds no formula of its own. A mini-batch comes in parts, one after the other, and
what is added up over them equals what the whole would give. This file must never know an optimizer, a concrete model,
or where rewards come from.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rspo_jax.log_probs import TokenScores, head_log_probs, token_entropy, token_log_probs
from rspo_jax.objectives import (
    OBJECTIVES,
    correct,
    token_penalty,
    weighted_gradient,
)
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


def score_rows(
    policy: Policy,
    params: Params,
    rows: PackedRows,
    temperature: float,
    router_reader: RouterReader | None = None,
    forced_route: ForcedRoute | None = None,
    entropy_gradient: bool = False,
) -> tuple[TokenScores, RouterReading | None]:
    """What one forward pass says of the targets of packed rows: log-probability and entropy, [N, T], and what the
    reader saw of the router at the inputs that score them."""
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


class Whole(NamedTuple):
    """What router losses need of the whole mini-batch, known before any of its parts has run."""

    fractions: Array
    """float32 [L, E]: the share of slots that the old policy gave to each expert."""
    weight: Array
    """float32 scalar: what the objective divides by."""
    tokens: Array
    """float32 scalar: real tokens, prompts included."""


def whole_of(policy: Policy, params: Params, parts: ScoredBatch, config: LearnerConfig) -> Whole | None:
    """The same for all parts, [parts, ...]; None where no router loss is asked for.

    Raises:
      ValueError: if one is asked for and the model has no router.
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
    return Whole(
        expert_fractions(parts.old_route.expert_ids, batch.rows.segment_ids, num_experts),
        OBJECTIVES[config.objective].weight(masks, config.objective_config),
        jnp.sum(batch.rows.segment_ids != 0, dtype=jnp.float32),
    )


def part_terms(
    policy: Policy,
    params: Params,
    part: ScoredBatch,
    config: LearnerConfig,
    whole: Whole | None = None,
    shift_log_scale: Array | None = None,
) -> tuple[Mean, dict[str, Statistic]]:
    """The loss of one part before its division, and statistics of it.

    Args:
      policy: the model.
      params: carry the gradient.
      part: responses with the old policy's log-probabilities and route.
      config: of the loss.
      whole: of the mini-batch that the part belongs to (`whole_of`).
      shift_log_scale: of an adaptive router shift (`rspo_jax.routing.adaptive`).
    """
    objective, batch, route = OBJECTIVES[config.objective], part.batch, part.old_route
    readers = _readers(policy, part, config, whole)
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
    gamma = None
    if route is not None:
        drift = drift_reading(readings["routing"]) if config.diagnostics else readings["routing"]
        gamma = unpack(gamma_of(drift, route, config.layer_aggregation), batch.places)
    correction = correct(part.old_log_probs, batch.sampler_log_probs, batch.mask, config.correction)
    mask = correction.mask
    penalty, statistics = token_penalty(config.regularizers, log_probs, entropy, mask, part.reference_log_probs)
    if config.diagnostics:
        log_ratio = jnp.where(mask, log_probs - part.old_log_probs, 0)
        statistics |= ratio_statistics(log_ratio, mask, gamma, config.gamma_min)
        statistics |= routing_statistics(readings["routing"]) if route is not None else {}
    if gamma is not None and shift_log_scale is not None:
        gamma = scaled(gamma, shift_log_scale)
    if config.correction.kind != "none":
        log_probs = weighted_gradient(log_probs, correction.weights)
    loss, objective_statistics = objective.terms(
        log_probs, part.old_log_probs, batch.advantages, mask, gamma, config.objective_config, penalty=penalty
    )
    statistics |= objective_statistics | correction.statistics
    return _with_router_losses(loss, statistics, readings, part, config, whole)


def _readers(policy: Policy, part: ScoredBatch, config: LearnerConfig, whole: Whole | None) -> dict[str, RouterReader]:
    route, rows, score = part.old_route, part.batch.rows, policy.router_score
    if route is None:
        return {}
    check_covers(route, rows.inputs.shape)
    differentiable = getattr(config.objective_config, "gamma_gradient", False)
    readers = {"routing": drift_reader(route, score, differentiable)}
    if config.diagnostics:
        learned = response_inputs(part.batch.places, part.batch.mask, rows.inputs.shape)
        readers["routing"] = routing_reader(readers["routing"], route.expert_ids, learned, score)
    if whole is not None and config.regularizers.load_balance_coefficient > 0:
        readers["load_balance_loss"] = load_balance_reader(whole.fractions, rows.inputs.shape, score)
    if whole is not None and config.regularizers.router_z_coefficient > 0:
        readers["router_z_loss"] = z_loss_reader(rows.inputs.shape, score)
    return readers


def _with_router_losses(
    loss: Mean,
    statistics: dict[str, Statistic],
    readings: dict[str, RouterReading],
    part: ScoredBatch,
    config: LearnerConfig,
    whole: Whole | None,
) -> tuple[Mean, dict[str, Statistic]]:
    """Adds the router losses, means over other things than the objective, so that one division by its weight is right
    for all."""
    coefficients = {
        "load_balance_loss": config.regularizers.load_balance_coefficient,
        "router_z_loss": config.regularizers.router_z_coefficient,
    }
    for name, coefficient in coefficients.items():
        if whole is not None and name in readings:
            mean = router_loss_of(readings[name], part.batch.rows.segment_ids)
            share = mean.total / jnp.maximum(whole.tokens, 1)
            loss = Mean(loss.total + coefficient * whole.weight * share, loss.weight)
            statistics |= {name: Mean(jax.lax.stop_gradient(mean.total), mean.weight)}
    return loss, statistics
