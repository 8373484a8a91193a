"""The policy objectives: RSPO, and the ones that it is measured against. `OBJECTIVES` is the one table of them.

J of a formula (`rspo_jax.objectives.formulas`) is maximised and the loss is −J. A router shift is an option of every
objective's config (`RouterShiftOptions`), except that GMPO with one is RSPO. What is added to the loss of each token,
such as a KL penalty, goes in as `penalty`; a correction for the sampler's numerics goes in through `log_probs`
(`corrections`). Everything here is a pure function of arrays: this file must never know a model, a batch
object or a trainer.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rspo_jax.objectives import formulas
from rspo_jax.objectives.configs import (
    CISPOConfig,
    DAPOConfig,
    DrGRPOConfig,
    GMPOConfig,
    GRPOConfig,
    GSPOConfig,
    GSPOTokenConfig,
    ReinforcePPConfig,
    RLOOConfig,
    RSPOConfig,
    SAPOConfig,
)
from rspo_jax.objectives.formulas import Responses
from rspo_jax.statistics import Maximum, Mean, Minimum, Quantile, Statistic, at_least_float32, masked_mean, reduce
from rspo_jax.types import Array


class Objective(NamedTuple):
    """One row of the table. `loss` and `terms` take the same arguments for every objective; see `loss`."""

    name: str
    summary: str
    config_type: type
    formula: Callable[[Responses, Any], tuple[Mean, Array]]
    advantages: str = "group"
    """The estimator that its source uses, a key of `rspo_jax.objectives.advantages.ADVANTAGES`."""
    takes_token_advantages: bool = False
    """Whether advantages may be [B, T]."""

    def uses_router_shift(self, config: Any = None) -> bool:
        """Whether γ changes the loss under a config, the default one when absent; where it does not, it is still
        reported."""
        return formulas.shifts(self._checked_config(config))

    def weight(self, mask: Array, config: Any = None) -> Array:
        """What `terms` will divide by, a float32 scalar: the number of responses that have tokens, or of tokens.

        Args:
          mask: bool [..., B, T]; leading axes, of micro-batches say, are counted together.
          config: as for `loss`.
        """
        counted = mask if self._checked_config(config).aggregation == "token_mean" else jnp.any(mask, axis=-1)
        return jnp.sum(counted, dtype=jnp.float32)

    def loss(
        self,
        log_probs: Array,
        old_log_probs: Array,
        advantages: Array,
        mask: Array,
        router_shift: Array | None = None,
        config: Any = None,
        entropy: Array | None = None,
        penalty: Array | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """The scalar loss −J, plus the mean penalty, and a dict of scalar metrics.

        Args:
          log_probs: float32 [B, T], log π_θ(y_t | x, y_<t) of the policy being trained.
          old_log_probs: float32 [B, T], the same under the policy that gave the route.
          advantages: float32 [B]; also [B, T] for an objective that takes those of tokens.
          mask: bool [B, T], True on response tokens. What the arrays hold elsewhere, NaN included, has no effect.
          router_shift: float32 [B, T], raw γ in (0, 1] from `rspo_jax.router_shift`, before the floor; γ = 1 when
            absent. It has a gradient only if the config asks for one.
          config: of the objective's own type; its defaults when absent.
          entropy: float32 [B, T], only reported.
          penalty: float32 [B, T], added to the loss of each token and averaged as the objective averages its tokens;
            over responses of the mean over tokens for an objective of whole responses. It has a gradient.

        Returns:
          The loss and a dict of float32 scalars: `clip_fraction` (share of response tokens that the clip cuts: they
          have no gradient, except in CISPO, which clips their weight), the same for positive and negative advantages,
          `ratio_mean` and `ratio_max` of w, `approx_kl` in nats, and with a router shift `gamma_mean`, `gamma_min`,
          `gamma_p10` and, under a floor, `gamma_floor_fraction` of the raw γ. Both loss and gradient are 0 where no
          response has a token. Computed in float32, or float64 where given it.

        Raises:
          ValueError: naming the argument whose shape does not fit.
          TypeError: naming the argument whose dtype does not fit, or the config of another objective.
        """
        config = self._checked_config(config)
        arrays = (log_probs, old_log_probs, advantages, mask, router_shift, entropy, penalty)
        return _reduced_terms(self, config, *arrays)

    def terms(
        self,
        log_probs: Array,
        old_log_probs: Array,
        advantages: Array,
        mask: Array,
        router_shift: Array | None = None,
        config: Any = None,
        entropy: Array | None = None,
        penalty: Array | None = None,
    ) -> tuple[Mean, dict[str, Statistic]]:
        """The loss before its division, and the metrics before theirs.

        For micro-batches: add up totals and weights, and divide once. The weight depends on mask and config alone.
        """
        config = self._checked_config(config)
        per_token = {
            "old_log_probs": old_log_probs,
            "router_shift": router_shift,
            "entropy": entropy,
            "penalty": penalty,
        }
        check_arguments(log_probs, advantages, mask, per_token, self.takes_token_advantages)
        log_probs = at_least_float32(log_probs)
        dtype = log_probs.dtype
        gamma = None if router_shift is None else jnp.where(mask, router_shift.astype(dtype), 1)
        batch = formulas.clean(log_probs, old_log_probs.astype(dtype), advantages.astype(dtype), mask, gamma, config)
        mean, kept = self.formula(batch, config)
        loss = Mean(-mean.total, mean.weight)
        if penalty is not None:
            added = batch.aggregate(jnp.ones_like(batch.lengths), penalty.astype(dtype), config)
            loss = Mean(loss.total + added.total, loss.weight)
        log_ratio = jnp.where(mask, log_probs - old_log_probs.astype(dtype), 0)
        statistics = _ratio_statistics(batch, log_ratio, kept)
        if gamma is not None:
            statistics |= _gamma_statistics(jax.lax.stop_gradient(gamma), mask, getattr(config, "gamma_min", None))
        if entropy is not None:
            statistics["entropy"] = masked_mean(jax.lax.stop_gradient(entropy.astype(dtype)), mask)
        return loss, statistics

    def _checked_config(self, config: Any) -> Any:
        config = self.config_type() if config is None else config
        if type(config) is not self.config_type:
            raise TypeError(f"{self.name} takes a {self.config_type.__name__}, got a {type(config).__name__}")
        return config


@functools.partial(jax.jit, static_argnames=("objective", "config"))
def _reduced_terms(
    objective: Objective,
    config: Any,
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    router_shift: Array | None,
    entropy: Array | None,
    penalty: Array | None,
) -> tuple[Array, dict[str, Array]]:
    loss, statistics = objective.terms(
        log_probs, old_log_probs, advantages, mask, router_shift, config, entropy, penalty
    )
    return loss.reduce(), reduce(statistics)


def check_arguments(
    log_probs: Array,
    advantages: Array,
    mask: Array,
    per_token: dict[str, Array | None],
    takes_token_advantages: bool = False,
) -> None:
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
        Objective("rspo", "geometric-mean ratio, token clip, router shift", RSPOConfig, formulas.rspo),
        Objective("gmpo", "geometric-mean ratio, token clip", GMPOConfig, formulas.gmpo),
        Objective("gspo", "sequence ratio, sequence clip", GSPOConfig, formulas.gspo),
        Objective(
            "gspo_token",
            "GSPO's ratio and clip, advantages of tokens",
            GSPOTokenConfig,
            formulas.gspo_token,
            takes_token_advantages=True,
        ),
        Objective("grpo", "token ratio, token clip", GRPOConfig, formulas.grpo),
        Objective("dr_grpo", "GRPO without std and lengths", DrGRPOConfig, formulas.grpo, "group_centred"),
        Objective("dapo", "GRPO, wider upper clip, token mean", DAPOConfig, formulas.grpo),
        Objective("cispo", "clipped weight without gradient, token mean", CISPOConfig, formulas.cispo),
        Objective("sapo", "token ratio, smooth gate", SAPOConfig, formulas.sapo),
        Objective("rloo", "leave-one-out advantages, PPO clip", RLOOConfig, formulas.grpo, "leave_one_out"),
        Objective("reinforce_pp", "advantages of the batch, PPO clip", ReinforcePPConfig, formulas.grpo, "batch"),
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
