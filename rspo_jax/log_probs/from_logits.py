"""Token log-probabilities and entropies from logits.

Pure functions of arrays, always computed in at least float32. This file must never know where logits come from.
"""

import jax
import jax.numpy as jnp

from rspo_jax.statistics import at_least_float32
from rspo_jax.types import Array


def token_log_probs(logits: Array, targets: Array, temperature: float = 1.0) -> Array:
    """Log-probability of each target under softmax(logits / temperature).

    Args:
      logits: float [B, T, V].
      targets: int [B, T] in [0, V); `logits[b, t]` scores `targets[b, t]`.
      temperature: positive; the one that the responses were sampled with.

    Returns:
      float32 [B, T].

    Raises:
      ValueError: on shapes that do not fit, or a temperature that is not positive.
    """
    log_probs = _log_softmax(logits, temperature)
    check_targets(targets, "logits", logits)
    return jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]


def token_entropy(logits: Array, temperature: float = 1.0) -> Array:
    """Entropy, in nats, of softmax(logits / temperature).

    Args:
      logits: float [..., V]; entries of -inf are impossible tokens.
      temperature: positive.

    Returns:
      float32 [...].

    Raises:
      ValueError: on a temperature that is not positive.
    """
    log_probs = _log_softmax(logits, temperature)
    probs = jnp.exp(log_probs)
    return -jnp.sum(probs * jnp.where(probs > 0, log_probs, 0), axis=-1)


def _log_softmax(logits: Array, temperature: float) -> Array:
    check_temperature(temperature)
    return jax.nn.log_softmax(at_least_float32(logits) / temperature, axis=-1)


def check_targets(targets: Array, name: str, scorer: Array) -> None:
    """Refuses targets that `scorer`, the argument `name` of shape [B, T, ...], does not score.

    Raises:
      ValueError: on another shape.
      TypeError: on targets that are not integers.
    """
    if targets.shape != scorer.shape[:-1]:
        raise ValueError(
            f"targets have shape {targets.shape}, but {name} of shape {scorer.shape} can only score targets of shape "
            f"{scorer.shape[:-1]}: shift one against the other (inputs tokens[:, :-1], targets tokens[:, 1:])"
        )
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(f"targets are {targets.dtype}; give integer token ids")


def check_temperature(temperature: float) -> None:
    """Refuses a temperature that makes no distribution.

    Raises:
      ValueError: unless it is positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}; a greedy policy has no log-probabilities")
