"""Policy objectives, one idea a file, with their advantages, corrections and penalties.

Everything here is a pure function of arrays: no model, no batch object, no trainer's config.
"""

from rspo_jax.objectives.advantages import ADVANTAGES, group_advantages, overlong_penalty
from rspo_jax.objectives.cispo import CISPOConfig
from rspo_jax.objectives.corrections import CorrectionConfig, correct, weighted_gradient
from rspo_jax.objectives.grpo import DAPOConfig, DrGRPOConfig, GRPOConfig, ReinforcePPConfig, RLOOConfig
from rspo_jax.objectives.gspo import GSPOConfig, GSPOTokenConfig
from rspo_jax.objectives.penalties import RegularizerConfig, entropy_penalty, kl_penalty, token_penalty
from rspo_jax.objectives.responses import AGGREGATIONS, Aggregation, GammaUse, ObjectiveConfig, RouterShiftOptions
from rspo_jax.objectives.rspo import GMPOConfig, Position, RSPOConfig
from rspo_jax.objectives.sapo import SAPOConfig
from rspo_jax.objectives.table import OBJECTIVES, Objective, rspo_loss

__all__ = [
    "ADVANTAGES",
    "AGGREGATIONS",
    "OBJECTIVES",
    "Aggregation",
    "CISPOConfig",
    "CorrectionConfig",
    "DAPOConfig",
    "DrGRPOConfig",
    "GMPOConfig",
    "GRPOConfig",
    "GSPOConfig",
    "GSPOTokenConfig",
    "GammaUse",
    "Objective",
    "ObjectiveConfig",
    "Position",
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
