"""The settings of a training run: frozen dataclasses, each checked when it is made, and the checks between them."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optax
from jax.sharding import Mesh

from rspo_jax.objectives import ADVANTAGES, OBJECTIVES, CorrectionConfig, RegularizerConfig
from rspo_jax.rollouts import ConversationConfig, SamplerConfig
from rspo_jax.routing import AdaptiveShiftConfig, LayerAggregation, Routing
from rspo_jax.sharding import RULES, MeshConfig
from rspo_jax.types import check_choice


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with gradient clipping, under a linear warmup to a constant learning rate or to a cosine decay to 0."""

    learning_rate: float = 3e-4
    """The highest learning rate: that after the warmup."""
    warmup_updates: int = 10
    """Updates over which the learning rate grows from 0."""
    decay_updates: int | None = None
    """Updates, warmup included, after which a cosine decay reaches 0; constant when absent."""
    weight_decay: float = 0.0
    """Decoupled weight decay, in units of the learning rate."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.95
    """Decay of the mean of squared gradients."""
    max_gradient_norm: float = 1.0
    """Norm that longer gradients are scaled down to."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.warmup_updates < 0:
            raise ValueError(f"warmup_updates must be 0 or more, got {self.warmup_updates}")
        if self.decay_updates is not None and self.decay_updates <= self.warmup_updates:
            raise ValueError(
                f"decay_updates ({self.decay_updates}) counts the warmup too and must exceed it ({self.warmup_updates})"
            )
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be 0 or more, got {self.weight_decay}")
        if not self.max_gradient_norm > 0:
            raise ValueError(f"max_gradient_norm must be positive, got {self.max_gradient_norm}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")

    def schedule(self) -> optax.Schedule:
        """Return the learning rate as a function of the number of updates made."""
        after = optax.constant_schedule(self.learning_rate)
        if self.decay_updates is not None:
            after = optax.cosine_decay_schedule(self.learning_rate, self.decay_updates - self.warmup_updates)
        if self.warmup_updates == 0:  # Optax takes a ramp of no steps for a learning rate of 0 that never rises
            return after
        ramp = optax.linear_schedule(0.0, self.learning_rate, self.warmup_updates)
        return optax.join_schedules([ramp, after], [self.warmup_updates])

    def build(self) -> optax.GradientTransformation:
        """Return the Optax chain: clip by global norm, then AdamW."""
        return optax.chain(
            optax.clip_by_global_norm(self.max_gradient_norm),
            optax.adamw(self.schedule(), b1=self.beta1, b2=self.beta2, weight_decay=self.weight_decay),
        )

    def learning_rate_at(self, updates: int) -> float:
        """Return the learning rate of the update after so many."""
        return float(np.asarray(self.schedule()(updates)))


@dataclass(frozen=True)
class LearnerConfig:
    """Settings of the gradient: objective, penalties, routing and the shape of its batches."""

    objective: str = "rspo"
    objective_config: Any = None
    """A config of the objective's own type; its defaults when absent."""
    layer_aggregation: LayerAggregation = "mean"
    """Aggregation of the router shift over layers (`rspo_jax.routing.shift`)."""
    routing: Routing = "free"
    """Freedom of the routers: they choose freely, or are held (`rspo_jax.routing.hold`)."""
    regularizers: RegularizerConfig = RegularizerConfig()
    adaptive_shift: AdaptiveShiftConfig = AdaptiveShiftConfig()
    correction: CorrectionConfig = CorrectionConfig()
    """Correction for a sampler whose log-probabilities differ from the trainer's."""
    diagnostics: bool = True
    """Record the distributions of routes, experts and ratios in every update."""
    temperature: float = 1.0
    """The sampler's temperature, so that the policy trained is the policy sampled."""
    micro_batches: int = 1
    """Parts that a mini-batch is cut into, one after the other, to save memory."""
    row_length: int | None = None
    """Tokens of a row that responses are packed into; None for the length of the longest possible sequence."""
    route_on_host: bool = False
    """Keep the old route in the host's memory between scoring and update, if it is too large for the device."""

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"unknown objective {self.objective!r}; choose one of {', '.join(OBJECTIVES)}")
        check_choice("layer_aggregation", self.layer_aggregation, LayerAggregation)
        check_choice("routing", self.routing, Routing)
        if self.micro_batches < 1:
            raise ValueError(f"micro_batches must be at least 1, got {self.micro_batches}")
        if self.row_length is not None and self.row_length < 1:
            raise ValueError(f"row_length must be at least 1, got {self.row_length}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive to train, got {self.temperature}")
        if self.adaptive_shift.adapts and (self.gamma_min is None or self.gamma_min == 1):
            raise ValueError(
                f"adaptive_shift needs a router shift to adapt, and {self.objective} has none: give it a gamma_min "
                "below 1, or leave the rule at fixed"
            )
        if self.adaptive_shift.adapts and not self.diagnostics:
            raise ValueError("adaptive_shift goes by the diagnostics of the updates: switch diagnostics on")

    @property
    def gamma_min(self) -> float | None:
        """Floor of the router shift; None if the objective leaves the shift out."""
        return (self.objective_config or OBJECTIVES[self.objective].config_type()).gamma_min

    @property
    def gamma_gradient(self) -> bool:
        """True if the router shift passes a gradient on to the routers (an ablation)."""
        return (self.objective_config or OBJECTIVES[self.objective].config_type()).gamma_gradient


@dataclass(frozen=True)
class WarmStartConfig:
    """Supervised learning on worked solutions before reinforcement learning, in place of a pre-trained base."""

    steps: int = 300
    """Supervised steps; 0 for no warm start."""
    batch_size: int = 256
    """Solutions a step."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-3, warmup_updates=20)
    """The learning rate decays over the whole phase, unless `decay_updates` says otherwise."""

    @property
    def decaying_optimizer(self) -> OptimizerConfig:
        """The optimizer with the length of its decay filled in."""
        return _decaying_over(self.optimizer, self.steps)

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch_size < 1:
            raise ValueError(
                f"a warm start needs 0 or more steps of 1 or more solutions, got {self.steps}, {self.batch_size}"
            )


def _decaying_over(optimizer: OptimizerConfig, updates: int) -> OptimizerConfig:
    """Fill in the number of updates to decay over, unless one is given or there is no room after the warmup."""
    if optimizer.decay_updates is not None or updates <= optimizer.warmup_updates:
        return optimizer
    return dataclasses.replace(optimizer, decay_updates=updates)


@dataclass(frozen=True)
class EvaluationConfig:
    """Solve rates on held-out problems, greedy and sampled at temperature 1."""

    every: int = 25
    """Steps of reinforcement learning between evaluations on the validation split."""
    problems: int = 500
    """Validation problems of each evaluation; the first and the final one also use the whole test split."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.problems < 1:
            raise ValueError(f"evaluation needs every ≥ 1 and problems ≥ 1, got {self.every} and {self.problems}")


@dataclass(frozen=True)
class SamplesConfig:
    """Sample responses for people to look at, with the router shift of their tokens."""

    every: int | None = None
    """Steps of reinforcement learning between sample responses in samples.jsonl; those between evaluations when absent,
    0 for none. The first step and the last one leave some too."""
    count: int = 8
    """Responses of each such step."""

    def __post_init__(self) -> None:
        if (self.every is not None and self.every < 0) or self.count < 1:
            raise ValueError(f"samples need every ≥ 0 and count ≥ 1, got {self.every} and {self.count}")


@dataclass(frozen=True)
class CheckpointConfig:
    """Settings of the checkpoints."""

    every: int = 25
    """Steps of either phase between checkpoints; the end of each phase is always saved."""
    keep: int = 3
    """Number of checkpoints kept."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"checkpoints need every ≥ 1 and keep ≥ 1, got {self.every} and {self.keep}")


@dataclass(frozen=True)
class TrainerConfig:
    """Settings of the run, apart from model, task and objective."""

    steps: int = 150
    """Steps of reinforcement learning, one rollout each."""
    prompts: int = 64
    """Prompts of a rollout."""
    group_size: int = 8
    """Responses to each prompt."""
    mini_batches: int = 4
    """Updates that a rollout is cut into; all but the first are off-policy."""
    epochs: int = 1
    """Passes over a rollout, each over the same mini-batches in an order of its own."""
    rollout_chunks: int = 2
    """Parts of a rollout: the host judges one while the device draws the next."""
    learned_groups: int | None = None
    """Groups of a rollout that are scored and learned from; all when absent. Groups whose rewards differ come first;
    the others have no gradient, and leaving them out saves their time."""
    dynamic_sampling: bool = False
    """Leave groups whose rewards are all equal out of the loss, and draw further rollouts until enough groups differ
    (DAPO, arXiv 2503.14476)."""
    max_rollouts: int = 4
    """Rollouts that dynamic sampling may draw in one step."""
    advantages: str | None = None
    """Estimator of the advantages (`rspo_jax.objectives.ADVANTAGES`); that of the objective's source when absent."""
    overlong_buffer: int = 0
    """Tokens before `sampler.max_new_tokens` over which a penalty for length grows from 0 to 1 (DAPO); 0 for none. For
    conversations: tokens before `conversation.max_tokens`, those of the environment included."""
    mask_truncated: bool = False
    """Leave responses that were cut off out of the loss (DAPO's overlong filtering). Their rewards still count in the
    advantages of their groups."""
    max_prompt_tokens: int | None = None
    """Problems with longer prompts are left out of training and evaluations, and counted; no limit when absent."""
    seed: int = 0
    """Decides every random number of the run."""
    sampler: SamplerConfig = SamplerConfig()
    conversation: ConversationConfig = ConversationConfig()
    """Limits of conversations; only tasks of several turns have them."""
    optimizer: OptimizerConfig = OptimizerConfig()
    decay_learning_rate: bool = False
    """Let the learning rate decay to 0 (cosine) over all steps, unless the optimizer has its own `decay_updates`."""
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    evaluation: EvaluationConfig = EvaluationConfig()
    samples: SamplesConfig = SamplesConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    probe_every: int = 0
    """Steps between probes of all objectives' gradients (`rspo_jax.training.probe`); 0 for none. A probe takes as long
    as several steps and does not affect the training."""
    mesh: MeshConfig = MeshConfig()
    """Arrangement of the devices. By default all of them split rows, parameters and optimizer (fsdp)."""

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
        rows = self.rollout_rows
        if rows % self.rollout_chunks:
            raise ValueError(f"a rollout of {rows} responses does not divide into {self.rollout_chunks} rollout_chunks")
        slots = self.sampler.slots
        if slots is not None and rows % slots:
            raise ValueError(f"a rollout of {rows} responses does not divide into batches of {slots} slots")
        if not self.sampler.temperature > 0:
            raise ValueError("sampler.temperature must be positive to train: greedy responses are all alike")

    @property
    def decaying_optimizer(self) -> OptimizerConfig:
        """The optimizer with the length of its decay, if any, filled in."""
        if not self.decay_learning_rate:
            return self.optimizer
        return _decaying_over(self.optimizer, self.steps * self.epochs * self.mini_batches)

    @property
    def first_optimizer(self) -> OptimizerConfig:
        """The optimizer of the phase that a run begins with."""
        return self.warm_start.decaying_optimizer if self.warm_start.steps else self.decaying_optimizer

    def probes(self, step: int) -> bool:
        """Return whether gradients are probed at the end of a step."""
        return self.probe_every > 0 and step % self.probe_every == 0

    def leaves_samples(self, step: int) -> bool:
        """Return whether sample responses are recorded at the end of a step."""
        every = self.evaluation.every if self.samples.every is None else self.samples.every
        return every > 0 and (step in (1, self.steps) or step % every == 0)

    @property
    def learned_rows(self) -> int:
        """Responses of a rollout that are learned from."""
        return self.wanted_groups * self.group_size

    @property
    def rollout_rows(self) -> int:
        """Responses of a rollout."""
        return self.prompts * self.group_size

    @property
    def wanted_groups(self) -> int:
        """Groups of a rollout that are learned from."""
        return self.learned_groups or self.prompts


def check_learner(config: TrainerConfig, learner: LearnerConfig) -> None:
    """Refuse a learner and a trainer that do not fit together.

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
    """Refuse a mesh that does not divide the rows and tokens of a step.

    Args:
      config: the trainer's settings.
      learner: the learner's settings.
      mesh: from `rspo_jax.sharding.make_mesh`.
      longest: tokens of a row that the longest possible sequence takes.

    Raises:
      ValueError: with the sizes and the way out.
    """
    parts = math.prod(mesh.shape[axis] for axis in RULES["rows"])
    rows = config.rollout_rows
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
