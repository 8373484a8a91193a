"""What a training run is told: frozen dataclasses, each checked when it is made. It must never know how a run goes."""

import dataclasses
import math
from dataclasses import dataclass, field

from jax.sharding import Mesh

from rspo_jax.advantages import ADVANTAGES
from rspo_jax.objectives import OBJECTIVES
from rspo_jax.sampler import SamplerConfig
from rspo_jax.sharding import RULES, MeshConfig
from rspo_jax.train_step import LearnerConfig, OptimizerConfig


@dataclass(frozen=True)
class WarmStartConfig:
    """Supervised learning on worked solutions before reinforcement learning: the stand-in for a pre-trained base."""

    steps: int = 300
    """0 leaves it out."""
    batch_size: int = 256
    """Solutions a step."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-3, warmup_updates=20)
    """Decays over the whole phase unless it says otherwise."""

    @property
    def decaying_optimizer(self) -> OptimizerConfig:
        """The optimizer with its decay spelled out."""
        return _decaying_over(self.optimizer, self.steps)

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch_size < 1:
            raise ValueError(
                f"a warm start needs 0 or more steps of 1 or more solutions, got {self.steps}, {self.batch_size}"
            )


def _decaying_over(optimizer: OptimizerConfig, updates: int) -> OptimizerConfig:
    if optimizer.decay_updates is not None or updates <= optimizer.warmup_updates:
        return optimizer
    return dataclasses.replace(optimizer, decay_updates=updates)


@dataclass(frozen=True)
class EvaluationConfig:
    """Solve rates on held-out problems, greedy and sampled at temperature 1."""

    every: int = 25
    """Steps of reinforcement learning between evaluations on the validation split."""
    problems: int = 500
    """Validation problems of each; the first and the final evaluation use the whole test split."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.problems < 1:
            raise ValueError(f"evaluation needs every ≥ 1 and problems ≥ 1, got {self.every} and {self.problems}")


@dataclass(frozen=True)
class CheckpointConfig:
    """How often the run state is saved."""

    every: int = 25
    """Steps, of either phase; the end of each phase is always saved."""
    keep: int = 3

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"checkpoints need every ≥ 1 and keep ≥ 1, got {self.every} and {self.keep}")


@dataclass(frozen=True)
class TrainerConfig:
    """The run, apart from model, task and objective."""

    steps: int = 150
    """Rollouts to learn from."""
    prompts: int = 64
    """Prompts of a rollout."""
    group_size: int = 8
    """Responses to each prompt."""
    mini_batches: int = 4
    """Updates that a rollout is cut into: all but the first are off-policy."""
    epochs: int = 1
    """Passes over a rollout, each over the same mini-batches in an order of its own."""
    rollout_chunks: int = 2
    """Parts of a rollout: the host judges one while the device draws the next."""
    learned_groups: int | None = None
    """Groups of a rollout that are scored and learned from, all when absent. Groups whose rewards differ come first;
    the others have no gradient, and leaving them out saves their time."""
    dynamic_sampling: bool = False
    """Leave groups out of the loss whose rewards are all equal, and draw further rollouts, `max_rollouts` a step at
    most, until enough groups differ (DAPO, arXiv 2503.14476)."""
    max_rollouts: int = 4
    advantages: str | None = None
    """How rewards become advantages (`rspo_jax.advantages.ADVANTAGES`); as the objective's source does when absent."""
    overlong_buffer: int = 0
    """Tokens before `sampler.max_new_tokens` over which a penalty for length grows from 0 to 1 (DAPO); 0: none."""
    max_prompt_tokens: int | None = None
    """Problems with longer prompts are left out, of training and of evaluations, and counted; none when absent."""
    seed: int = 0
    sampler: SamplerConfig = SamplerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    decay_learning_rate: bool = False
    """Let the learning rate fall to 0 (cosine) over all steps, unless the optimizer says over how many updates."""
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    probe_every: int = 0
    """Steps between probes of all objectives' gradients (`rspo_jax.gradient_probe`); 0: none. A probe costs several
    steps, and changes nothing of the training."""
    mesh: MeshConfig = MeshConfig()
    """How the devices are arranged. Unless it says otherwise, all split rows, parameters and optimizer (fsdp)."""

    def __post_init__(self) -> None:
        for name in ("prompts", "group_size", "mini_batches", "epochs", "rollout_chunks", "max_rollouts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("steps", "probe_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.advantages is not None and self.advantages not in ADVANTAGES:
            raise ValueError(f"unknown advantages {self.advantages!r}; choose one of {', '.join(ADVANTAGES)}")
        if not 0 <= self.overlong_buffer <= self.sampler.max_new_tokens:
            raise ValueError(
                f"overlong_buffer must lie between 0 and sampler.max_new_tokens, {self.sampler.max_new_tokens}; got "
                f"{self.overlong_buffer}"
            )
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ValueError(
                f"max_prompt_tokens must be at least 1, got {self.max_prompt_tokens}; leave it out to use all problems"
            )
        if self.learned_groups is not None and not 1 <= self.learned_groups <= self.prompts:
            raise ValueError(
                f"learned_groups must lie between 1 and prompts, {self.prompts}; got {self.learned_groups}"
            )
        if self.learned_rows % self.mini_batches:
            raise ValueError(
                f"{self.learned_rows} responses to learn from do not divide into {self.mini_batches} mini_batches"
            )
        rows = self.prompts * self.group_size
        if rows % self.rollout_chunks:
            raise ValueError(f"a rollout of {rows} responses does not divide into {self.rollout_chunks} rollout_chunks")
        slots = self.sampler.slots
        if slots is not None and rows % slots:
            raise ValueError(f"a rollout of {rows} responses does not divide into batches of {slots} slots")
        if not self.sampler.temperature > 0:
            raise ValueError("sampler.temperature must be positive to train: greedy responses are all alike")

    @property
    def decaying_optimizer(self) -> OptimizerConfig:
        """The optimizer with its decay, if any, spelled out."""
        if not self.decay_learning_rate:
            return self.optimizer
        return _decaying_over(self.optimizer, self.steps * self.epochs * self.mini_batches)

    @property
    def first_optimizer(self) -> OptimizerConfig:
        """That of the phase that a run begins with."""
        return self.warm_start.decaying_optimizer if self.warm_start.steps else self.decaying_optimizer

    def probes(self, step: int) -> bool:
        """Whether gradients are probed at the end of a step."""
        return self.probe_every > 0 and step % self.probe_every == 0

    @property
    def learned_rows(self) -> int:
        """Responses of a rollout that are learned from."""
        return (self.learned_groups or self.prompts) * self.group_size


def check_learner(config: TrainerConfig, learner: LearnerConfig) -> None:
    """Refuses a learner and a trainer that do not fit together.

    Raises:
      ValueError: with the sizes and the way out.
    """
    estimator = config.advantages or OBJECTIVES[learner.objective].advantages
    if config.group_size < 2 and estimator != "batch":
        raise ValueError(
            f"a group of 1 has nothing to compare a response with ({estimator} advantages): raise group_size to 2 or "
            "more, or choose advantages batch"
        )
    mini_batch = config.learned_rows // config.mini_batches
    if mini_batch % learner.micro_batches:
        raise ValueError(
            f"a mini-batch of {mini_batch} responses does not divide into {learner.micro_batches} micro_batches"
        )
    if config.probe_every and config.mini_batches * learner.micro_batches < 2:
        raise ValueError(
            "a gradient has no variance over a single part: use 2 or more mini_batches or micro_batches, or leave "
            "probe_every at 0"
        )
    if learner.temperature != config.sampler.temperature:
        raise ValueError(
            f"the learner scores at temperature {learner.temperature}, but the sampler draws at "
            f"{config.sampler.temperature}: give both the same"
        )


def check_mesh(config: TrainerConfig, learner: LearnerConfig, mesh: Mesh, longest: int) -> None:
    """Refuses a mesh that does not divide what a step works on.

    Args:
      config: of the run.
      learner: of the run.
      mesh: from `rspo_jax.sharding.make_mesh`.
      longest: the longest possible sequence, in places of a row.

    Raises:
      ValueError: with the sizes and the way out.
    """
    parts = math.prod(mesh.shape[axis] for axis in RULES["rows"])
    rows = config.prompts * config.group_size
    sizes = {
        f"a rollout chunk ({rows} responses in {config.rollout_chunks} rollout_chunks)": rows // config.rollout_chunks
    }
    if config.sampler.slots is not None:
        sizes["sampler.slots"] = config.sampler.slots
    if config.warm_start.steps:
        sizes["warm_start.batch_size"] = config.warm_start.batch_size
    for name, size in sizes.items():
        if size % parts:
            raise ValueError(
                f"{name} is {size} rows, which the {parts} parts of the mesh {dict(mesh.shape)} (data x fsdp x expert) "
                f"cannot share equally: make it a multiple of {parts}, or choose another mesh"
            )
    tokens, ways = learner.row_length or longest, math.prod(mesh.shape[axis] for axis in RULES["tokens"])
    if tokens % ways:
        raise ValueError(
            f"rows of {tokens} tokens cannot be split into {ways} equal parts by mesh.context: "
            f"set row_length to {-(-tokens // ways) * ways}"
        )
