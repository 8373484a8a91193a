"""Policy objectives, one idea a file, and what surrounds them: advantages, corrections and penalties."""

from rspo_jax.objectives.advantages import ADVANTAGES, group_advantages, overlong_penalty
from rspo_jax.objectives.configs import (
    AGGREGATIONS,
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
from rspo_jax.objectives.corrections import CorrectionConfig, correct, weighted_gradient
from rspo_jax.objectives.penalties import RegularizerConfig, entropy_penalty, kl_penalty, token_penalty
from rspo_jax.objectives.table import OBJECTIVES, Objective, rspo_loss

__all__ = [
    "ADVANTAGES",
    "AGGREGATIONS",
    "OBJECTIVES",
    "CISPOConfig",
    "CorrectionConfig",
    "DAPOConfig",
    "DrGRPOConfig",
    "GMPOConfig",
    "GRPOConfig",
    "GSPOConfig",
    "GSPOTokenConfig",
    "Objective",
    "RLOOConfig",
    "RSPOConfig",
    "RegularizerConfig",
    "ReinforcePPConfig",
    "RouterShiftOptions",
    "SAPOConfig",
    "correct",
    "entropy_penalty",
    "group_advantages",
    "kl_penalty",
    "overlong_penalty",
    "rspo_loss",
    "token_penalty",
    "weighted_gradient",
]
