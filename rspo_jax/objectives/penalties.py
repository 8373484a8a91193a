"""Penalties on each token: a KL penalty towards a reference policy, and an entropy bonus.

The divergence is estimated from the log-probabilities of the sampled tokens alone. The samples do not follow the policy
when it moves, so the estimators differ as losses by their gradients; `kl_penalty` states the expected gradient of each,
which holds while the policy is the one that drew the samples. An objective takes the sum of the penalties as its
`penalty`. The config also holds the coefficients of the router losses, which `rspo_jax.routing.balance` computes.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from rspo_jax.objectives.exponents import bounded_k3
from rspo_jax.statistics import Statistic, at_least_float32, masked_mean
from rspo_jax.types import Array, check_choice

KLEstimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True)
class RegularizerConfig:
    """Coefficients of what is added to the loss; all 0, that is off, by default."""

    kl_coefficient: float = 0.0
    """Coefficient of the KL penalty towards the reference; 0.001 is usual where there is one."""
    kl_estimator: KLEstimator = "k3"
    """Estimator of the KL penalty; `kl_penalty` compares their gradients."""
    entropy_coefficient: float = 0.0
    """Coefficient of the entropy bonus."""
    load_balance_coefficient: float = 0.0
    """Coefficient of the routers' load-balance loss; 0.01 in Switch Transformer."""
    router_z_coefficient: float = 0.0
    """Coefficient of the z-loss of softmax routers; 0.001 in ST-MoE."""

    def __post_init__(self) -> None:
        coefficients = {
            "kl_coefficient": self.kl_coefficient,
            "entropy_coefficient": self.entropy_coefficient,
            "load_balance_coefficient": self.load_balance_coefficient,
            "router_z_coefficient": self.router_z_coefficient,
        }
        for name, coefficient in coefficients.items():
            if not coefficient >= 0:
                raise ValueError(f"{name} must be 0 or more, got {coefficient}")
        check_choice("kl_estimator", self.kl_estimator, KLEstimator)

    @property
    def needs_reference(self) -> bool:
        """True if reference log-probabilities are needed."""
        return self.kl_coefficient > 0

    @property
    def needs_routers(self) -> bool:
        """True if there is a loss on the routers."""
        return self.load_balance_coefficient > 0 or self.router_z_coefficient > 0


def kl_penalty(log_probs: Array, reference_log_probs: Array, mask: Array, estimator: KLEstimator = "k3") -> Array:
    """Return an estimate of KL(π ‖ π_ref) for each token, from the sampled token alone.

    J. Schulman, "Approximating KL Divergence", 2020, http://joschu.net/blog/kl-approx.html. k3 is also Eq. 4 of
    DeepSeekMath (https://arxiv.org/abs/2402.03300). With x = log π_ref − log π and r = e^x:

    | estimator | value   | expected value       | gradient        | expected gradient                       |
    |-----------|---------|----------------------|-----------------|-----------------------------------------|
    | k1        | −x      | KL(π ‖ π_ref)        | ∇log π          | 0: as a loss it pulls towards nothing   |
    | k2        | x²/2    | close to it          | −x·∇log π       | that of KL(π ‖ π_ref)                   |
    | k3        | r − x − 1 | KL(π ‖ π_ref), ≥ 0 | (1 − r)·∇log π  | that of the other one, KL(π_ref ‖ π)    |

    As a loss, k1 is pure noise; it is here to measure with. From x = 20 on r grows along a straight line
    (`rspo_jax.objectives.exponents`), so that a token far from the reference is pulled back, and not skipped for good.

    Args:
      log_probs: float [B, T], log π of the policy being trained; carries the gradient.
      reference_log_probs: float [B, T], log π_ref of the reference; carries none.
      mask: bool [B, T], True on response tokens.
      estimator: one of the table's.

    Returns:
      float32 [B, T], 0 where the mask is False.

    Raises:
      ValueError: if the shapes differ or the estimator is unknown.
    """
    check_choice("kl_estimator", estimator, KLEstimator)
    _check_shapes("log_probs", log_probs, mask=mask, reference_log_probs=reference_log_probs)
    log_probs = at_least_float32(log_probs)
    reference = jax.lax.stop_gradient(reference_log_probs.astype(log_probs.dtype))
    x = jnp.where(mask, reference - log_probs, 0)
    if estimator == "k1":
        return -x
    if estimator == "k2":
        return x**2 / 2
    return bounded_k3(x)


def entropy_penalty(entropy: Array, mask: Array) -> Array:
    """Return −H of each token's distribution, which lowers the loss as the entropy H rises.

    This is the entropy bonus of PPO's Eq. 9 (https://arxiv.org/abs/1707.06347).

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
    """Return the `penalty` of an objective, the sum of the KL penalty and the entropy bonus, and its metrics.

    Args:
      config: the coefficients and the estimator.
      log_probs: float [B, T], log π of the policy being trained.
      entropy: float [B, T], its entropy in nats; must carry a gradient if there is an entropy bonus.
      mask: bool [B, T], True on response tokens.
      reference_log_probs: float [B, T], log π_ref; needed for the KL penalty only.

    Returns:
      float32 [B, T], or None if the config adds nothing; and, with a KL penalty, the metric `reference_kl`, the mean
      estimate in nats a token.

    Raises:
      ValueError: if the config needs reference log-probabilities and there are none, or if shapes differ.
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


def _check_shapes(name: str, expected: Array, **arrays: Array) -> None:
    for other, array in arrays.items():
        if array.shape != expected.shape:
            raise ValueError(f"{other} must have the shape of {name}, {expected.shape}; got {array.shape}")
