"""Router-Shift Policy Optimization for Mixture-of-Experts language models, in JAX.

The names here are functions of arrays and cost one import of JAX. The trainer and its parts are modules of their own:
`rspo_jax.sampler`, `.rollout`, `.train_step`, `.checkpoint`, `.metrics`, `.trainer`.
"""

from rspo_jax.advantages import group_advantages
from rspo_jax.head_log_probs import TokenScores, head_log_probs
from rspo_jax.log_probs import token_entropy, token_log_probs
from rspo_jax.objectives import (
    OBJECTIVES,
    GMPOConfig,
    GRPOConfig,
    GRPORSConfig,
    GSPOConfig,
    GSPORSConfig,
    Objective,
    RSPOConfig,
    rspo_loss,
)
from rspo_jax.router import router_shift, trace_router
from rspo_jax.types import ModelOutput, RolloutBatch, RouterTrace

__version__ = "0.1.0"

__all__ = [
    "OBJECTIVES",
    "GMPOConfig",
    "GRPOConfig",
    "GRPORSConfig",
    "GSPOConfig",
    "GSPORSConfig",
    "ModelOutput",
    "Objective",
    "RSPOConfig",
    "RolloutBatch",
    "RouterTrace",
    "TokenScores",
    "group_advantages",
    "head_log_probs",
    "router_shift",
    "rspo_loss",
    "token_entropy",
    "token_log_probs",
    "trace_router",
]
