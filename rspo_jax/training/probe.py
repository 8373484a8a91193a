"""Probes of the gradients of all objectives, on one and the same batch at one and the same parameters.

Runs with different objectives soon have different parameters and responses, so their gradient norms say little about
the objectives. A probe takes the parameters θ after the last update of a step, and the responses that the step learned
from. The policy from before its updates drew these, so at θ they are a little more off-policy than in the last update.
For each objective in `PROBED`, with its default config, it measures:

* `probe_variance_*`: the variance of the gradient over parts of the batch, (Σ_p |g_p|² − n |ḡ|²) / (n − 1), summed over
  all parameters. n = mini_batches · micro_batches; g_p is the gradient of part p times n over the weight of all parts,
  so that their mean ḡ is the gradient of the whole batch.
* `probe_snr_*`: |ḡ|² over the variance of ḡ, variance / n. Noise alone gives about 1: |ḡ|² holds it too.
* `probe_cosine_*`: the cosine between ḡ and the on-policy gradient g*.
* `probe_norm_*`: |ḡ| / |g*|.

g* comes from a fresh rollout, drawn by θ for the same prompts. There all ratios and all γ are 1, and every objective
is REINFORCE, up to its mean over tokens. So there is one g* for each aggregation (`AGGREGATIONS`), and an objective is
compared with the g* of its own: the cosine then shows the objective's weights and clips alone. g* is an estimate too.
`probe_reference_cosine_*` is the cosine c between its two halves; an objective without noise or bias would reach about
sqrt(2c / (1 + c)), and the gradient of another on-policy rollout of the same size about 2c / (1 + c).
`probe_reference_snr_*` and `probe_reference_norm_*` are its other figures. Undefined numbers, such as a cosine with a
gradient of 0, are NaN.

Limits. All objectives share the advantages of the run, so the estimators of RLOO, Dr. GRPO or REINFORCE++ are not
compared unless the run uses them. They also share temperature, layer aggregation, routing and the correction for the
sampler; a frozen router takes part in no gradient. Penalties, router losses and the scale of an adaptive router shift
are left out. Parts share groups, and a group's baseline makes the errors of its responses sum to about 0, so variance
comes out a little too large, and c a little too small. θ has learned from the old responses and not from the fresh
ones, which makes the old gradients smaller than those of new responses of the old policy would be. One probe is a
sample of one: look at many steps. Under dynamic sampling the prompts are those of the step's last rollout.

Costs, in a probed step only: one rollout with its judging and scoring, one forward pass over the old responses, and a
forward and a backward pass over a batch for each objective and reference. Beside the gradient of a part there are two
float32 copies of the parameters. Only one backward pass of the model is compiled for all of them: γ has no gradient in
any default config, so an objective depends on parameters through log-probabilities alone, and its derivative by those
is an array.
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
from rspo_jax.training.config import LearnerConfig
from rspo_jax.training.loss import score_rows
from rspo_jax.training.stages import (
    Setup,
    choose,
    draw,
    judge_drawing,
    pack_mini_batches,
    score_mini_batches,
    with_advantages,
)
from rspo_jax.training.state import RunState
from rspo_jax.training.update import keep_like_params, route_to_device
from rspo_jax.types import Array, Params, Policy, ScoredBatch


class Variant(NamedTuple):
    """An objective with one of its configs."""

    objective: str
    config: Any


PROBED: Mapping[str, Variant] = {
    **{name: Variant(name, row.config_type()) for name, row in OBJECTIVES.items()},
    "grpo_rs": Variant("grpo", GRPOConfig(gamma_min=0.8)),
    "gspo_rs": Variant("gspo", GSPOConfig(gamma_min=0.8)),
}
"""Suffix of the metrics -> what is probed: all objectives, and two more with a router shift."""

_PROBE = 0x70726F62
"""Folded into the key of a probe; far from the small numbers by which other keys are derived from the same one."""
# At a ratio of 1, GRPO's gradient is that of REINFORCE.
_REFERENCES = {way: Variant("grpo", GRPOConfig(aggregation=way)) for way in AGGREGATIONS}


class GradientSums(NamedTuple):
    """Sums over the gradients G_p of parts, before the division by the weight."""

    total: Params
    """float32, Σ_p G_p."""
    squares: Array
    """float32 scalar, Σ_p |G_p|²."""


class _Weighed(NamedTuple):
    """A mini-batch with the derivatives of every variant's loss by its log-probabilities."""

    batch: ScoredBatch
    cotangents: dict[str, Array]
    """Variant -> float32 [parts, B, T]: the derivative of a part's undivided loss."""
    weights: dict[str, Array]
    """Variant -> float32 scalar: the mini-batch's share of the denominator."""


class _Gradient(NamedTuple):
    """The gradient of a whole batch."""

    total: Params
    """float32, before the division."""
    square: float
    """|total|²."""
    weight: float
    """The denominator."""

    @property
    def norm(self) -> float:
        """Norm of the gradient after the division."""
        return math.sqrt(self.square) / self.weight


class _Model(NamedTuple):
    """The model that gradients are taken of, and how it is scored."""

    policy: Policy
    params: Params
    config: LearnerConfig
    mesh: MeshConfig


def probe_gradients(setup: Setup, state: RunState, scored: list[ScoredBatch]) -> dict[str, float]:
    """Probe the gradients of all objectives at the end of a step; the state does not change.

    Draws a rollout for the step's prompts from the present parameters, with a key of its own.

    Args:
      setup: policy, problems and settings of the run.
      state: the state after the step.
      scored: the mini-batches that the step learned from.

    Returns:
      The metrics, by name.
    """
    config = setup.config
    key, cut_key = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state.key), _PROBE))
    again = state._replace(key=jax.random.key_data(key), cursor=state.cursor - config.prompts)
    drawing, _ = draw(setup, again)
    judged = judge_drawing(setup, drawing)
    rollout = choose([judged], [with_advantages(setup, judged)], config)
    mini_batches, _ = pack_mini_batches(setup, rollout, cut_key)
    fresh, _ = score_mini_batches(setup, state, mini_batches)
    return probe(setup.policy, state.train.params, scored, fresh, setup.learner, config.mesh)


def probe(
    policy: Policy,
    params: Params,
    scored: Sequence[ScoredBatch],
    fresh: Sequence[ScoredBatch],
    config: LearnerConfig,
    mesh: MeshConfig = MeshConfig(),
) -> dict[str, float]:
    """Measure the gradients of all objectives, as the module's docstring defines them.

    Args:
      policy: the model.
      params: θ.
      scored: mini-batches of a step, [parts, ...] each, scored by the policy that drew them.
      fresh: mini-batches of a rollout drawn and scored by θ.
      config: settings of the learner; its objective, penalties and router losses are not used.
      mesh: its rules say where gradients lie, if a mesh is in use (`jax.set_mesh`).

    Returns:
      The metrics, by name.

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
    on_device = route_to_device(mini_batch) if config.route_on_host else mini_batch
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
    """Return log π_θ and raw γ of each part, [parts, B, T]."""

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
    """Return the derivative of every variant's loss by the log-probabilities, [parts, B, T], and its denominator."""

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
    """Return the on-policy gradient and its figures."""
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
    """Return the variance of the parts' gradients and the signal-to-noise ratio of their mean, given Σ_p |G_p|²."""
    excess = parts * squares - gradient.square
    excess = 0.0 if excess < 0 else excess  # by rounding
    return (
        excess * parts / (parts - 1) / gradient.weight**2,
        _divided(gradient.square * (parts - 1), excess),
    )


def _cosine(inner: float, square: float, other_square: float) -> float:
    return _divided(inner, math.sqrt(square) * math.sqrt(other_square))


def _divided(over: float, under: float) -> float:
    """Divide, or return NaN if the divisor is 0."""
    return over / under if under else math.nan


def _sums(model: _Model, batches: list[_Weighed], name: str, start: int, stop: int) -> GradientSums:
    """Sum the gradients of the parts in [start, stop), counted through all mini-batches."""
    policy, params, config, mesh = model
    sums, before = _no_gradient(policy, params, mesh), 0
    for mini_batch, cotangents, _ in batches:
        size = _number_of_parts([mini_batch])
        wanted = range(max(start - before, 0), min(stop - before, size))
        if config.routing == "free":
            mini_batch = _without_route(mini_batch)
        elif wanted and config.route_on_host:
            mini_batch = route_to_device(mini_batch)
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
    """Add the gradient of one more part to the sums. This is the only program with a backward pass of the model."""
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
