"""The policy objectives: RSPO, and the ones that it is measured against. `OBJECTIVES` is the one table of them.

Notation of the formulas below: d = log π_θ(y_t) − log π_old(y_t), w = exp(d), n_i the number of response tokens of
response i, A_i its advantage, γ̃ = sg[max(γ, γ_min)] the floored router-shift ratio without gradient. J is maximised
and the loss is −J. Means over t run over response tokens only; means over i over the responses that have any, so that
masking a response out is the same as not having it.

Everything here is a pure function of arrays: this file must never know a model, a batch object or a trainer. Ratios at
a clip bound keep their gradient; that is decided by an explicit mask, because `jnp.minimum` halves it there.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rspo_jax.precision import at_least_float32
from rspo_jax.statistics import Maximum, Mean, Minimum, Quantile, Statistic, masked_mean, reduce
from rspo_jax.types import Array

POSITIONS = ("pre_clip", "post_clip", "post_clip_literal")
AGGREGATIONS = ("sequence_mean", "token_mean")


def _check_clip(config: Any) -> None:
    for name in ("clip_low", "clip_high"):
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} must be 0 or more, got {getattr(config, name)}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _check_gamma_min(gamma_min: float) -> None:
    if not 0 < gamma_min <= 1:
        raise ValueError(f"gamma_min must lie in (0, 1], got {gamma_min}; 1 switches the router shift off")


@dataclass(frozen=True)
class GMPOConfig:
    """GMPO: the bounds −clip_low and clip_high apply to the log-ratio d of each token."""

    clip_low: float = 0.4
    clip_high: float = 0.4

    def __post_init__(self) -> None:
        _check_clip(self)


@dataclass(frozen=True)
class RSPOConfig:
    """RSPO: GMPO's bounds, the floor of γ, and where γ̃ enters.

    * `pre_clip`: c(d + log γ̃), the bounds see the weighted ratio (the paper's second version).
    * `post_clip`: c(d) + log γ̃, a drifted token always counts less (the first version's intent).
    * `post_clip_literal`: c(d) + sgn(A)·log γ̃, the first version as it is printed, with the bracket raised to the
      sign of A. It *raises* the weight of drifted tokens in bad responses: an ablation, not a recommendation.
    """

    gamma_min: float = 0.8
    clip_low: float = 0.4
    clip_high: float = 0.4
    position: str = "pre_clip"

    def __post_init__(self) -> None:
        _check_clip(self)
        _check_gamma_min(self.gamma_min)
        _check_choice("position", self.position, POSITIONS)


@dataclass(frozen=True)
class GSPOConfig:
    """GSPO: the sequence ratio is clipped to [1 − clip_low, 1 + clip_high]."""

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def __post_init__(self) -> None:
        _check_clip(self)


@dataclass(frozen=True)
class GSPORSConfig(GSPOConfig):
    """GSPO with router shift. With GSPO's own narrow bounds, a mean γ̃ below 1 − clip_low cuts every response with a
    negative advantage and none with a positive one: watch the clip fractions by sign."""

    gamma_min: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_gamma_min(self.gamma_min)


@dataclass(frozen=True)
class GRPOConfig:
    """GRPO: each token's ratio is clipped to [1 − clip_low, 1 + clip_high].

    `sequence_mean` is the mean over responses of the mean over their tokens (the paper's), `token_mean` the mean over
    all tokens of the batch.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregation: str = "sequence_mean"

    def __post_init__(self) -> None:
        _check_clip(self)
        _check_choice("aggregation", self.aggregation, AGGREGATIONS)


@dataclass(frozen=True)
class GRPORSConfig(GRPOConfig):
    """GRPO with router shift: the clip applies to w·γ̃."""

    gamma_min: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_gamma_min(self.gamma_min)


class _Responses(NamedTuple):
    """The arguments of every objective, with padding made harmless."""

    log_ratio: Array  # [B, T] d; 0 on padding
    weight: Array  # [B, T] γ̃ without gradient; 1 on padding, and everywhere where no router shift enters
    advantages: Array  # [B]
    mask: Array  # bool [B, T]
    lengths: Array  # [B] n_i

    def token_mean(self, values: Array) -> Array:
        """[B, T] -> [B], the mean over each response's tokens; 0 where there are none."""
        return jnp.sum(jnp.where(self.mask, values, 0), axis=-1) / jnp.maximum(self.lengths, 1)

    def objective_mean(self, per_response: Array) -> Mean:
        """[B] -> J as a mean over the responses that have tokens."""
        return masked_mean(per_response, self.lengths > 0)


def _within_bounds(value: Array, advantages: Array, low: float, high: float) -> tuple[Array, Array]:
    """Where the one-sided clip leaves `value` alone, and the bound that replaces it elsewhere.

    A good response (A ≥ 0) is held back from above, a bad one (A < 0) from below; `advantages` broadcasts to `value`.
    NaN is left alone, so that it reaches the loss instead of passing for a clipped ratio.
    """
    good = advantages >= 0
    cut = jnp.where(good, value > high, value < low)
    return ~cut, jnp.where(good, high, low).astype(value.dtype)


def _clip_log_ratio(batch: _Responses, log_ratio: Array, config: GMPOConfig | RSPOConfig) -> tuple[Array, Array]:
    """c(x) of GMPO on [B, T] and the mask of the tokens that it leaves alone."""
    kept, bound = _within_bounds(log_ratio, batch.advantages[:, None], -config.clip_low, config.clip_high)
    return jnp.where(kept, log_ratio, bound), kept


def _clip_ratio(
    log_ratio: Array, weight: Array, advantages: Array, config: GRPOConfig | GSPOConfig
) -> tuple[Array, Array]:
    """The PPO clip of exp(log_ratio)·weight, and the mask of what it leaves alone."""
    ratio = jnp.exp(jax.lax.stop_gradient(log_ratio)) * weight
    kept, bound = _within_bounds(ratio, advantages, 1 - config.clip_low, 1 + config.clip_high)
    # A cut ratio may be infinite, and the gradient of exp there times 0 is NaN.
    return jnp.where(kept, jnp.exp(jnp.where(kept, log_ratio, 0)) * weight, bound), kept


def _gmpo(batch: _Responses, config: GMPOConfig) -> tuple[Mean, Array]:
    """J = mean_i A_i · exp(mean_t c(d))."""
    clipped, kept = _clip_log_ratio(batch, batch.log_ratio, config)
    return batch.objective_mean(batch.advantages * jnp.exp(batch.token_mean(clipped))), kept


def _rspo(batch: _Responses, config: RSPOConfig) -> tuple[Mean, Array]:
    """J = mean_i A_i · exp(mean_t c(d + log γ̃)), or γ̃ after the clip."""
    log_weight = jnp.log(batch.weight)
    if config.position == "pre_clip":
        exponent, kept = _clip_log_ratio(batch, batch.log_ratio + log_weight, config)
    else:
        clipped, kept = _clip_log_ratio(batch, batch.log_ratio, config)
        literal = config.position == "post_clip_literal"
        exponent = clipped + (jnp.sign(batch.advantages)[:, None] * log_weight if literal else log_weight)
    return batch.objective_mean(batch.advantages * jnp.exp(batch.token_mean(exponent))), kept


def _gspo(batch: _Responses, config: GSPOConfig) -> tuple[Mean, Array]:
    """J = mean_i min(s·A_i, clip(s)·A_i) with s = exp(mean_t (d + log γ̃))."""
    mean_log_ratio = batch.token_mean(batch.log_ratio + jnp.log(batch.weight))
    ratio, kept = _clip_ratio(mean_log_ratio, jnp.ones_like(mean_log_ratio), batch.advantages, config)
    return batch.objective_mean(batch.advantages * ratio), jnp.broadcast_to(kept[:, None], batch.mask.shape)


def _grpo(batch: _Responses, config: GRPOConfig) -> tuple[Mean, Array]:
    """J = mean_i mean_t min(w·γ̃·A_i, clip(w·γ̃)·A_i), or one mean over all tokens."""
    ratio, kept = _clip_ratio(batch.log_ratio, batch.weight, batch.advantages[:, None], config)
    if config.aggregation == "token_mean":
        return masked_mean(batch.advantages[:, None] * ratio, batch.mask), kept
    return batch.objective_mean(batch.advantages * batch.token_mean(ratio)), kept


class Objective(NamedTuple):
    """One row of the table. `loss` and `terms` take the same arguments for every objective; see `rspo_loss`."""

    name: str
    summary: str
    config_type: type
    formula: Callable[[_Responses, Any], tuple[Mean, Array]]

    @property
    def uses_router_shift(self) -> bool:
        """Whether γ changes the loss; where it does not, it is still reported."""
        return hasattr(self.config_type, "gamma_min")

    def loss(
        self,
        log_probs: Array,
        old_log_probs: Array,
        advantages: Array,
        mask: Array,
        router_shift: Array | None = None,
        config: Any = None,
        entropy: Array | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """The scalar loss −J and a dict of scalar metrics; see `rspo_loss` for arguments and errors."""
        config = self._checked_config(config)
        return _reduced_terms(self, log_probs, old_log_probs, advantages, mask, router_shift, config, entropy)

    def terms(
        self,
        log_probs: Array,
        old_log_probs: Array,
        advantages: Array,
        mask: Array,
        router_shift: Array | None = None,
        config: Any = None,
        entropy: Array | None = None,
    ) -> tuple[Mean, dict[str, Statistic]]:
        """The loss before its division, and the metrics before theirs.

        For micro-batches: add up totals and weights, and divide once. The weight does not depend on the parameters.
        """
        config = self._checked_config(config)
        per_token = {"old_log_probs": old_log_probs, "router_shift": router_shift, "entropy": entropy}
        check_arguments(log_probs, advantages, mask, per_token)
        log_probs = at_least_float32(log_probs)
        dtype = log_probs.dtype
        log_ratio = jnp.where(mask, log_probs - old_log_probs.astype(dtype), 0)
        gamma = None
        if router_shift is not None:
            gamma = jax.lax.stop_gradient(jnp.where(mask, router_shift.astype(dtype), 1))
        weight = jnp.ones_like(log_ratio)
        if gamma is not None and self.uses_router_shift:
            weight = jnp.maximum(gamma, config.gamma_min)
        batch = _Responses(log_ratio, weight, advantages.astype(dtype), mask, jnp.sum(mask, axis=-1, dtype=dtype))
        mean, kept = self.formula(batch, config)
        statistics = _ratio_statistics(batch, kept)
        if gamma is not None:
            statistics |= _gamma_statistics(gamma, mask, getattr(config, "gamma_min", None))
        if entropy is not None:
            statistics["entropy"] = masked_mean(jax.lax.stop_gradient(entropy.astype(dtype)), mask)
        return Mean(-mean.total, mean.weight), statistics

    def _checked_config(self, config: Any) -> Any:
        config = self.config_type() if config is None else config
        if type(config) is not self.config_type:
            raise TypeError(f"{self.name} takes a {self.config_type.__name__}, got a {type(config).__name__}")
        return config


@functools.partial(jax.jit, static_argnames=("objective", "config"))
def _reduced_terms(
    objective: Objective,
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    router_shift: Array | None,
    config: Any,
    entropy: Array | None,
) -> tuple[Array, dict[str, Array]]:
    loss, statistics = objective.terms(log_probs, old_log_probs, advantages, mask, router_shift, config, entropy)
    return loss.reduce(), reduce(statistics)


def check_arguments(log_probs: Array, advantages: Array, mask: Array, per_token: dict[str, Array | None]) -> None:
    """Refuses arrays that do not fit together, before anything is compiled.

    Raises:
      ValueError: naming the argument with the wrong shape.
      TypeError: naming the argument with the wrong dtype.
    """
    if log_probs.ndim != 2:
        raise ValueError(f"log_probs must have axes [B, T], got shape {log_probs.shape}")
    for name, array in (per_token | {"mask": mask}).items():
        if array is not None and array.shape != log_probs.shape:
            raise ValueError(f"{name} must have the shape of log_probs, {log_probs.shape}; got {array.shape}")
    if advantages.shape != log_probs.shape[:1]:
        raise ValueError(f"advantages must have one entry a row, shape {log_probs.shape[:1]}; got {advantages.shape}")
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be boolean, True on response tokens; got {mask.dtype} (use mask.astype(bool))")
    for name, array in (per_token | {"log_probs": log_probs, "advantages": advantages}).items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point, got {array.dtype}")


def _ratio_statistics(batch: _Responses, kept: Array) -> dict[str, Statistic]:
    log_ratio = jax.lax.stop_gradient(batch.log_ratio)
    ratio = jnp.exp(log_ratio)
    sign = jnp.sign(batch.advantages)[:, None]
    cut = (~kept & (sign != 0)).astype(ratio.dtype)
    return {
        "clip_fraction": masked_mean(cut, batch.mask),
        "clip_fraction_positive": masked_mean(cut, batch.mask & (sign > 0)),
        "clip_fraction_negative": masked_mean(cut, batch.mask & (sign < 0)),
        "ratio_mean": masked_mean(ratio, batch.mask),
        "ratio_max": Maximum(jnp.max(jnp.where(batch.mask, ratio, 0))),
        # E_old[w − 1 − log w] estimates KL(π_old ‖ π_θ) without bias and is never negative.
        "approx_kl": masked_mean(jnp.expm1(log_ratio) - log_ratio, batch.mask),
    }


def _gamma_statistics(gamma: Array, mask: Array, gamma_min: float | None) -> dict[str, Statistic]:
    statistics: dict[str, Statistic] = {
        "gamma_mean": masked_mean(gamma, mask),
        "gamma_min": Minimum(jnp.min(gamma)),
        "gamma_p10": Quantile(gamma, mask, jnp.int32(10)),
    }
    if gamma_min is not None:
        statistics["gamma_floor_fraction"] = masked_mean((gamma < gamma_min).astype(gamma.dtype), mask)
    return statistics


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective("rspo", "geometric-mean ratio, token clip, router shift", RSPOConfig, _rspo),
        Objective("gmpo", "geometric-mean ratio, token clip", GMPOConfig, _gmpo),
        Objective("gspo", "sequence ratio, sequence clip", GSPOConfig, _gspo),
        Objective("gspo_rs", "GSPO with router shift", GSPORSConfig, _gspo),
        Objective("grpo", "token ratio, token clip", GRPOConfig, _grpo),
        Objective("grpo_rs", "GRPO with router shift", GRPORSConfig, _grpo),
    )
}


def rspo_loss(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    router_shift: Array | None = None,
    config: RSPOConfig = RSPOConfig(),
    entropy: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Router-Shift Policy Optimization (arXiv 2510.23027): −mean_i A_i · exp(mean_t c(d + log γ̃)).

    Args:
      log_probs: float32 [B, T], log π_θ(y_t | x, y_<t) of the policy being trained; the only argument with a gradient.
      old_log_probs: float32 [B, T], the same under the policy that gave the route.
      advantages: float32 [B].
      mask: bool [B, T], True on response tokens. What the arrays hold elsewhere, NaN included, has no effect.
      router_shift: float32 [B, T], raw γ in (0, 1] from `rspo_jax.router_shift`, before the floor. None for a dense
        model: γ = 1, and RSPO is GMPO.
      config: floor, bounds, and where γ̃ enters.
      entropy: float32 [B, T], only reported.

    Returns:
      The scalar loss and a dict of float32 scalars: `clip_fraction` (share of response tokens without gradient), the
      same for responses with positive and negative advantage, `ratio_mean` and `ratio_max` of w, `approx_kl` in nats,
      and with a router shift `gamma_mean`, `gamma_min`, `gamma_p10` and `gamma_floor_fraction` of the raw γ.
      Both loss and gradient are 0 where no response has a token. Computed in float32, or float64 where given it.

    Raises:
      ValueError: naming the argument whose shape does not fit.
      TypeError: naming the argument whose dtype does not fit, or the config of another objective.
    """
    return OBJECTIVES["rspo"].loss(log_probs, old_log_probs, advantages, mask, router_shift, config, entropy)
