"""The formulas of the policy objectives, as functions of arrays that `table` has checked and cleaned.

Notation: d = log π_θ(y_t) − log π_old(y_t), w = exp(d), n_i the number of response tokens of response i, A_i its
advantage, sg the stop-gradient, γ̃ = sg[max(γ, γ_min)] the floored router-shift ratio; γ̃ = 1 where there is no router
shift. Each formula gives J, which is maximised, as a mean before its division, and the mask of what its clip leaves
alone. Means over t run over response tokens only; means over i over the responses that have any, so that masking a
response out is the same as not having it.

Ratios at a clip bound keep their gradient; that is decided by an explicit mask, because `jnp.minimum` halves it there.
This file must never know a model, a batch object or a trainer.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rspo_jax.objectives.configs import (
    CISPOConfig,
    GMPOConfig,
    GRPOConfig,
    GSPOConfig,
    RouterShiftOptions,
    RSPOConfig,
    SAPOConfig,
)
from rspo_jax.statistics import Mean, masked_mean
from rspo_jax.types import Array

SATURATED_LOG_RATIO = 20.0
"""Of SAPO: σ(τ(e^20 − 1)) is 1 and flat to any precision."""


class Responses(NamedTuple):
    """The arguments of every objective, with padding made harmless."""

    log_probs: Array  # [B, T]; 0 on padding
    log_ratio: Array  # [B, T] d; 0 on padding
    weight: Array  # [B, T] γ̃; 1 on padding, and everywhere where no router shift enters
    advantages: Array  # [B], or [B, T] where the objective takes those of tokens
    mask: Array  # bool [B, T]
    lengths: Array  # [B] n_i

    @property
    def token_advantages(self) -> Array:
        """[B, 1] or [B, T]."""
        return self.advantages if self.advantages.ndim == 2 else self.advantages[:, None]

    def token_mean(self, values: Array) -> Array:
        """[B, T] -> [B], the mean over each response's tokens; 0 where there are none."""
        return self._token_sum(values) / jnp.maximum(self.lengths, 1)

    def objective_mean(self, per_response: Array) -> Mean:
        """[B] -> J as a mean over the responses that have tokens."""
        return masked_mean(per_response, self.lengths > 0)

    def aggregate(self, factors: Array, per_token: Array, config: Any) -> Mean:
        """[B], [B, T] -> the mean of their product over the batch, in the way of the config."""
        if config.aggregation == "token_mean":
            return masked_mean(factors[:, None] * per_token, self.mask)
        if config.aggregation == "constant_length":
            per_response = self._token_sum(per_token) / (config.constant_length or self.mask.shape[1])
        else:
            per_response = self.token_mean(per_token)
        return self.objective_mean(factors * per_response)

    def _token_sum(self, values: Array) -> Array:
        return jnp.sum(jnp.where(self.mask, values, 0), axis=-1)


def clean(
    log_probs: Array, old_log_probs: Array, advantages: Array, mask: Array, gamma: Array | None, config: Any
) -> Responses:
    """The arguments of a formula from those of an objective, all in one dtype; `gamma` is 1 on padding."""
    dtype = log_probs.dtype
    current = jnp.where(mask, log_probs, 0)
    log_ratio = jnp.where(mask, log_probs - old_log_probs, 0)
    weight = jnp.ones_like(log_ratio)
    if gamma is not None and shifts(config):
        floor = jnp.asarray(config.gamma_min, dtype)
        gamma = gamma if config.gamma_gradient else jax.lax.stop_gradient(gamma)
        if config.gamma_use == "weight":
            weight = jnp.where(gamma < floor, floor, gamma)
        else:
            left_out = gamma < floor
            current = jnp.where(left_out, jax.lax.stop_gradient(current), current)
            log_ratio = jnp.where(left_out & ~jnp.isnan(log_ratio), 0, log_ratio)
            weight = jnp.where(jnp.isnan(gamma), gamma, weight)
    if advantages.ndim == 2:
        advantages = jnp.where(mask, advantages, 0)
    return Responses(current, log_ratio, weight, advantages, mask, jnp.sum(mask, axis=-1, dtype=dtype))


def shifts(config: Any) -> bool:
    """Whether the config lets γ into the loss."""
    return isinstance(config, RouterShiftOptions) and config.gamma_min is not None


def gmpo(batch: Responses, config: GMPOConfig) -> tuple[Mean, Array]:
    """J = mean_i A_i · exp(mean_t c(d))."""
    clipped, kept = _clip_log_ratio(batch, batch.log_ratio, config)
    return batch.objective_mean(batch.advantages * jnp.exp(batch.token_mean(clipped))), kept


def rspo(batch: Responses, config: RSPOConfig) -> tuple[Mean, Array]:
    """J = mean_i A_i · exp(mean_t c(d + log γ̃)), or γ̃ after the clip."""
    log_weight = jnp.log(batch.weight)
    if config.position == "pre_clip":
        exponent, kept = _clip_log_ratio(batch, batch.log_ratio + log_weight, config)
    else:
        clipped, kept = _clip_log_ratio(batch, batch.log_ratio, config)
        literal = config.position == "post_clip_literal"
        exponent = clipped + (jnp.sign(batch.advantages)[:, None] * log_weight if literal else log_weight)
    return batch.objective_mean(batch.advantages * jnp.exp(batch.token_mean(exponent))), kept


def gspo(batch: Responses, config: GSPOConfig) -> tuple[Mean, Array]:
    """J = mean_i min(s·A_i, clip(s)·A_i) with s = exp(mean_t (d + log γ̃))."""
    mean_log_ratio = batch.token_mean(batch.log_ratio + jnp.log(batch.weight))
    ratio, kept = _clip_ratio(mean_log_ratio, jnp.ones_like(mean_log_ratio), batch.advantages, config)
    return batch.objective_mean(batch.advantages * ratio), jnp.broadcast_to(kept[:, None], batch.mask.shape)


def gspo_token(batch: Responses, config: GSPOConfig) -> tuple[Mean, Array]:
    """J = mean_i mean_t min(s_t·A_t, clip(s_t)·A_t) with s_t = sg[exp(mean_t d)]·exp(mean_t log γ̃)·π_t/sg[π_t].

    The router shift stands inside the sequence mean, as in GSPO: with one advantage a response the gradient is GSPO's.
    """
    log_ratio = jax.lax.stop_gradient(batch.log_ratio)
    mean_log_ratio = batch.token_mean(log_ratio + jnp.log(batch.weight))
    of_token = mean_log_ratio[:, None] + (batch.log_ratio - log_ratio)
    advantages = jnp.broadcast_to(batch.token_advantages, of_token.shape)
    ratio, kept = _clip_ratio(of_token, jnp.ones_like(of_token), advantages, config)
    return batch.aggregate(jnp.ones_like(mean_log_ratio), advantages * ratio, config), kept


def grpo(batch: Responses, config: GRPOConfig) -> tuple[Mean, Array]:
    """J = mean of min(w·γ̃·A_i, clip(w·γ̃)·A_i), and of no less than dual_clip·A_i; the mean is the config's."""
    advantages = batch.advantages[:, None]
    ratio, kept = _clip_ratio(batch.log_ratio, batch.weight, advantages, config, config.dual_clip)
    return batch.aggregate(batch.advantages, ratio, config), kept


def cispo(batch: Responses, config: CISPOConfig) -> tuple[Mean, Array]:
    """J = mean of sg[clip(w)]·γ̃·A_i·log π over all tokens; what the clip cuts keeps its gradient.

    The router shift multiplies the clipped weight: a token that drifted counts less, however far it is clipped.
    """
    ratio = jnp.exp(jax.lax.stop_gradient(batch.log_ratio))
    low, high = 0 if config.clip_low is None else 1 - config.clip_low, 1 + config.clip_high
    kept = ~((ratio < low) | (ratio > high))
    clipped = jnp.where(kept, ratio, jnp.where(ratio > high, high, low).astype(ratio.dtype))
    return batch.aggregate(batch.advantages, clipped * batch.weight * batch.log_probs, config), kept


def sapo(batch: Responses, config: SAPOConfig) -> tuple[Mean, Array]:
    """J = mean_i mean_t (4/τ)·σ(τ(w·γ̃ − 1))·A_i, with τ by the sign of A_i; nothing is cut."""
    saturated = batch.log_ratio > SATURATED_LOG_RATIO  # exp would overflow, and its gradient times 0 be NaN
    log_ratio = jnp.where(saturated, jnp.asarray(SATURATED_LOG_RATIO, batch.log_ratio.dtype), batch.log_ratio)
    tau = jnp.where(batch.advantages > 0, config.tau_positive, config.tau_negative).astype(log_ratio.dtype)[:, None]
    x = tau * (jnp.exp(log_ratio) * batch.weight - 1)
    # The derivative of σ is σ(x)·(1 − σ(x)), and where x is large the difference cancels. 1 − σ(−x) is without that.
    rising = x > 0
    small = jax.nn.sigmoid(jnp.where(rising, -x, x))
    gate = 4 / tau * jnp.where(rising, 1 - small, small)
    return batch.aggregate(batch.advantages, gate, config), jnp.ones_like(batch.mask)


def _within_bounds(
    value: Array, advantages: Array, low: float, high: float, dual: float | None = None
) -> tuple[Array, Array]:
    """Where the one-sided clip leaves `value` alone, and the bound that replaces it elsewhere.

    A good response (A ≥ 0) is held back from above, a bad one (A < 0) from below and, by the dual clip, from above too;
    `advantages` broadcasts to `value`. NaN is left alone, so that it reaches the loss instead of passing for a clipped
    ratio.
    """
    good = advantages >= 0
    cut = jnp.where(good, value > high, value < low)
    bound = jnp.where(good, high, low).astype(value.dtype)
    if dual is not None:
        beyond = ~good & (value > dual)
        cut, bound = cut | beyond, jnp.where(beyond, jnp.asarray(dual, value.dtype), bound)
    return ~cut, bound


def _clip_log_ratio(batch: Responses, log_ratio: Array, config: GMPOConfig | RSPOConfig) -> tuple[Array, Array]:
    """c(x) of GMPO on [B, T] and the mask of the tokens that it leaves alone."""
    kept, bound = _within_bounds(log_ratio, batch.advantages[:, None], -config.clip_low, config.clip_high)
    return jnp.where(kept, log_ratio, bound), kept


def _clip_ratio(
    log_ratio: Array, weight: Array, advantages: Array, config: GRPOConfig | GSPOConfig, dual: float | None = None
) -> tuple[Array, Array]:
    """The PPO clip of exp(log_ratio)·weight, and the mask of what it leaves alone."""
    ratio = jnp.exp(jax.lax.stop_gradient(log_ratio)) * weight
    kept, bound = _within_bounds(ratio, advantages, 1 - config.clip_low, 1 + config.clip_high, dual)
    # A cut ratio may be infinite, and the gradient of exp there times 0 is NaN.
    return jnp.where(kept, jnp.exp(jnp.where(kept, log_ratio, 0)) * weight, bound), kept
