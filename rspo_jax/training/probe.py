"""What the gradients of all objectives would be on one and the same batch, at one and the same parameters.

Runs with different objectives soon have different parameters and different responses, so that their gradient norms say
little about the objectives. A probe takes what one step has: the parameters θ after its last update, and the responses
that it learned from. These were drawn by the policy from before its updates, so at θ they are off-policy, as they are
in the last update of a step, and a little more. For each objective of `PROBED`, with its default config:

* `probe_variance_*`: the variance of the gradient over parts of the batch, (Σ_p |g_p|² − n |ḡ|²) / (n − 1), summed over
  all parameters. n = mini_batches · micro_batches; g_p is the gradient of part p times n over the weight of all parts,
  so that their mean ḡ is the gradient of the whole batch.
* `probe_snr_*`: |ḡ|² over the variance of ḡ, variance / n. Noise alone gives about 1, as |ḡ|² holds that noise too.
* `probe_cosine_*`: between ḡ and the on-policy gradient g*.
* `probe_norm_*`: |ḡ| / |g*|.

g* comes from a fresh rollout, drawn by θ for the same prompts. There all ratios and all γ are 1, and every objective
is REINFORCE, up to how it takes the mean over tokens. So there is one g* for each way (`AGGREGATIONS`), and an
objective is compared with that of its own way: the cosine is about the weights and clips of the objective alone. g* is
an estimate as well. `probe_reference_cosine_*` is that between its two halves, c; an objective without any noise or
bias would reach a cosine of about sqrt(2c / (1 + c)), and the gradient of another on-policy rollout of the same size
about 2c / (1 + c). `probe_reference_snr_*` and `probe_reference_norm_*` go with it. A number that is not defined, as a
cosine with a gradient of 0, is NaN.

What it cannot say. Advantages are those of the run, for all objectives alike: the estimators of RLOO, Dr. GRPO or
REINFORCE++ are not compared, unless the run uses them. So are temperature, layer aggregation, routing and the
correction for the sampler; a frozen router has no part in any gradient. Penalties, router losses and the scale of an
adaptive router shift are left out. Parts share groups, and the baseline of a group makes the errors of its responses
sum to about 0: variance is a little too large, and c a little too small. θ has learned from the old responses and not
from the fresh ones, which makes old gradients smaller than those of new responses of the old policy would be. One
probe is a sample of one: look at many steps. Under dynamic sampling the prompts are those of the step's last rollout.

Costs, for a probed step only: one rollout with its judging and scoring, one forward pass over the old responses, and a
forward and a backward pass over a batch for each of the objectives and references. Beside the gradient of a part there
are two float32 copies of the parameters. What is compiled is one backward pass of the model for all of them: an
objective depends on parameters through log-probabilities only, as γ has no gradient in any default config, and what it
makes of those is arrays. This file must never know an optimizer, or where rewards come from.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rspo_jax.objectives import (
    AGGREGATIONS,
    OBJECTIVES,
    CorrectionConfig,
    GRPOConfig,
    GSPOConfig,
    correct,
    weighted_gradient,
)
from rspo_jax.rollouts import unpack
from rspo_jax.routing import drift_reader, freeze, gamma_of, update_route
from rspo_jax.sharding import MeshConfig
from rspo_jax.training.loss import LearnerConfig, score_rows
from rspo_jax.training.update import keep_like_params, to_device
from rspo_jax.types import Array, Params, Policy, ScoredBatch


class Variant(NamedTuple):
    """An objective with a config."""

    objective: str
    config: Any


PROBED: Mapping[str, Variant] = {
    **{name: Variant(name, row.config_type()) for name, row in OBJECTIVES.items()},
    "grpo_rs": Variant("grpo", GRPOConfig(gamma_min=0.8)),
    "gspo_rs": Variant("gspo", GSPOConfig(gamma_min=0.8)),
}
"""What is probed, by the name that its metrics end with: all objectives, and two with a router shift."""

# At a ratio of 1, GRPO's gradient is that of REINFORCE.
_REFERENCES = {way: Variant("grpo", GRPOConfig(aggregation=way)) for way in AGGREGATIONS}


class GradientSums(NamedTuple):
    """What is kept of the gradients of parts, none of which is divided yet."""

    total: Params
    """float32, Σ_p G_p."""
    squares: Array
    """float32 scalar, Σ_p |G_p|²."""


class _Weighed(NamedTuple):
    """A mini-batch, and what each variant makes of it."""

    batch: ScoredBatch
    cotangents: dict[str, Array]
    """float32 [parts, B, T]: the derivative of a part's undivided loss by its log-probabilities."""
    weights: dict[str, Array]
    """float32 scalars: the mini-batch's share of the division."""


class _Gradient(NamedTuple):
    """Of a whole batch."""

    total: Params
    """float32, before its division."""
    square: float
    """|total|²."""
    weight: float
    """What it is to be divided by."""

    @property
    def norm(self) -> float:
        """Once it is divided."""
        return math.sqrt(self.square) / self.weight


class _Model(NamedTuple):
    """Where gradients are taken."""

    policy: Policy
    params: Params
    config: LearnerConfig
    mesh: MeshConfig


def probe(
    policy: Policy,
    params: Params,
    scored: Sequence[ScoredBatch],
    fresh: Sequence[ScoredBatch],
    config: LearnerConfig,
    mesh: MeshConfig = MeshConfig(),
) -> dict[str, float]:
    """Measures all objectives; see the top of this file.

    Args:
      policy: the model.
      params: θ.
      scored: mini-batches of a step, [parts, ...] each, as the policy that drew them scores them.
      fresh: mini-batches of a rollout drawn by θ and scored by it.
      config: the run's. Its objective, penalties and router losses are not used.
      mesh: its rules say where gradients lie, if a mesh is in use (`jax.set_mesh`).

    Returns:
      The metrics.

    Raises:
      ValueError: if there are fewer than two parts.
    """
    if min(map(_number_of_parts, (scored, fresh))) < 2:
        raise ValueError("a gradient has no variance over a single part: use 2 or more mini_batches or micro_batches")
    model = _Model(policy, params, config, mesh)
    old = [_weigh(model, mini_batch) for mini_batch in scored]
    new = [_weigh_on_policy(model, mini_batch) for mini_batch in fresh]
    metrics: dict[str, float] = {}
    for way in AGGREGATIONS:
        reference, of_reference = _reference(model, new, way)
        metrics |= {f"probe_{kind}_{way}": value for kind, value in of_reference.items()}
        for name in [name for name, variant in PROBED.items() if variant.config.aggregation == way]:
            measured = _measure(model, old, name, reference)
            metrics |= {f"probe_{kind}_{name}": value for kind, value in measured.items()}
    return metrics


def _number_of_parts(batches: Sequence[ScoredBatch]) -> int:
    return sum(len(mini_batch.batch.mask) for mini_batch in batches)


def _weigh(model: _Model, mini_batch: ScoredBatch) -> _Weighed:
    config = model.config
    on_device = to_device(mini_batch) if config.route_on_host else mini_batch
    log_probs, gamma = _forward(model.policy, model.params, on_device, config)
    variants = tuple(PROBED.items())
    return _Weighed(mini_batch, *_cotangents(log_probs, gamma, _without_route(mini_batch), config.correction, variants))


def _weigh_on_policy(model: _Model, mini_batch: ScoredBatch) -> _Weighed:
    variants = tuple(_REFERENCES.items())
    bare = _without_route(mini_batch)
    return _Weighed(mini_batch, *_cotangents(bare.old_log_probs, None, bare, model.config.correction, variants))


def _without_route(mini_batch: ScoredBatch) -> ScoredBatch:
    return mini_batch._replace(old_route=None)


@functools.partial(jax.jit, static_argnames=("policy", "config"))
def _forward(
    policy: Policy, params: Params, mini_batch: ScoredBatch, config: LearnerConfig
) -> tuple[Array, Array | None]:
    """log π_θ and raw γ of each part, [parts, B, T]."""

    def of_part(part: ScoredBatch) -> tuple[Array, Array | None]:
        route, places = part.old_route, part.batch.places
        reader = None if route is None else drift_reader(route, policy.router_score)
        forced = update_route(config.routing, route)
        scores, reading = score_rows(policy, params, part.batch.rows, config.temperature, reader, forced)
        log_probs = unpack(scores.log_probs, places)
        if route is None or reading is None:
            return log_probs, None
        return log_probs, unpack(gamma_of(reading, route, config.layer_aggregation), places)

    return jax.lax.map(of_part, mini_batch)


@functools.partial(jax.jit, static_argnames=("correction_config", "variants"))
def _cotangents(
    log_probs: Array,
    gamma: Array | None,
    mini_batch: ScoredBatch,
    correction_config: CorrectionConfig,
    variants: tuple[tuple[str, Variant], ...],
) -> tuple[dict[str, Array], dict[str, Array]]:
    """What each variant makes of the log-probabilities, [parts, B, T], and the weight that it divides by."""

    def of_part(log_probs: Array, gamma: Array | None, part: ScoredBatch) -> tuple[dict[str, Array], dict[str, Array]]:
        batch = part.batch
        correction = correct(part.old_log_probs, batch.sampler_log_probs, batch.mask, correction_config)

        def total(log_probs: Array, variant: Variant) -> tuple[Array, Array]:
            corrected = weighted_gradient(log_probs, correction.weights)
            arguments = (part.old_log_probs, batch.advantages, correction.mask, gamma, variant.config)
            loss, _ = OBJECTIVES[variant.objective].terms(corrected, *arguments)
            return loss.total, loss.weight

        both = {name: jax.grad(total, has_aux=True)(log_probs, variant) for name, variant in variants}
        return {name: pair[0] for name, pair in both.items()}, {name: pair[1] for name, pair in both.items()}

    cotangents, weights = jax.vmap(of_part)(log_probs, gamma, mini_batch)
    return cotangents, {name: jnp.sum(weight) for name, weight in weights.items()}


def _reference(model: _Model, fresh: list[_Weighed], way: str) -> tuple[_Gradient, dict[str, float]]:
    """The on-policy gradient, and what is known of it."""
    parts = _parts_of(fresh)
    first, second = _sums(model, fresh, way, 0, parts // 2), _sums(model, fresh, way, parts // 2, parts)
    cosine = _cosine(_inner(first.total, second.total), _square(first.total), _square(second.total))
    squares = _number(first.squares) + _number(second.squares)
    gradient = _gradient(_added(first.total, second.total), fresh, way)
    _, ratio = _spread(gradient, squares, parts)
    return gradient, {"reference_cosine": cosine, "reference_snr": ratio, "reference_norm": gradient.norm}


def _measure(model: _Model, scored: list[_Weighed], name: str, reference: _Gradient) -> dict[str, float]:
    parts = _parts_of(scored)
    sums = _sums(model, scored, name, 0, parts)
    gradient = _gradient(sums.total, scored, name)
    variance, ratio = _spread(gradient, _number(sums.squares), parts)
    return {
        "cosine": _cosine(_inner(gradient.total, reference.total), gradient.square, reference.square),
        "snr": ratio,
        "variance": variance,
        "norm": _divided(gradient.norm, reference.norm),
    }


def _parts_of(batches: list[_Weighed]) -> int:
    return _number_of_parts([mini_batch.batch for mini_batch in batches])


def _gradient(total: Params, batches: list[_Weighed], name: str) -> _Gradient:
    weight = sum(_number(mini_batch.weights[name]) for mini_batch in batches)
    return _Gradient(total, _square(total), max(weight, 1.0))


def _spread(gradient: _Gradient, squares: float, parts: int) -> tuple[float, float]:
    """Variance of the parts' gradients, and the signal-to-noise ratio of their mean; `squares` is Σ_p |G_p|²."""
    excess = parts * squares - gradient.square
    excess = 0.0 if excess < 0 else excess  # by rounding
    return (
        excess * parts / (parts - 1) / gradient.weight**2,
        _divided(gradient.square * (parts - 1), excess),
    )


def _cosine(inner: float, square: float, other_square: float) -> float:
    return _divided(inner, math.sqrt(square) * math.sqrt(other_square))


def _divided(over: float, under: float) -> float:
    """NaN where the divisor is 0."""
    return over / under if under else math.nan


def _sums(model: _Model, batches: list[_Weighed], name: str, start: int, stop: int) -> GradientSums:
    """Over the parts from `start` to before `stop`, counted through all mini-batches."""
    policy, params, config, mesh = model
    sums, before = _no_gradient(policy, params, mesh), 0
    for mini_batch, cotangents, _ in batches:
        size = _number_of_parts([mini_batch])
        wanted = range(max(start - before, 0), min(stop - before, size))
        if config.routing == "free":
            mini_batch = _without_route(mini_batch)
        elif wanted and config.route_on_host:
            mini_batch = to_device(mini_batch)
        for index in wanted:
            sums = _add(policy, params, sums, mini_batch, cotangents[name], np.int32(index), config, mesh)
        before += size
    return sums


@functools.partial(jax.jit, static_argnames=("policy", "mesh"))
def _no_gradient(policy: Policy, params: Params, mesh: MeshConfig) -> GradientSums:
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    return GradientSums(keep_like_params(policy, zeros, mesh), jnp.float32(0))


@functools.partial(jax.jit, static_argnames=("policy", "config", "mesh"), donate_argnames=("sums",))
def _add(
    policy: Policy,
    params: Params,
    sums: GradientSums,
    mini_batch: ScoredBatch,
    cotangents: Array,
    index: Array,
    config: LearnerConfig,
    mesh: MeshConfig,
) -> GradientSums:
    """The sums with one part more. The only program with a backward pass of the model."""
    part, cotangent = jax.tree.map(lambda leaf: leaf[index], (mini_batch, cotangents))

    def linear(params: Params) -> Array:
        forced = update_route(config.routing, part.old_route)
        scores, _ = score_rows(policy, params, part.batch.rows, config.temperature, forced_route=forced)
        return jnp.sum(jnp.where(part.batch.mask, cotangent * unpack(scores.log_probs, part.batch.places), 0))

    gradient = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), jax.grad(linear)(params))
    if config.routing == "frozen":
        gradient = freeze(gradient, policy.router_params())
    gradient = keep_like_params(policy, gradient, mesh)
    return GradientSums(jax.tree.map(jnp.add, sums.total, gradient), sums.squares + _dot(gradient, gradient))


def _dot(one: Params, other: Params) -> Array:
    return jax.tree.reduce(jnp.add, jax.tree.map(lambda a, b: jnp.sum(a * b), one, other))


_jitted_dot = jax.jit(_dot)
_added = jax.jit(lambda one, other: jax.tree.map(jnp.add, one, other), donate_argnums=0)


def _inner(one: Params, other: Params) -> float:
    return _number(_jitted_dot(one, other))


def _square(total: Params) -> float:
    return _inner(total, total)


def _number(scalar: Array) -> float:
    return float(np.asarray(scalar))
