"""The pieces that all objectives share: settings, the cleaned arguments of a formula, and the clips.

Notation of this folder: d = log π_θ(y_t) − log π_old(y_t) of a token, w = exp(d), n_i the number of response tokens of
response i, A_i its advantage, sg the stop-gradient, and γ̃ = sg[max(γ, γ_min)] the floored router-shift ratio, which is
1 where there is no router shift. J is maximised; the loss is −J. Means over t run over response tokens only. Means over
i run over the responses that have any, so that masking a response out is the same as not having it.

A formula maps `Responses` and its config to J, as a mean that has not been divided yet, and to a boolean mask [B, T] of
the tokens that its clip leaves alone. A ratio at a clip bound keeps its whole gradient. An explicit mask decides that,
because `jnp.minimum` would halve the gradient there.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from rspo_jax.objectives.exponents import bounded_exp
from rspo_jax.statistics import Mean, masked_mean
from rspo_jax.types import Array, check_choice

Aggregation = Literal["sequence_mean", "token_mean", "constant_length"]
AGGREGATIONS = get_args(Aggregation)
GammaUse = Literal["weight", "mask"]


@dataclass(frozen=True)
class ObjectiveConfig:
    """Settings that every objective has. An objective that offers one of them as an option declares it as a field."""

    aggregation: ClassVar[Aggregation] = "sequence_mean"
    """The mean over a batch: over responses of the mean over their tokens (`sequence_mean`), over all tokens
    (`token_mean`), or over responses of the sum over their tokens, divided by one length (`constant_length`)."""
    constant_length: ClassVar[int | None] = None
    """Tokens that the aggregation `constant_length` divides by; None for the T of the arrays."""
    gamma_min: ClassVar[float | None] = None
    """The floor of γ, in (0, 1]; None leaves the router shift out."""
    gamma_use: ClassVar[GammaUse] = "weight"
    """How γ enters the loss; see `RouterShiftOptions`."""
    gamma_gradient: ClassVar[bool] = False
    """True if the gradient flows through γ."""


@dataclass(frozen=True, kw_only=True)
class RouterShiftOptions(ObjectiveConfig):
    """Options of the router shift, for the config of an objective that γ can enter.

    By default γ̃ = sg[max(γ, gamma_min)] weights each token, after RSPO (`rspo_jax.objectives.rspo`). Two ablations:

    * `gamma_use` "mask": a token with γ < gamma_min is left out of the gradient and its ratio counts as 1, all other
      tokens have weight 1, and the denominators stay. This library's own choice.
    * `gamma_gradient`: no stop-gradient. The loss then also pulls the router towards the old one, wherever γ is above
      its floor. In RSPO's paper, training without the stop-gradient collapses.
    """

    gamma_min: float | None = None
    """The floor of γ, in (0, 1]; None leaves the router shift out."""
    gamma_use: GammaUse = "weight"
    """"weight", or "mask" (an ablation)."""
    gamma_gradient: bool = False
    """If true, the gradient flows through γ (an ablation)."""

    def __post_init__(self) -> None:
        if self.gamma_min is not None and not 0 < self.gamma_min <= 1:
            raise ValueError(f"gamma_min must lie in (0, 1], got {self.gamma_min}; 1 switches the router shift off")
        check_choice("gamma_use", self.gamma_use, GammaUse)
        if self.gamma_gradient and self.gamma_use == "mask":
            raise ValueError("gamma_gradient needs gamma_use 'weight': a mask has no gradient")


def check_clip(clip_low: float | None, clip_high: float | None) -> None:
    """Refuse clip bounds that are negative or NaN; None stands for no bound.

    Raises:
      ValueError: naming the bound.
    """
    for name, bound in {"clip_low": clip_low, "clip_high": clip_high}.items():
        if bound is not None and not bound >= 0:
            raise ValueError(f"{name} must be 0 or more, got {bound}")


class Responses(NamedTuple):
    """The arguments of a formula, with padding made harmless."""

    log_probs: Array
    """float [B, T], log π_θ; 0 on padding."""
    log_ratio: Array
    """float [B, T], d; 0 on padding."""
    weight: Array
    """float [B, T], γ̃; 1 on padding, and everywhere if no router shift enters."""
    advantages: Array
    """float [B], or [B, T] for an objective that takes advantages of tokens."""
    mask: Array
    """bool [B, T], True on response tokens."""
    lengths: Array
    """float [B], n_i."""

    @property
    def token_advantages(self) -> Array:
        """The advantages in a shape that broadcasts over tokens: [B, 1] or [B, T]."""
        return self.advantages if self.advantages.ndim == 2 else self.advantages[:, None]

    def token_mean(self, values: Array) -> Array:
        """Return the mean over each response's tokens, [B, T] -> [B]; 0 where there are none."""
        return self._token_sum(values) / jnp.maximum(self.lengths, 1)

    def response_mean(self, values: Array) -> Mean:
        """Return the mean over the responses that have tokens, [B] -> a mean before its division."""
        return masked_mean(values, self.lengths > 0)

    def aggregate(self, factors: Array, values: Array, config: ObjectiveConfig) -> Mean:
        """Return the mean of factors × values over the batch, as the config aggregates.

        Args:
          factors: float [B], one factor a response.
          values: float [B, T], one value a token.
          config: the objective's config.
        """
        if config.aggregation == "token_mean":
            return masked_mean(factors[:, None] * values, self.mask)
        if config.aggregation == "constant_length":
            per_response = self._token_sum(values) / (config.constant_length or self.mask.shape[1])
        else:
            per_response = self.token_mean(values)
        return self.response_mean(factors * per_response)

    def _token_sum(self, values: Array) -> Array:
        return jnp.sum(jnp.where(self.mask, values, 0), axis=-1)


def clean(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    gamma: Array | None,
    config: ObjectiveConfig,
) -> Responses:
    """Return the arguments of a formula, made from those of an objective.

    Args:
      log_probs: float [B, T].
      old_log_probs: [B, T], in the dtype of `log_probs`, as all of the floating-point arguments.
      advantages: [B] or [B, T].
      mask: bool [B, T], True on response tokens.
      gamma: [B, T], the raw γ with 1 on padding; None for none.
      config: the objective's config; says whether and how γ enters.
    """
    current = jnp.where(mask, log_probs, 0)
    log_ratio = jnp.where(mask, log_probs - old_log_probs, 0)
    weight = jnp.ones_like(log_ratio)
    if gamma is not None and config.gamma_min is not None:
        floor = jnp.asarray(config.gamma_min, log_probs.dtype)
        gamma = gamma if config.gamma_gradient else jax.lax.stop_gradient(gamma)
        if config.gamma_use == "weight":
            weight = jnp.where(gamma < floor, floor, gamma)
        else:
            # A NaN must still reach the loss, be it in a log-ratio or in γ.
            left_out = gamma < floor
            current = jnp.where(left_out, jax.lax.stop_gradient(current), current)
            log_ratio = jnp.where(left_out & ~jnp.isnan(log_ratio), 0, log_ratio)
            weight = jnp.where(jnp.isnan(gamma), gamma, weight)
    if advantages.ndim == 2:
        advantages = jnp.where(mask, advantages, 0)
    return Responses(current, log_ratio, weight, advantages, mask, jnp.sum(mask, axis=-1, dtype=log_probs.dtype))


def one_sided_clip(
    value: Array, advantages: Array, low: float, high: float, dual: float | None = None
) -> tuple[Array, Array]:
    """Return which values a one-sided clip leaves alone, and the bound that replaces each of the others.

    A good response (A ≥ 0) is held back from above, a bad one (A < 0) from below and, by the dual clip, from above too.
    NaN is left alone, so that it reaches the loss instead of passing for a clipped ratio.

    Args:
      value: float, what is clipped: ratios or log-ratios.
      advantages: float, broadcasts to `value`.
      low: the lower bound for A < 0.
      high: the upper bound for A ≥ 0.
      dual: the upper bound for A < 0; None for none.

    Returns:
      bool and float, both of the shape of `value`.
    """
    good = advantages >= 0
    cut = jnp.where(good, value > high, value < low)
    bound = jnp.where(good, high, low).astype(value.dtype)
    if dual is not None:
        beyond = ~good & (value > dual)
        cut, bound = cut | beyond, jnp.where(beyond, jnp.asarray(dual, value.dtype), bound)
    return ~cut, bound


def clip_ratio(
    log_ratio: Array, weight: Array, advantages: Array, low: float, high: float, dual: float | None = None
) -> tuple[Array, Array]:
    """Return the ratio exp(log_ratio) · weight after the one-sided clip, and the mask of what the clip leaves alone.

    This is the clip of PPO's Eq. 7 (arXiv 1707.06347): times A, the result is min(ratio · A, clip(ratio) · A). Beyond
    20 nats, where only A < 0 or bounds without end leave a ratio alone, `bounded_exp` takes the place of exp.

    Args:
      log_ratio: float, [B] for ratios of responses or [B, T] for ratios of tokens; carries the gradient.
      weight: float, γ̃ in the shape of `log_ratio`; 1 where `log_ratio` has it already.
      advantages: float, broadcasts to `log_ratio`.
      low: the lower bound of the ratio.
      high: the upper bound of the ratio.
      dual: the upper bound of the ratio for A < 0; None for none.
    """
    ratio = jnp.exp(jax.lax.stop_gradient(log_ratio)) * weight
    kept, bound = one_sided_clip(ratio, advantages, low, high, dual)
    # A cut ratio counts as its bound, however large it is; what is kept may be large too, if A < 0.
    return jnp.where(kept, bounded_exp(jnp.where(kept, log_ratio, 0)) * weight, bound), kept
