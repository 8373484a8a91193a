"""The training loop: warm start, then reinforcement learning, from a fresh start or from a checkpoint.

Reads top to bottom as the data flows: prompts → rollout → rewards → advantages → objective → update → metrics and
checkpoint. Every step is a function of the run state, which holds all that a later process needs to go on bit for bit:
parameters, optimizer, PRNG key, data cursor and step counts. This file must never know a concrete model or task.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rspo_jax.advantages import group_advantages
from rspo_jax.checkpoint import Checkpoints
from rspo_jax.data import take
from rspo_jax.files import FilePath, as_path
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
    refilling_pays,
    sample_in_chunks,
    solve,
    usable_problems,
)
from rspo_jax.run_state import RunState, first_state, fresh_state, sampling_params, state_on_mesh
from rspo_jax.sampler import SamplerConfig
from rspo_jax.sharding import constrain, fetch, make_mesh
from rspo_jax.statistics import Statistic, reduce
from rspo_jax.train_step import (
    LearnerConfig,
    OptimizerConfig,
    init_train_state,
    score,
    split_parts,
    supervised_update,
    to_device,
    to_host,
    update,
)
from rspo_jax.trainer_config import (
    TrainerConfig,
    check_learner,
    check_mesh,
)
from rspo_jax.types import Array, Params, Policy, RolloutBatch, Task

Batch = TypeVar("Batch")


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
    dropped: dict[str, float]
    """How many problems of each split are left out, as metrics; none where every prompt is welcome."""


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
        self.log.flush()  # the rows up to a checkpoint must outlive a kill, as it does
        self.checkpoints.save(index, state, {"elapsed_seconds": self.elapsed})


class Stopped(Exception):
    """The run was asked to stop by the signal that it names; its state has been saved."""


def train(
    policy: Policy,
    init_params: Callable[[Array], Params],
    task: Task,
    learner: LearnerConfig,
    config: TrainerConfig,
    run_dir: FilePath,
    resume: bool = False,
    load_params: Callable[[], Params | None] = lambda: None,
) -> tuple[Params, float]:
    """Runs both phases to their end.

    Args:
      policy: the model.
      init_params: makes its parameters from a PRNG key.
      task: problems and judge.
      learner: the objective.
      config: everything else.
      run_dir: a folder, or an address of `rspo_jax.files.as_path`; gets `metrics.jsonl`, `tensorboard/` and
        `checkpoints/`.
      resume: go on from the newest checkpoint in `run_dir`, or start where there is none.
      load_params: gives the parameters that a run begins with, of the shapes of `init_params`, on the mesh in use; None
        for fresh ones. A run that goes on does not call it.

    Returns:
      The final parameters, and the seconds that the run took.

    Raises:
      Stopped: after SIGTERM or SIGINT, once the state is saved.
      ValueError: if configs do not fit together, or a checkpoint does not fit the model.
    """
    check_learner(config, learner)
    run = _prepare(policy, task, learner, config)
    mesh = make_mesh(config.mesh)
    check_mesh(config, learner, mesh, run.width + config.sampler.max_new_tokens - 1)
    with (
        jax.set_mesh(mesh),
        Preemption() as preemption,
        Checkpoints(as_path(run_dir) / "checkpoints", keep=config.checkpoint.keep) as checkpoints,
    ):
        template = state_on_mesh(policy, init_params, config, mesh)
        restored = checkpoints.restore_newest(template, say=_say) if resume else None
        state = first_state(init_params, load_params(), config, template) if restored is None else restored.state
        elapsed = 0.0 if restored is None else float(restored.metadata["elapsed_seconds"])
        if resume:
            _say(f"going on after {int(state.warm_start_step)} warm-start steps and {int(state.step)} steps")
        with MetricsLog(run_dir, resume_after=_position(state) if resume else None) as log:
            recorder = Recorder(log, checkpoints, preemption, elapsed)
            state = _warm_start(run, state, recorder)
            state = _reinforce(run, state, recorder)
            return state.train.params, recorder.elapsed


def _prepare(policy: Policy, task: Task, learner: LearnerConfig, config: TrainerConfig) -> Run:
    """Chooses the problems of the run, and says which are left out."""
    names = ("train", "validation", "test")
    splits = [usable_problems(task, task.problems(name), config.max_prompt_tokens) for name in names]
    train_problems, validation_problems, test_problems = (split.problems for split in splits)
    for name, split in zip(names, splits, strict=True):
        if split.dropped:
            _say(
                f"{name}: {split.dropped} of {split.dropped + len(split.problems)} problems are left out, because "
                f"their prompts have more than {config.max_prompt_tokens} tokens (max_prompt_tokens)"
            )
    dropped = {f"dropped_{name}_problems": float(split.dropped) for name, split in zip(names, splits, strict=True)}
    return Run(
        policy,
        task,
        learner,
        config,
        train_problems,
        validation_problems[: config.evaluation.problems],
        test_problems,
        width=max(split.width for split in splits),
        dropped={} if config.max_prompt_tokens is None else dropped,
    )


def _say(text: str) -> None:
    """Prints, on one of the processes that share a run."""
    if jax.process_index() == 0:
        print(text)


class RestoredParams(NamedTuple):
    """Parameters from a run's folder."""

    params: Params
    step: int
    """Steps of reinforcement learning that they have seen."""
    index: int
    """Of the checkpoint."""


def restore_params(
    policy: Policy, init_params: Callable[[Array], Params], config: TrainerConfig, run_dir: FilePath
) -> RestoredParams:
    """The parameters of the newest sound checkpoint in `run_dir`, read straight to where the mesh in use has them.

    Raises:
      ValueError: if there is no checkpoint, or it does not fit the model or the mesh.
      CheckpointError: if all checkpoints are damaged.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        template = jax.eval_shape(functools.partial(fresh_state, init_params, config))
    else:
        template = state_on_mesh(policy, init_params, config, mesh)
    with Checkpoints(as_path(run_dir) / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
        restored = checkpoints.restore_newest(template, say=_say)
    if restored is None:
        raise ValueError(f"{run_dir} has no checkpoint yet")
    return RestoredParams(restored.state.train.params, int(restored.state.step), restored.index)


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
            train_state, statistics = supervised_update(run.policy, optimizer, state.train, batch, run.config.mesh)
            cursor = state.cursor + config.batch_size
            state = state._replace(train=train_state, cursor=cursor, warm_start_step=jnp.int32(step))
            metrics = _to_host([statistics]) | packing_metrics | {"learning_rate": _learning_rate(optimizer, step - 1)}
            metrics |= _speed(started, int(jnp.sum(solutions.mask)))
            recorder.log.write("warm_start", step, metrics)
            progress.update(step, metrics)
            if step == config.steps:
                train_state = init_train_state(state.train.params, run.config.decaying_optimizer)
                state = state._replace(train=train_state, cursor=jnp.int32(0))
            stop = recorder.preemption.agreed()
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
            last, stop = step == config.steps, recorder.preemption.agreed()
            evaluating = last or step % config.evaluation.every == 0
            saving = last or stop or step % config.checkpoint.every == 0
            if evaluating or saving:
                metrics, previous = _finish(previous), None
                write(step, metrics | (_evaluate(run, state, final=last) if evaluating else {}))
                stop = recorder.preemption.agreed()  # once more: an evaluation takes its time
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
        sampling_params(run.policy, state.train.params, config),
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
    if refilling_pays(float(jnp.sum(prompts.mask) / prompts.mask.shape[0]), lengths):
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
            train_state, update_statistics = update(
                run.policy, optimizer, train_state, mini_batch, learner, config.mesh
            )
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
    return jax.tree.map(lambda leaf: constrain(leaf[rows], "rows", *(None,) * (leaf.ndim - 1)), batch)


def _rollout_metrics(judged: Judged, informative: np.ndarray, draws: Draws, config: TrainerConfig) -> dict[str, float]:
    lengths = fetch(jnp.sum(draws.rollout.mask, axis=1))
    unlearned = max(0, int(informative.sum()) - (config.learned_groups or config.prompts))
    return {
        "reward": float(judged.rewards.mean()),
        "solve_rate": float(judged.correct.mean()),
        "truncated_fraction": float(judged.truncated.mean()),
        "unjudged": float(judged.unjudged.sum()),
        "response_length": float(lengths.mean()),
        "longest_response": float(lengths.max()),
        "response_tokens": float(lengths.sum()),
        "refilled": float(draws.refilled),
        "informative_groups": float(informative.mean()),
        "unlearned_informative_groups": unlearned / config.prompts,
    }


def _evaluate(run: Run, state: RunState, final: bool) -> dict[str, float]:
    """Solve rates with 95 % intervals: `eval_*` on validation problems, and if final `test_*` on the test split.
    Beside them `dropped_*_problems`, where a run leaves problems out."""
    metrics = dict(run.dropped)
    params = sampling_params(run.policy, state.train.params, run.config)
    splits = {"eval": run.validation_problems} | ({"test": run.test_problems} if final else {})
    for split, problems in splits.items():
        for mode, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            sampler = SamplerConfig(run.config.sampler.max_new_tokens, temperature)
            key = jax.random.key(run.config.seed)
            judged = solve(run.policy, params, run.task, problems, key, sampler, run.width)
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
