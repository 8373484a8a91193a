"""The training loop: warm start, then reinforcement learning, from a fresh start or from a checkpoint.

Reads top to bottom as the data flows: prompts → rollout → rewards → advantages → objective → update → metrics and
checkpoint. Every step is a function of the run state, which holds all that a later process needs to go on bit for bit:
parameters, optimizer, PRNG key, data cursor and step counts. This file must never know a concrete model or task.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from rspo_jax.hosts import Preemption, is_primary
from rspo_jax.records import Alarm, FilePath, MetricsLog, Progress, as_path, read_metrics, wilson_interval
from rspo_jax.records.checkpoint import Checkpoints
from rspo_jax.rollouts import (
    Packing,
    SamplerConfig,
    check_solutions,
    encode_solutions,
    pack,
    solve,
    take,
    usable_problems,
)
from rspo_jax.routing import finish
from rspo_jax.sharding import make_mesh
from rspo_jax.statistics import Statistic, reduce
from rspo_jax.training.config import (
    LearnerConfig,
    TrainerConfig,
    check_learner,
    check_mesh,
)
from rspo_jax.training.reinforcement import Run, StepRecord, learn, learning_rate_at, probe_gradients, start_rollout
from rspo_jax.training.state import (
    RunState,
    copy_params,
    first_state,
    fresh_state,
    init_train_state,
    sampling_params,
    state_on_mesh,
)
from rspo_jax.training.update import supervised_update
from rspo_jax.types import Array, Params, Policy, Task

Batch = TypeVar("Batch")


@dataclass
class Recorder:
    """What a run leaves behind: metrics, checkpoints, and word that it was asked to stop."""

    log: MetricsLog
    checkpoints: Checkpoints
    preemption: Preemption
    alarm: Alarm
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
      run_dir: a folder, or an address of `rspo_jax.records.files.as_path`; gets `metrics.jsonl`, `tensorboard/` and
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
        template = state_on_mesh(policy, init_params, config, mesh, learner.regularizers.needs_reference)
        restored = checkpoints.restore_newest(template, say=_say) if resume else None
        state = first_state(init_params, load_params(), config, template) if restored is None else restored.state
        elapsed = 0.0 if restored is None else float(restored.metadata["elapsed_seconds"])
        if resume:
            _say(f"going on after {int(state.warm_start_step)} warm-start steps and {int(state.step)} steps")
        with MetricsLog(run_dir, resume_after=_position(state) if resume else None) as log:
            recorder = Recorder(log, checkpoints, preemption, _alarm_after(run_dir, resume), elapsed)
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
    policy: Policy,
    init_params: Callable[[Array], Params],
    config: TrainerConfig,
    run_dir: FilePath,
    with_reference: bool = False,
) -> RestoredParams:
    """The parameters of the newest sound checkpoint in `run_dir`, read straight to where the mesh in use has them.

    `with_reference` says whether the run keeps those of a reference (`RegularizerConfig.needs_reference`).

    Raises:
      ValueError: if there is no checkpoint, or it does not fit the model or the mesh.
      CheckpointError: if all checkpoints are damaged.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        template = jax.eval_shape(functools.partial(fresh_state, init_params, config, with_reference))
    else:
        template = state_on_mesh(policy, init_params, config, mesh, with_reference)
    with Checkpoints(as_path(run_dir) / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
        restored = checkpoints.restore_newest(template, say=_say)
    if restored is None:
        raise ValueError(f"{run_dir} has no checkpoint yet")
    return RestoredParams(restored.state.train.params, int(restored.state.step), restored.index)


def _alarm_after(run_dir: FilePath, resume: bool) -> Alarm:
    """An alarm that has seen the rows before a resumption, and does not ring again for them."""
    alarm = Alarm()
    if resume and is_primary() and (as_path(run_dir) / "metrics.jsonl").exists():
        for row in read_metrics(run_dir):
            alarm.update(row)
    return alarm


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
            numbers, _ = _to_host([statistics])
            metrics = numbers | packing_metrics | {"learning_rate": learning_rate_at(optimizer, step - 1)}
            metrics |= _speed(started, int(jnp.sum(solutions.mask)))
            recorder.log.write("warm_start", step, metrics)
            progress.update(step, metrics)
            if step == config.steps:
                train_state = init_train_state(state.train.params, run.config.decaying_optimizer)
                reference = None if state.reference is None else copy_params(train_state.params)
                state = state._replace(train=train_state, cursor=jnp.int32(0), reference=reference)
            stop = recorder.preemption.agreed()
            if stop or step == config.steps or step % run.config.checkpoint.every == 0:
                recorder.save(state)
            if stop:
                raise Stopped(stop)
    return state


def _reinforce(run: Run, state: RunState, recorder: Recorder) -> RunState:
    """Learns from its own responses, `config.steps` rollouts of them."""
    config, done = run.config, int(state.step)
    if done and done >= config.steps:
        return state
    with Progress("rl", max(config.steps, 1), completed=done) as progress:

        def write(step: int, metrics: dict[str, float], arrays: dict[str, np.ndarray]) -> None:
            recorder.log.write("rl", step, metrics, arrays)
            progress.update(step, metrics)
            why = recorder.alarm.update({"phase": "rl", "step": step} | metrics)
            if why is not None:
                progress.say(f"step {step}: signs of a collapse: {why}")

        if done == 0:
            write(0, _evaluate(run, state, final=True), {})
        previous: StepRecord | None = None
        for step in range(done + 1, config.steps + 1):
            draws, state = start_rollout(run, state)
            if previous is not None:  # the host has time: the device is drawing
                write(previous.step, *_finish(previous))
            state, previous = learn(run, state, draws)
            last, stop = step == config.steps, recorder.preemption.agreed()
            evaluating = last or step % config.evaluation.every == 0
            saving = last or stop or step % config.checkpoint.every == 0
            if evaluating or saving or config.probes(step):
                metrics, arrays = _finish(previous)
                metrics |= probe_gradients(run, state, previous.scored) if config.probes(step) else {}
                previous = None
                write(step, metrics | (_evaluate(run, state, final=last) if evaluating else {}), arrays)
                stop = recorder.preemption.agreed()  # once more: an evaluation takes its time
            if saving or stop:
                recorder.save(state)
            if stop and not last:
                raise Stopped(stop)
    return state


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


def _finish(record: StepRecord) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Waits for a step's statistics and joins them with what the host knew: numbers and arrays."""
    metrics, arrays = _to_host(record.statistics)
    return metrics | record.metrics | _speed(record.started, int(record.metrics["response_tokens"])), arrays


def _to_host(statistics: list[dict[str, Statistic]]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Finishes the statistics of a step: a name that several updates report is reduced over all of them."""
    by_name: dict[str, list[Statistic]] = {}
    for update_statistics in statistics:
        for name, statistic in update_statistics.items():
            by_name.setdefault(name, []).append(statistic)
    return finish(jax.device_get(_reduce_stacked(by_name)))


@jax.jit
def _reduce_stacked(by_name: dict[str, list[Statistic]]) -> dict[str, Array]:
    return reduce({name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts) for name, parts in by_name.items()})


def _speed(started: float, tokens: int) -> dict[str, float]:
    seconds = time.monotonic() - started
    return {"step_seconds": seconds, "tokens_per_second": tokens / seconds}
