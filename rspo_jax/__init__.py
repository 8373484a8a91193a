"""Router-Shift Policy Optimization for Mixture-of-Experts language models, in JAX.

The names here are functions of arrays and cost one import of JAX. The trainer and its parts are modules of their own:
`rspo_jax.sampler`, `.rollout`, `.train_step`, `.checkpoint`, `.metrics`, `.trainer`.
"""

from rspo_jax.advantages import ADVANTAGES, group_advantages, overlong_penalty
from rspo_jax.corrections import CorrectionConfig, correct, weighted_gradient
from rspo_jax.head_log_probs import TokenScores, head_log_probs
from rspo_jax.log_probs import token_entropy, token_log_probs
from rspo_jax.objective_configs import (
    CISPOConfig,
    DAPOConfig,
    DrGRPOConfig,
    GMPOConfig,
    GRPOConfig,
    GSPOConfig,
    GSPOTokenConfig,
    ReinforcePPConfig,
    RLOOConfig,
    RouterShiftOptions,
    RSPOConfig,
    SAPOConfig,
)
from rspo_jax.objectives import OBJECTIVES, Objective, rspo_loss
from rspo_jax.regularizers import RegularizerConfig, entropy_penalty, kl_penalty, token_penalty
from rspo_jax.router import router_shift, trace_router
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
