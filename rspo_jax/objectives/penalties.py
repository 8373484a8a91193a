"""What is added to the loss of each token: a KL penalty towards a reference policy, and an entropy bonus.

The divergence is estimated from the log-probabilities of the sampled tokens alone. Samples do not follow the policy
when it moves, so as losses the estimators are judged by their gradients: what these are in expectation is said for
each, and holds while the policy is the one that drew the samples. An objective takes the sum as its `penalty`. The
config also says how much is added of the losses of the routers (`rspo_jax.routing.balance`). Pure functions of arrays;
this file must never know a model or an objective.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from rspo_jax.statistics import Statistic, at_least_float32, masked_mean
from rspo_jax.types import Array

KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclass(frozen=True)
class RegularizerConfig:
    """How much is added to the loss of what; all off by default."""

    kl_coefficient: float = 0.0
    """Of the KL penalty towards the reference; 0.001 is usual where there is one."""
    kl_estimator: str = "k3"
    """k1, k2 or k3; see `kl_penalty` for what their gradients are."""
    entropy_coefficient: float = 0.0
    """Of the entropy bonus."""
    load_balance_coefficient: float = 0.0
    """Of the load-balance loss of the routers; 0.01 is Switch's."""
    router_z_coefficient: float = 0.0
    """Of the z-loss of the routers, which must be softmax routers; 0.001 is ST-MoE's."""

    def __post_init__(self) -> None:
        for name in (
            "kl_coefficient",
            "entropy_coefficient",
            "load_balance_coefficient",
            "router_z_coefficient",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        _check_estimator(self.kl_estimator)

    @property
    def needs_reference(self) -> bool:
        """Whether reference log-probabilities have to be computed."""
        return self.kl_coefficient > 0

    @property
    def needs_routers(self) -> bool:
        """Whether there is a loss of the routers."""
        return self.load_balance_coefficient > 0 or self.router_z_coefficient > 0


def kl_penalty(log_probs: Array, reference_log_probs: Array, mask: Array, estimator: str = "k3") -> Array:
    """An estimate of KL(π ‖ π_ref) per token from the sampled token alone; x = log π_ref − log π, r = e^x.

    | estimator | value   | expected value       | gradient        | expected gradient                       |
    |-----------|---------|----------------------|-----------------|-----------------------------------------|
    | k1        | −x      | KL(π ‖ π_ref)        | ∇log π          | 0: as a loss it pulls towards nothing   |
    | k2        | x²/2    | close to it          | −x·∇log π       | that of KL(π ‖ π_ref)                   |
    | k3        | r − x − 1 | KL(π ‖ π_ref), ≥ 0 | (1 − r)·∇log π  | that of the other one, KL(π_ref ‖ π)    |

    k1's gradient as a loss is wrong in expectation: it is noise. It is here to be measured with.

    Args:
      log_probs: float [B, T] of the policy being trained; carries the gradient.
      reference_log_probs: float [B, T] of the reference; never does.
      mask: bool [B, T], True on response tokens.
      estimator: "k1", "k2" or "k3" (J. Schulman, "Approximating KL divergence").

    Returns:
      float32 [B, T], 0 where the mask is False.

    Raises:
      ValueError: if the shapes differ or the estimator is unknown.
    """
    _check_estimator(estimator)
    _check_shapes("log_probs", log_probs, mask=mask, reference_log_probs=reference_log_probs)
    log_probs = at_least_float32(log_probs)
    reference = jax.lax.stop_gradient(reference_log_probs.astype(log_probs.dtype))
    x = jnp.where(mask, reference - log_probs, 0)
    if estimator == "k1":
        return -x
    return x**2 / 2 if estimator == "k2" else jnp.expm1(x) - x


def entropy_penalty(entropy: Array, mask: Array) -> Array:
    """−H of each token's distribution: what lowers the loss as entropy rises.

    Args:
      entropy: float [B, T] in nats, of the policy being trained; carries the gradient.
      mask: bool [B, T], True on response tokens.

    Returns:
      float32 [B, T], 0 where the mask is False.

    Raises:
      ValueError: if the shapes differ.
    """
    _check_shapes("entropy", entropy, mask=mask)
    return jnp.where(mask, -at_least_float32(entropy), 0)


def token_penalty(
    config: RegularizerConfig,
    log_probs: Array,
    entropy: Array,
    mask: Array,
    reference_log_probs: Array | None = None,
) -> tuple[Array | None, dict[str, Statistic]]:
    """The sum that an objective takes as `penalty`, and what it is made of.

    Args:
      config: what to add.
      log_probs: float [B, T] of the policy being trained.
      entropy: float [B, T] in nats, of the same; with a gradient, if there is an entropy bonus.
      mask: bool [B, T], True on response tokens.
      reference_log_probs: float [B, T]; needed for the KL penalty only.

    Returns:
      float32 [B, T], or None where the config adds nothing; and `reference_kl`, the estimate in nats a token, where
      there is a KL penalty.

    Raises:
      ValueError: if the config needs reference log-probabilities and there are none, or shapes differ.
    """
    penalty, statistics = None, {}
    if config.needs_reference:
        if reference_log_probs is None:
            raise ValueError("a KL penalty needs reference_log_probs: score the rollout with the reference policy")
        divergence = kl_penalty(log_probs, reference_log_probs, mask, config.kl_estimator)
        statistics["reference_kl"] = masked_mean(jax.lax.stop_gradient(divergence), mask)
        penalty = config.kl_coefficient * divergence
    if config.entropy_coefficient > 0:
        bonus = config.entropy_coefficient * entropy_penalty(entropy, mask)
        penalty = bonus if penalty is None else penalty + bonus
    return penalty, statistics


def _check_estimator(estimator: str) -> None:
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator must be one of {KL_ESTIMATORS}, got {estimator!r}")


def _check_shapes(name: str, expected: Array, **arrays: Array) -> None:
    for other, array in arrays.items():
        if array.shape != expected.shape:
            raise ValueError(f"{other} must have the shape of {name}, {expected.shape}; got {array.shape}")
