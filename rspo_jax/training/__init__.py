"""The training loop and its parts.

The loop itself, `rspo_jax.training.trainer`, and `rspo_jax.training.restore` are imported by their paths: they bring
Orbax along, which takes seconds to import and which configs and losses do not need.
"""

from rspo_jax.extras import naming_the_extra

with naming_the_extra("rspo_jax.training"):
    from rspo_jax.training.config import (
        CheckpointConfig,
        EvaluationConfig,
        LearnerConfig,
        OptimizerConfig,
        SamplesConfig,
        TrainerConfig,
        WarmStartConfig,
        check_learner,
        check_mesh,
    )
    from rspo_jax.training.loss import score_rows
    from rspo_jax.training.stages import (
        Setup,
        draw,
        judge_drawing,
        pack_mini_batches,
        score_mini_batches,
        with_advantages,
    )
    from rspo_jax.training.state import (
        RunState,
        TrainState,
        fresh_state,
        init_train_state,
        sampling_params,
        state_on_mesh,
        train_state_shardings,
    )
    from rspo_jax.training.update import score, update

__all__ = [
    "CheckpointConfig",
    "EvaluationConfig",
    "LearnerConfig",
    "OptimizerConfig",
    "RunState",
    "SamplesConfig",
    "Setup",
    "TrainState",
    "TrainerConfig",
    "WarmStartConfig",
    "check_learner",
    "check_mesh",
    "draw",
    "fresh_state",
    "init_train_state",
    "judge_drawing",
    "pack_mini_batches",
    "sampling_params",
    "score",
    "score_mini_batches",
    "score_rows",
    "state_on_mesh",
    "train_state_shardings",
    "update",
    "with_advantages",
]
