"""A tiny study to check the harness within a minute: two objectives, two levels of off-policyness, two seeds."""

from experiments.ablation.grid import choose, vary
from experiments.ablation.study import Study
from experiments.config import CountdownRun
from experiments.reporting.study_figures import CollapseRates, FinalScores, Improvement, LearningCurves, Sensitivity
from experiments.tasks.countdown import CharacterTokenizer, CountdownConfig
from models import TransformerConfig
from rspo_jax.rollouts import SamplerConfig
from rspo_jax.training import CheckpointConfig, EvaluationConfig, OptimizerConfig, TrainerConfig, WarmStartConfig

BASE = CountdownRun(
    task=CountdownConfig(train=200, validation=20, test=20),
    model=TransformerConfig(
        vocab_size=CharacterTokenizer.vocabulary_size,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        num_experts=4,
        expert_size=16,
    ),
    trainer=TrainerConfig(
        steps=4,
        prompts=5,
        group_size=4,
        rollout_chunks=1,
        sampler=SamplerConfig(max_new_tokens=12),
        warm_start=WarmStartConfig(
            steps=4, batch_size=8, optimizer=OptimizerConfig(learning_rate=6e-3, warmup_updates=2)
        ),
        evaluation=EvaluationConfig(every=2, problems=20),
        checkpoint=CheckpointConfig(every=2, keep=1),
    ),
)

STUDY = Study(
    name="countdown_smoke",
    base=BASE,
    grid=choose("method", {name: {"objective.objective": name} for name in ("gmpo", "rspo")})
    * vary("updates", "trainer.mini_batches", 2, 4),
    seeds=(0, 1),
    figures=(
        LearningCurves("reward", panels="updates", metric="reward"),
        FinalScores("scores", panels="updates"),
        CollapseRates("collapses", panels="updates"),
        Improvement("improvement", panels="updates", pairs=(("rspo", "gmpo"),)),
        Sensitivity("sensitivity", factor="updates", lines="method"),
    ),
    labels={"gmpo": "GMPO", "rspo": "RSPO", "updates": "updates a rollout"},
)
