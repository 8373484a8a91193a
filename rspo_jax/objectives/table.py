"""The table of objectives, `OBJECTIVES`: RSPO and the objectives that it is measured against.

A row joins a config and a formula, which live together in one file an idea, and `Objective` gives every row the same
signature. The loss is −J, J being maximised. A penalty on each token, such as a KL penalty, goes in as `penalty`; a
correction for the sampler's numerics goes in through `log_probs` (`rspo_jax.objectives.corrections`).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rspo_jax.objectives.cispo import CISPOConfig, cispo
from rspo_jax.objectives.grpo import DAPOConfig, DrGRPOConfig, GRPOConfig, ReinforcePPConfig, RLOOConfig, grpo
from rspo_jax.objectives.gspo import GSPOConfig, GSPOTokenConfig, gspo, gspo_token
from rspo_jax.objectives.responses import ObjectiveConfig, Responses, clean
from rspo_jax.objectives.rspo import GMPOConfig, RSPOConfig, gmpo, rspo
from rspo_jax.objectives.sapo import SAPOConfig, sapo
from rspo_jax.statistics import Maximum, Mean, Minimum, Quantile, Statistic, at_least_float32, masked_mean, reduce
from rspo_jax.types import Array


class Objective(NamedTuple):
    """One row of the table. `loss` and `terms` take the same arguments for every objective; `loss` documents them."""

    name: str
    """The row's key."""
    summary: str
    """The objective's distinguishing features, in a few words."""
    config_type: type[ObjectiveConfig]
    """The class of its config."""
    formula: Callable[[Responses, Any], tuple[Mean, Array]]
    """J before its division, and the mask of the tokens that the clip leaves alone."""
    advantages: str = "group"
    """The estimator that its source uses, a key of `rspo_jax.objectives.ADVANTAGES`."""
    takes_token_advantages: bool = False
    """True if advantages may be [B, T]."""
    clip_cuts_gradient: bool = True
    """False if the clip cuts weights, and the gradient stays."""

    def checked_config(self, config: ObjectiveConfig | None) -> ObjectiveConfig:
        """Return the config, or the default one when absent.

        Raises:
          TypeError: if it is the config of another objective.
        """
        config = self.config_type() if config is None else config
        if type(config) is not self.config_type:
            raise TypeError(f"{self.name} takes a {self.config_type.__name__}, got a {type(config).__name__}")
        return config

    def uses_router_shift(self, config: ObjectiveConfig | None = None) -> bool:
        """Return whether γ changes the loss under a config, the default one when absent.

        An objective that does not use γ still reports it.
        """
        return self.checked_config(config).gamma_min is not None

    def learned_tokens(self, statistics: Mapping[str, Statistic]) -> Array:
        """Return the number of tokens that rewards teach something: with an advantage, and not cut by the clip.

        Args:
          statistics: of `terms`, of one batch or stacked over several.

        Returns:
          A float32 scalar.
        """
        learned = []
        for sign in ("positive", "negative"):
            cut = statistics[f"clip_fraction_{sign}"]
            assert isinstance(cut, Mean)
            learned.append(jnp.sum(cut.weight - cut.total if self.clip_cuts_gradient else cut.weight))
        return learned[0] + learned[1]

    def weight(self, mask: Array, config: ObjectiveConfig | None = None) -> Array:
        """Return the weight that `terms` will divide by: the number of responses that have tokens, or of tokens.

        Args:
          mask: bool [..., B, T]; leading axes, of micro-batches for example, are counted together.
          config: the objective's own config; its defaults when absent.

        Returns:
          A float32 scalar.
        """
        counted = mask if self.checked_config(config).aggregation == "token_mean" else jnp.any(mask, axis=-1)
        return jnp.sum(counted, dtype=jnp.float32)

    def loss(
        self,
        log_probs: Array,
        old_log_probs: Array,
        advantages: Array,
        mask: Array,
        router_shift: Array | None = None,
        config: ObjectiveConfig | None = None,
        penalty: Array | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """Return the scalar loss, −J plus the mean penalty, and a dict of scalar metrics.

        Args:
          log_probs: float32 [B, T], log π_θ(y_t | x, y_<t) of the policy being trained.
          old_log_probs: float32 [B, T], the same under the policy that gave the route.
          advantages: float32 [B]; also [B, T] for an objective that takes advantages of tokens.
          mask: bool [B, T], True on response tokens. What the arrays hold elsewhere, NaN included, has no effect.
          router_shift: float32 [B, T], raw γ in (0, 1] from `rspo_jax.router_shift`, before the floor; γ = 1 when
            absent. It has a gradient only if the config asks for one.
          config: the objective's own config; its defaults when absent.
          penalty: float32 [B, T], added to the loss of each token and averaged as the objective averages its tokens;
            for an objective of whole responses, over responses of the mean over their tokens. It has a gradient.

        Returns:
          The loss and a dict of float32 scalars: `clip_fraction` (share of response tokens that the clip cuts: they
          have no gradient, except in CISPO, which clips their weight), the same for positive and negative advantages,
          `ratio_mean` and `ratio_max` of w, `approx_kl` in nats, and with a router shift `gamma_mean`, `gamma_min`,
          `gamma_p10` and, under a floor, `gamma_floor_fraction` of the raw γ. Both loss and gradient are 0 where no
          response has a token. Computed in float32, or in float64 if `log_probs` are float64.

        Raises:
          ValueError: naming the argument whose shape does not fit.
          TypeError: naming the argument whose dtype does not fit, or the config of another objective.
        """
        config = self.checked_config(config)
        return _reduced_terms(self, config, log_probs, old_log_probs, advantages, mask, router_shift, penalty)

    def terms(
        self,
        log_probs: Array,
        old_log_probs: Array,
        advantages: Array,
        mask: Array,
        router_shift: Array | None = None,
        config: ObjectiveConfig | None = None,
        penalty: Array | None = None,
    ) -> tuple[Mean, dict[str, Statistic]]:
        """Return the loss before its division, and the metrics before theirs. Arguments are those of `loss`.

        For micro-batches: add up totals and weights, and divide once. The weight depends on mask and config alone.
        """
        config = self.checked_config(config)
        per_token = {"old_log_probs": old_log_probs, "router_shift": router_shift, "penalty": penalty}
        _check_arguments(log_probs, advantages, mask, per_token, self.takes_token_advantages)
        log_probs = at_least_float32(log_probs)
        dtype = log_probs.dtype
        gamma = None if router_shift is None else jnp.where(mask, router_shift.astype(dtype), 1)
        batch = clean(log_probs, old_log_probs.astype(dtype), advantages.astype(dtype), mask, gamma, config)
        mean, kept = self.formula(batch, config)
        loss = Mean(-mean.total, mean.weight)
        if penalty is not None:
            added = batch.aggregate(jnp.ones_like(batch.lengths), penalty.astype(dtype), config)
            loss = Mean(loss.total + added.total, loss.weight)
        # Not the formula's own log-ratio: a router shift used as a mask changes that one.
        log_ratio = jnp.where(mask, log_probs - old_log_probs.astype(dtype), 0)
        statistics = _ratio_statistics(batch, log_ratio, kept)
        if gamma is not None:
            statistics |= _gamma_statistics(jax.lax.stop_gradient(gamma), mask, config.gamma_min)
        return loss, statistics


@functools.partial(jax.jit, static_argnames=("objective", "config"))
def _reduced_terms(
    objective: Objective,
    config: ObjectiveConfig,
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    router_shift: Array | None,
    penalty: Array | None,
) -> tuple[Array, dict[str, Array]]:
    loss, statistics = objective.terms(log_probs, old_log_probs, advantages, mask, router_shift, config, penalty)
    return loss.reduce(), reduce(statistics)


def _check_arguments(
    log_probs: Array,
    advantages: Array,
    mask: Array,
    per_token: dict[str, Array | None],
    takes_token_advantages: bool,
) -> None:
    """Refuse arrays that do not fit together, before anything is compiled.

    Raises:
      ValueError: naming the argument with the wrong shape.
      TypeError: naming the argument with the wrong dtype.
    """
    if log_probs.ndim != 2:
        raise ValueError(f"log_probs must have axes [B, T], got shape {log_probs.shape}")
    for name, array in (per_token | {"mask": mask}).items():
        if array is not None and array.shape != log_probs.shape:
            raise ValueError(f"{name} must have the shape of log_probs, {log_probs.shape}; got {array.shape}")
    if advantages.shape != log_probs.shape[:1] and not (takes_token_advantages and advantages.shape == log_probs.shape):
        also = f", or one a token, shape {log_probs.shape}" if takes_token_advantages else ""
        raise ValueError(
            f"advantages must have one entry a row, shape {log_probs.shape[:1]}{also}; got {advantages.shape}"
        )
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be boolean, True on response tokens; got {mask.dtype} (use mask.astype(bool))")
    for name, array in (per_token | {"log_probs": log_probs, "advantages": advantages}).items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point, got {array.dtype}")


def _ratio_statistics(batch: Responses, log_ratio: Array, kept: Array) -> dict[str, Statistic]:
    log_ratio = jax.lax.stop_gradient(log_ratio)
    ratio = jnp.exp(log_ratio)
    sign = jnp.sign(batch.token_advantages)
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
        Objective("rspo", "geometric-mean ratio, token clip, router shift", RSPOConfig, rspo),
        Objective("gmpo", "geometric-mean ratio, token clip", GMPOConfig, gmpo),
        Objective("gspo", "sequence ratio, sequence clip", GSPOConfig, gspo),
        Objective(
            "gspo_token",
            "GSPO's ratio and clip, advantages of tokens",
            GSPOTokenConfig,
            gspo_token,
            takes_token_advantages=True,
        ),
        Objective("grpo", "token ratio, token clip", GRPOConfig, grpo),
        Objective("dr_grpo", "GRPO without std and lengths", DrGRPOConfig, grpo, "group_centred"),
        Objective("dapo", "GRPO, wider upper clip, token mean", DAPOConfig, grpo),
        Objective("cispo", "clipped weight without gradient, token mean", CISPOConfig, cispo, clip_cuts_gradient=False),
        Objective("sapo", "token ratio, smooth gate", SAPOConfig, sapo),
        Objective("rloo", "leave-one-out advantages, PPO clip", RLOOConfig, grpo, "leave_one_out"),
        Objective("reinforce_pp", "advantages of the batch, PPO clip", ReinforcePPConfig, grpo, "batch"),
    )
}


def rspo_loss(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    router_shift: Array | None = None,
    config: RSPOConfig = RSPOConfig(),
) -> tuple[Array, dict[str, Array]]:
    """Return the loss of Router-Shift Policy Optimization, −mean_i A_i · exp(mean_t c(d + log γ̃)), and its metrics.

    D. Zhang et al., "Towards Stable and Effective Reinforcement Learning for Mixture-of-Experts",
    https://arxiv.org/abs/2510.23027; `rspo_jax.objectives.rspo` has the formula.

    Args:
      log_probs: float32 [B, T], log π_θ(y_t | x, y_<t) of the policy being trained; the only argument with a gradient,
        unless the config asks for one through γ.
      old_log_probs: float32 [B, T], the same under the policy that gave the route.
      advantages: float32 [B].
      mask: bool [B, T], True on response tokens. What the arrays hold elsewhere, NaN included, has no effect.
      router_shift: float32 [B, T], raw γ in (0, 1] from `rspo_jax.router_shift`, before the floor. None for a dense
        model: γ = 1, and RSPO is GMPO.
      config: the floor, the bounds, and the position of γ̃.

    Returns:
      The scalar loss and a dict of float32 scalars: `clip_fraction` (share of response tokens without gradient), the
      same for responses with positive and negative advantage, `ratio_mean` and `ratio_max` of w, `approx_kl` in nats,
      and with a router shift `gamma_mean`, `gamma_min`, `gamma_p10` and `gamma_floor_fraction` of the raw γ.
      Both loss and gradient are 0 where no response has a token. Computed in float32, or in float64 if `log_probs` are
      float64.

    Raises:
      ValueError: naming the argument whose shape does not fit.
      TypeError: naming the argument whose dtype does not fit, or the config of another objective.
    """
    return OBJECTIVES["rspo"].loss(log_probs, old_log_probs, advantages, mask, router_shift, config)
