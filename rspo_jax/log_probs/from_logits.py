"""Token log-probabilities and entropies from logits, always computed in at least float32."""

import jax
import jax.numpy as jnp

from rspo_jax.statistics import at_least_float32
from rspo_jax.types import Array


def token_log_probs(logits: Array, targets: Array, temperature: float = 1.0) -> Array:
    """Return the log-probability of each target under softmax(logits / temperature).

    Args:
      logits: float [B, T, V].
      targets: int [B, T] in [0, V); `logits[b, t]` scores `targets[b, t]`.
      temperature: the temperature that the responses were sampled with; positive.

    Returns:
      float32 [B, T].

    Raises:
      ValueError: on shapes that do not fit, or a temperature that is not positive.
      TypeError: on targets that are not integers.
    """
    log_probs = _log_softmax(logits, temperature)
    check_targets(targets, "logits", logits)
    return jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]


def token_entropy(logits: Array, temperature: float = 1.0) -> Array:
    """Return the entropy −Σ p log p, in nats, of p = softmax(logits / temperature).

    Args:
      logits: float [..., V]; an entry of −inf is an impossible token.
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
    """Refuse targets that an array does not score.

    Args:
      targets: int [B, T].
      name: the array's name, for the message.
      scorer: the array, [B, T, ...].

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
    """Refuse a temperature that makes no distribution.

    Raises:
      ValueError: unless it is positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}; a greedy policy has no log-probabilities")
