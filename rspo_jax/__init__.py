"""Router-Shift Policy Optimization for Mixture-of-Experts language models, in JAX.

The names here are functions of arrays and their configurations; importing them costs little more than importing JAX.
Trainer, sampler and records are packages of their own: `rspo_jax.training`, `rspo_jax.rollouts`, `rspo_jax.records`.
"""

from rspo_jax.log_probs import TokenScores, head_log_probs, token_entropy, token_log_probs
from rspo_jax.objectives import (
    ADVANTAGES,
    OBJECTIVES,
    CISPOConfig,
    CorrectionConfig,
    DAPOConfig,
    DrGRPOConfig,
    GMPOConfig,
    GRPOConfig,
    GSPOConfig,
    GSPOTokenConfig,
    Objective,
    RegularizerConfig,
    ReinforcePPConfig,
    RLOOConfig,
    RouterShiftOptions,
    RSPOConfig,
    SAPOConfig,
    correct,
    entropy_penalty,
    group_advantages,
    kl_penalty,
    overlong_penalty,
    rspo_loss,
    token_penalty,
    weighted_gradient,
)
from rspo_jax.routing import router_shift, trace_router
from rspo_jax.types import ModelOutput, RolloutBatch, RouterTrace

__version__ = "0.1.0"

__all__ = [
    "ADVANTAGES",
    "OBJECTIVES",
    "CISPOConfig",
    "CorrectionConfig",
    "DAPOConfig",
    "DrGRPOConfig",
    "GMPOConfig",
    "GRPOConfig",
    "GSPOConfig",
    "GSPOTokenConfig",
    "ModelOutput",
    "Objective",
    "RLOOConfig",
    "RSPOConfig",
    "RegularizerConfig",
    "ReinforcePPConfig",
    "RolloutBatch",
    "RouterShiftOptions",
    "RouterTrace",
    "SAPOConfig",
    "TokenScores",
    "correct",
    "entropy_penalty",
    "group_advantages",
    "head_log_probs",
    "kl_penalty",
    "overlong_penalty",
    "router_shift",
    "rspo_loss",
    "token_entropy",
    "token_log_probs",
    "token_penalty",
    "trace_router",
    "weighted_gradient",
]
