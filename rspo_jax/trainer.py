"""The training loop: warm start, then reinforcement learning, from a fresh start or from a checkpoint.

Reads top to bottom as the data flows: prompts → rollout → rewards → advantages → objective → update → metrics and
checkpoint. Every step is a function of the run state, which holds all that a later process needs to go on bit for bit:
parameters, optimizer, PRNG key, data cursor and step counts. This file must never know a concrete model or task.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rspo_jax.advantages import group_advantages
from rspo_jax.checkpoint import Checkpoints
from rspo_jax.data import take
from rspo_jax.metrics import MetricsLog, Progress, wilson_interval
from rspo_jax.preemption import Preemption
from rspo_jax.rollout import (
    Judged,
    Packing,
    Prompts,
    ResponseLengths,
    assemble,
    check_solutions,
    encode_prompts,
    encode_solutions,
    judge,
    pack,
    prompt_width,
    refilling_pays,
    sample_in_chunks,
    solve,
)
from rspo_jax.sampler import SamplerConfig
from rspo_jax.statistics import Statistic, reduce
from rspo_jax.train_step import (
    LearnerConfig,
    OptimizerConfig,
    TrainState,
    init_train_state,
    score,
    split_parts,
    supervised_update,
    to_device,
    to_host,
    update,
)
from rspo_jax.types import Array, Params, Policy, RolloutBatch, Task

Batch = TypeVar("Batch")


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
    scale_advantages: bool = True
    """Divide by the group's standard deviation."""
    seed: int = 0
    sampler: SamplerConfig = SamplerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    decay_learning_rate: bool = False
    """Let the learning rate fall to 0 (cosine) over all steps, unless the optimizer says over how many updates."""
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self) -> None:
        for name in ("prompts", "group_size", "mini_batches", "epochs", "rollout_chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps < 0:
            raise ValueError(f"steps must be 0 or more, got {self.steps}")
        if self.group_size < 2 and self.scale_advantages:
            raise ValueError(
                "a group of 1 has no standard deviation to scale by: raise group_size to 2 or more, or switch "
                "scale_advantages off"
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
    def learned_rows(self) -> int:
        """Responses of a rollout that are learned from."""
        return (self.learned_groups or self.prompts) * self.group_size


class RunState(NamedTuple):
    """All that a run needs to go on exactly; a checkpoint holds nothing else but its metadata."""

    train: TrainState
    key: Array
    """PRNG key data; split once a step."""
    cursor: Array
    """int32 scalar: problems taken from the stream of the present phase."""
    warm_start_step: Array
    """int32 scalar: supervised steps made."""
    step: Array
    """int32 scalar: steps of reinforcement learning made."""
    lengths: ResponseLengths
    """Of the last rollout: they decide how the next is drawn."""


@dataclass(frozen=True)
class Run:
    """What stays the same over a run."""

    policy: Policy
    task: Task
    learner: LearnerConfig
    config: TrainerConfig
    train_problems: Sequence[Any]
    validation_problems: Sequence[Any]
    test_problems: Sequence[Any]
    width: int
    """Of padded prompts, in tokens."""


@dataclass
class Recorder:
    """What a run leaves behind: metrics, checkpoints, and word that it was asked to stop."""

    log: MetricsLog
    checkpoints: Checkpoints
    preemption: Preemption
    elapsed_before: float
    started: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Seconds, those of interrupted processes up to their last checkpoint included."""
        return self.elapsed_before + time.monotonic() - self.started

    def save(self, state: RunState) -> None:
        index = int(state.warm_start_step) + int(state.step)
        self.checkpoints.save(index, state, {"elapsed_seconds": self.elapsed})


class Stopped(Exception):
    """The run was asked to stop by the signal that it names; its state has been saved."""


def check_learner(config: TrainerConfig, learner: LearnerConfig) -> None:
    """Refuses a learner and a trainer that do not fit together.

    Raises:
      ValueError: with the sizes and the way out.
    """
    mini_batch = config.learned_rows // config.mini_batches
    if mini_batch % learner.micro_batches:
        raise ValueError(
            f"a mini-batch of {mini_batch} responses does not divide into {learner.micro_batches} micro_batches"
        )
    if learner.temperature != config.sampler.temperature:
        raise ValueError(
            f"the learner scores at temperature {learner.temperature}, but the sampler draws at "
            f"{config.sampler.temperature}: give both the same"
        )


def train(
    policy: Policy,
    init_params: Callable[[Array], Params],
    task: Task,
    learner: LearnerConfig,
    config: TrainerConfig,
    run_dir: Path,
    resume: bool = False,
) -> tuple[Params, float]:
    """Runs both phases to their end.

    Args:
      policy: the model.
      init_params: makes its parameters from a PRNG key.
      task: problems and judge.
      learner: the objective.
      config: everything else.
      run_dir: gets `metrics.jsonl`, `tensorboard/` and `checkpoints/`.
      resume: go on from the newest checkpoint in `run_dir`, or start where there is none.

    Returns:
      The final parameters, and the seconds that the run took.

    Raises:
      Stopped: after SIGTERM or SIGINT, once the state is saved.
      ValueError: if configs do not fit together, or a checkpoint does not fit the model.
    """
    check_learner(config, learner)
    splits = [task.problems(split) for split in ("train", "validation", "test")]
    width = max(prompt_width(task, problems) for problems in splits)
    run = Run(policy, task, learner, config, splits[0], splits[1][: config.evaluation.problems], splits[2], width)
    with Preemption() as preemption, Checkpoints(run_dir / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
        template = jax.eval_shape(lambda: _fresh_state(init_params, config))
        restored = checkpoints.restore_newest(template, say=print) if resume else None
        state = _fresh_state(init_params, config) if restored is None else restored.state
        elapsed = 0.0 if restored is None else float(restored.metadata["elapsed_seconds"])
        if resume:
            print(f"going on after {int(state.warm_start_step)} warm-start steps and {int(state.step)} steps")
        with MetricsLog(run_dir, resume_after=_position(state) if resume else None) as log:
            recorder = Recorder(log, checkpoints, preemption, elapsed)
            state = _warm_start(run, state, recorder)
            state = _reinforce(run, state, recorder)
            return state.train.params, recorder.elapsed


def restore_params(init_params: Callable[[Array], Params], config: TrainerConfig, run_dir: Path) -> tuple[Params, int]:
    """The parameters of the newest checkpoint in `run_dir`, and the step of reinforcement learning it was saved at.

    Raises:
      ValueError: if there is no checkpoint, or it does not fit the model.
    """
    with Checkpoints(run_dir / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
        restored = checkpoints.restore_newest(jax.eval_shape(lambda: _fresh_state(init_params, config)), say=print)
    if restored is None:
        raise ValueError(f"{run_dir} has no checkpoint yet")
    return restored.state.train.params, int(restored.state.step)


def _fresh_state(init_params: Callable[[Array], Params], config: TrainerConfig) -> RunState:
    key, params_key = jax.random.split(jax.random.key(config.seed))
    optimizer = config.warm_start.decaying_optimizer if config.warm_start.steps else config.decaying_optimizer
    zero = jnp.int32(0)
    train_state = init_train_state(init_params(params_key), optimizer)
    no_lengths = ResponseLengths(jnp.float32(0), jnp.float32(0))
    return RunState(train_state, jax.random.key_data(key), zero, zero, zero, no_lengths)


def _position(state: RunState) -> tuple[str, int]:
    return ("rl", int(state.step)) if int(state.step) else ("warm_start", int(state.warm_start_step))


def _warm_start(run: Run, state: RunState, recorder: Recorder) -> RunState:
    """Imitates worked solutions, then hands over to reinforcement learning with a fresh optimizer."""
    config, done = run.config.warm_start, int(state.warm_start_step)
    optimizer = config.decaying_optimizer
    if done >= config.steps or int(state.step):
        return state
    response_width = run.config.sampler.max_new_tokens
    check_solutions(run.task, run.train_problems, response_width)
    with Progress("warm_start", config.steps, completed=done) as progress:
        for step in range(done + 1, config.steps + 1):
            started = time.monotonic()
            rows = take(len(run.train_problems), (run.config.seed, 0), int(state.cursor), config.batch_size)
            problems = [run.train_problems[row] for row in rows]
            solutions = encode_solutions(run.task, problems, run.width, response_width)
            packing = Packing(row_length=run.learner.row_length)
            batch, packing_metrics = pack(solutions, response_width, np.arange(len(rows)), packing)
            train_state, statistics = supervised_update(run.policy, optimizer, state.train, batch)
            cursor = state.cursor + config.batch_size
            state = state._replace(train=train_state, cursor=cursor, warm_start_step=jnp.int32(step))
            metrics = _to_host([statistics]) | packing_metrics | {"learning_rate": _learning_rate(optimizer, step - 1)}
            metrics |= _speed(started, int(np.sum(solutions.mask)))
            recorder.log.write("warm_start", step, metrics)
            progress.update(step, metrics)
            if step == config.steps:
                train_state = init_train_state(state.train.params, run.config.decaying_optimizer)
                state = state._replace(train=train_state, cursor=jnp.int32(0))
            stop = recorder.preemption.requested
            if stop or step == config.steps or step % run.config.checkpoint.every == 0:
                recorder.save(state)
            if stop:
                raise Stopped(stop)
    return state


class Draws(NamedTuple):
    """Responses that the device is still drawing."""

    problems: list[Any]
    """One a row: each problem `group_size` times."""
    rollout: RolloutBatch
    chunks: list[Any]
    refilled: bool
    """Whether slots that were done took the next prompt."""
    started: float


class StepRecord(NamedTuple):
    """What is known of a step; its statistics may still be on their way from the device."""

    step: int
    statistics: list[dict[str, Statistic]]
    metrics: dict[str, float]
    started: float


def _reinforce(run: Run, state: RunState, recorder: Recorder) -> RunState:
    """Learns from its own responses, `config.steps` rollouts of them."""
    config, done = run.config, int(state.step)
    if done and done >= config.steps:
        return state
    with Progress("rl", max(config.steps, 1), completed=done) as progress:

        def write(step: int, metrics: dict[str, float]) -> None:
            recorder.log.write("rl", step, metrics)
            progress.update(step, metrics)

        if done == 0:
            write(0, _evaluate(run, state, final=True))
        previous: StepRecord | None = None
        for step in range(done + 1, config.steps + 1):
            draws, state = _start_rollout(run, state)
            if previous is not None:  # the host has time: the device is drawing
                write(previous.step, _finish(previous))
            state, previous = _learn(run, state, draws)
            last, stop = step == config.steps, recorder.preemption.requested
            evaluating = last or step % config.evaluation.every == 0
            saving = last or stop or step % config.checkpoint.every == 0
            if evaluating or saving:
                metrics, previous = _finish(previous), None
                write(step, metrics | (_evaluate(run, state, final=last) if evaluating else {}))
                stop = recorder.preemption.requested  # once more: an evaluation takes its time
            if saving or stop:
                recorder.save(state)
            if stop and not last:
                raise Stopped(stop)
    return state


def _start_rollout(run: Run, state: RunState) -> tuple[Draws, RunState]:
    """Starts to draw `group_size` responses to each of the next prompts."""
    config, started = run.config, time.monotonic()
    key, sample_key = jax.random.split(jax.random.wrap_key_data(state.key))
    rows = take(len(run.train_problems), (config.seed, 1), int(state.cursor), config.prompts)
    problems = [run.train_problems[row] for row in rows]
    prompts = encode_prompts(run.task, problems, run.width, repeats=config.group_size)
    num_chunks, sampler, refilled = _how_to_draw(config, prompts, state.lengths)
    chunks = sample_in_chunks(
        run.policy,
        state.train.params,
        prompts,
        jax.random.split(sample_key, prompts.tokens.shape[0]),
        sampler,
        run.task.tokenizer,
        num_chunks,
        config.group_size,
    )
    repeated = [problem for problem in problems for _ in range(config.group_size)]
    state = state._replace(key=jax.random.key_data(key), cursor=state.cursor + config.prompts)
    return Draws(repeated, assemble(prompts, chunks), chunks, refilled, started), state


def _how_to_draw(config: TrainerConfig, prompts: Prompts, lengths: ResponseLengths) -> tuple[int, SamplerConfig, bool]:
    """Into how many chunks a rollout is cut, how each is drawn, and whether its slots are refilled."""
    slots, rows = config.sampler.slots, config.prompts * config.group_size
    if slots is None or slots >= rows // config.rollout_chunks:
        return config.rollout_chunks, config.sampler, False
    if refilling_pays(float(np.mean(np.sum(prompts.mask, axis=1))), lengths):
        return config.rollout_chunks, config.sampler, True
    return rows // slots, config.sampler, False


def _learn(run: Run, state: RunState, draws: Draws) -> tuple[RunState, StepRecord]:
    """Rewards → advantages → scoring pass → mini-batches × epochs of updates."""
    config, learner = run.config, run.learner
    judged = judge(run.task, draws.problems, draws.chunks)  # chunk by chunk, while the device draws the next
    advantages = group_advantages(
        jnp.asarray(judged.rewards).reshape(-1, config.group_size), scale=config.scale_advantages
    )
    informative = np.any(np.asarray(advantages) != 0, axis=1)
    rollout = draws.rollout._replace(advantages=advantages.reshape(-1))
    if config.learned_groups is not None:
        rollout = _take_rows(rollout, _rows_of_groups(informative, config))
    key, shuffle_key = jax.random.split(jax.random.wrap_key_data(state.key))
    order = np.asarray(jax.random.permutation(shuffle_key, config.learned_rows))
    packing = Packing(config.mini_batches, learner.micro_batches, learner.row_length)
    batch, packing_metrics = pack(rollout, config.sampler.max_new_tokens, order, packing)
    scored, statistics = [], []
    for mini_batch in split_parts(batch, config.mini_batches):
        old, score_statistics = score(run.policy, state.train.params, mini_batch, learner)
        scored.append(to_host(old) if learner.route_on_host else old)
        statistics.append(score_statistics)
    optimizer, train_state = config.decaying_optimizer, state.train
    learning_rate = _learning_rate(optimizer, int(train_state.updates))
    for epoch in range(config.epochs):
        for index in np.asarray(jax.random.permutation(jax.random.fold_in(shuffle_key, epoch), config.mini_batches)):
            mini_batch = to_device(scored[index]) if learner.route_on_host else scored[index]
            train_state, update_statistics = update(run.policy, optimizer, train_state, mini_batch, learner)
            statistics.append(update_statistics)
    metrics = _rollout_metrics(judged, informative, draws, config) | packing_metrics | {"learning_rate": learning_rate}
    lengths = ResponseLengths(jnp.float32(metrics["response_length"]), jnp.float32(metrics["longest_response"]))
    state = state._replace(train=train_state, key=jax.random.key_data(key), step=state.step + 1, lengths=lengths)
    return state, StepRecord(int(state.step), statistics, metrics, draws.started)


def _rows_of_groups(informative: np.ndarray, config: TrainerConfig) -> np.ndarray:
    """The rows of the `learned_groups` groups to learn from: those with a gradient first."""
    groups = np.argsort(~informative, kind="stable")[: config.learned_groups]
    return (groups[:, None] * config.group_size + np.arange(config.group_size)[None, :]).reshape(-1)


@jax.jit
def _take_rows(batch: Batch, rows: ArrayLike) -> Batch:
    return jax.tree.map(lambda leaf: leaf[rows], batch)


def _rollout_metrics(judged: Judged, informative: np.ndarray, draws: Draws, config: TrainerConfig) -> dict[str, float]:
    lengths = np.asarray(draws.rollout.mask).sum(axis=1)
    unlearned = max(0, int(informative.sum()) - (config.learned_groups or config.prompts))
    return {
        "reward": float(judged.rewards.mean()),
        "solve_rate": float(judged.correct.mean()),
        "truncated_fraction": float(judged.truncated.mean()),
        "response_length": float(lengths.mean()),
        "longest_response": float(lengths.max()),
        "response_tokens": float(lengths.sum()),
        "refilled": float(draws.refilled),
        "informative_groups": float(informative.mean()),
        "unlearned_informative_groups": unlearned / config.prompts,
    }


def _evaluate(run: Run, state: RunState, final: bool) -> dict[str, float]:
    """Solve rates with 95 % intervals: `eval_*` on validation problems, and if final `test_*` on the test split."""
    metrics: dict[str, float] = {}
    splits = {"eval": run.validation_problems} | ({"test": run.test_problems} if final else {})
    for split, problems in splits.items():
        for mode, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            sampler = SamplerConfig(run.config.sampler.max_new_tokens, temperature)
            key = jax.random.key(run.config.seed)
            judged = solve(run.policy, state.train.params, run.task, problems, key, sampler, run.width)
            low, high = wilson_interval(int(judged.correct.sum()), len(problems))
            name = f"{split}_{mode}"
            metrics |= {name: float(judged.correct.mean()), f"{name}_low": low, f"{name}_high": high}
    return metrics


def _finish(record: StepRecord) -> dict[str, float]:
    """Waits for a step's statistics and joins them with what the host knew."""
    metrics = _to_host(record.statistics) | record.metrics
    return metrics | _speed(record.started, int(record.metrics["response_tokens"]))


def _to_host(statistics: list[dict[str, Statistic]]) -> dict[str, float]:
    """Finishes the statistics of a step: a name that several updates report is reduced over all of them."""
    by_name: dict[str, list[Statistic]] = {}
    for update_statistics in statistics:
        for name, statistic in update_statistics.items():
            by_name.setdefault(name, []).append(statistic)
    return {name: float(value) for name, value in jax.device_get(_reduce_stacked(by_name)).items()}


@jax.jit
def _reduce_stacked(by_name: dict[str, list[Statistic]]) -> dict[str, Array]:
    return reduce({name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts) for name, parts in by_name.items()})


def _learning_rate(optimizer: OptimizerConfig, updates: int) -> float:
    return float(np.asarray(optimizer.schedule()(updates)))


def _speed(started: float, tokens: int) -> dict[str, float]:
    seconds = time.monotonic() - started
    return {"step_seconds": seconds, "tokens_per_second": tokens / seconds}
