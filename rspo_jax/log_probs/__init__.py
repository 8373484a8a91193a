"""Log-probabilities and entropies of tokens, from logits or straight from hidden states."""

from rspo_jax.log_probs.from_hidden import TokenScores, head_log_probs
from rspo_jax.log_probs.from_logits import token_entropy, token_log_probs

__all__ = [
    "TokenScores",
    "head_log_probs",
    "token_entropy",
    "token_log_probs",
]
