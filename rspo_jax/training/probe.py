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
from rspo_jax.routing import update_route
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
from rspo_jax.training.update import freeze, keep_like_params, rescore, route_to_device
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
    variance: float
    """Variance of the parts' gradients, summed over all parameters."""
    snr: float
    """Signal-to-noise ratio of their mean."""

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
    judged = judge_drawing(setup, state, drawing)
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
    # The derivatives of every loss by the log-probabilities at θ, for the old responses and, on-policy, for fresh ones.
    old, new = [], []
    for mini_batch in scored:
        on_device = route_to_device(mini_batch) if config.route_on_host else mini_batch
        log_probs, gamma = rescore(policy, params, on_device, config)
        bare = mini_batch._replace(old_route=None)
        old.append(_Weighed(mini_batch, *_cotangents(log_probs, gamma, bare, config.correction, tuple(PROBED.items()))))
    for mini_batch in fresh:
        bare = mini_batch._replace(old_route=None)
        arguments = (bare.old_log_probs, None, bare, config.correction, tuple(_REFERENCES.items()))
        new.append(_Weighed(mini_batch, *_cotangents(*arguments)))
    # Each objective beside the on-policy gradient with the same mean over tokens.
    metrics: dict[str, float] = {}
    for way in AGGREGATIONS:
        reference, halves_cosine = _reference(model, new, way)
        metrics[f"probe_reference_cosine_{way}"] = halves_cosine
        metrics[f"probe_reference_snr_{way}"] = reference.snr
        metrics[f"probe_reference_norm_{way}"] = reference.norm
        for name in [name for name, variant in PROBED.items() if variant.config.aggregation == way]:
            sums = _sums(model, old, name, 0, _number_of_parts(scored))
            gradient = _gradient(sums.total, float(np.asarray(sums.squares)), old, name)
            inner = float(np.asarray(_dot(gradient.total, reference.total)))
            metrics[f"probe_cosine_{name}"] = _cosine(inner, gradient.square, reference.square)
            metrics[f"probe_snr_{name}"] = gradient.snr
            metrics[f"probe_variance_{name}"] = gradient.variance
            metrics[f"probe_norm_{name}"] = gradient.norm / reference.norm if reference.norm else math.nan
    return metrics


def _number_of_parts(batches: Sequence[ScoredBatch]) -> int:
    return sum(len(mini_batch.batch.mask) for mini_batch in batches)


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


def _reference(model: _Model, fresh: list[_Weighed], way: str) -> tuple[_Gradient, float]:
    """Return the on-policy gradient, and the cosine between those of its two halves."""
    parts = _number_of_parts([mini_batch.batch for mini_batch in fresh])
    first, second = _sums(model, fresh, way, 0, parts // 2), _sums(model, fresh, way, parts // 2, parts)
    pairs = ((first, second), (first, first), (second, second))
    cosine = _cosine(*(float(np.asarray(_dot(one.total, other.total))) for one, other in pairs))
    squares = float(np.asarray(first.squares)) + float(np.asarray(second.squares))
    return _gradient(_added(first.total, second.total), squares, fresh, way), cosine


def _gradient(total: Params, squares: float, batches: list[_Weighed], name: str) -> _Gradient:
    """Return a variant's gradient and its figures, given Σ_p G_p and Σ_p |G_p|² over all parts of the batches."""
    parts = _number_of_parts([mini_batch.batch for mini_batch in batches])
    weight = max(sum(float(np.asarray(mini_batch.weights[name])) for mini_batch in batches), 1.0)
    square = float(np.asarray(_dot(total, total)))
    excess = parts * squares - square
    excess = 0.0 if excess < 0 else excess  # negative by rounding only
    variance = excess * parts / (parts - 1) / weight**2
    return _Gradient(total, square, weight, variance, square * (parts - 1) / excess if excess else math.nan)


def _cosine(inner: float, square: float, other_square: float) -> float:
    norms = math.sqrt(square) * math.sqrt(other_square)
    return inner / norms if norms else math.nan


def _sums(model: _Model, batches: list[_Weighed], name: str, start: int, stop: int) -> GradientSums:
    """Sum the gradients of the parts in [start, stop), counted through all mini-batches."""
    policy, params, config, mesh = model
    sums, before = _no_gradient(policy, params, mesh), 0
    for mini_batch, cotangents, _ in batches:
        size = len(mini_batch.batch.mask)
        wanted = range(max(start - before, 0), min(stop - before, size))
        if config.routing == "free":
            mini_batch = mini_batch._replace(old_route=None)
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


@jax.jit
def _dot(one: Params, other: Params) -> Array:
    return jax.tree.reduce(jnp.add, jax.tree.map(lambda a, b: jnp.sum(a * b), one, other))


@functools.partial(jax.jit, donate_argnames="one")
def _added(one: Params, other: Params) -> Params:
    return jax.tree.map(jnp.add, one, other)
