"""The training loop: warm start, then reinforcement learning, from a fresh start or from a checkpoint.

Data flows one way: prompts → rollout → rewards → advantages → objective → update → metrics and checkpoint. Every step
is a function of the run state, which holds all that a later process needs to go on bit for bit: parameters, optimizer,
PRNG key, data cursor and step counts.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rspo_jax.hosts import Agreement, Preemption, is_primary, say
from rspo_jax.records.alarm import Alarm
from rspo_jax.records.checkpoint import Checkpoints
from rspo_jax.records.compiling import CompileWatch
from rspo_jax.records.files import FilePath, as_path
from rspo_jax.records.lock import RunLock
from rspo_jax.records.metrics import MetricsLog, check_record, read_metrics
from rspo_jax.records.samples import Sample
from rspo_jax.records.trackers import check_trackers
from rspo_jax.rollouts import (
    Packing,
    ResponseLengths,
    UsableProblems,
    encode_solutions,
    pack,
    reward_names,
    with_solutions,
)
from rspo_jax.sharding import make_mesh
from rspo_jax.stopwatch import Stopwatch
from rspo_jax.training.config import check_learner, check_mesh
from rspo_jax.training.evaluation import evaluate
from rspo_jax.training.metrics import (
    StepMetrics,
    metrics_by_kind,
    rate_change,
    read_statistics,
    reduce_statistics,
    rollout_metrics,
    skipped_problems,
)
from rspo_jax.training.probe import probe_gradients
from rspo_jax.training.recorder import Recorder, Stopped
from rspo_jax.training.samples import sample_responses
from rspo_jax.training.stages import (
    Setup,
    adapt_shift,
    choose,
    draw,
    judge_drawing,
    pack_mini_batches,
    score_mini_batches,
    wants_more,
    with_advantages,
)
from rspo_jax.training.state import RunState, copy_params, first_state, init_train_state, state_on_mesh
from rspo_jax.training.update import route_to_device, supervised_update, update
from rspo_jax.types import Params, StepTask

__all__ = ["Setup", "Stopped", "train"]

PROGRAMS = {
    "supervised_update": "the warm-start update",
    "generate": "the sampler",
    "score": "the scoring pass",
    "update": "the update",
    "rescore": "the scoring of samples",
}
"""The programs that take long to compile: name of the jitted function -> what the progress display calls it."""


def train(setup: Setup, run_dir: FilePath, resume: bool = False, trackers: Sequence[str] = ()) -> tuple[Params, float]:
    """Run both phases to their end.

    Args:
      setup: the model, the problems and all settings.
      run_dir: a folder, or an address of `rspo_jax.records.files.as_path`; gets `metrics.jsonl`, `tensorboard/` and
        `checkpoints/`.
      resume: if True, go on from the newest checkpoint in `run_dir`, or start if there is none.
      trackers: names in `rspo_jax.records.trackers.TRACKERS`, which are shown the run beside TensorBoard.

    Returns:
      The final parameters, and the seconds that the run took.

    Raises:
      Stopped: after SIGTERM or SIGINT, once the state is saved.
      LockHeld: if another run is going on in the folder.
      LockLost: once another run has taken the folder over; nothing more is written then.
      DamagedRows: if a file of rows cannot be relied on.
      ValueError: if configs do not fit together, or a checkpoint does not fit the model.
    """
    problems, learner, config = setup.problems, setup.learner, setup.config
    check_learner(config, learner)
    check_trackers(trackers)
    finite = {"train": problems.train} | problems.held_out
    for name, split in finite.items():
        if isinstance(split, UsableProblems) and split.dropped:
            say(
                f"{name}: {split.dropped} of {split.dropped + len(split.problems)} problems are left out, because "
                f"their prompts have more than {config.max_prompt_tokens} tokens (max_prompt_tokens)"
            )
    mesh = make_mesh(config.mesh)
    check_mesh(config, learner, mesh, problems.width + setup.limits.tokens - 1)
    with (
        jax.set_mesh(mesh),
        Preemption() as preemption,
        RunLock(run_dir) as lock,
        Checkpoints(as_path(run_dir) / "checkpoints", config.checkpoint.keep, lock.check) as checkpoints,
        CompileWatch(PROGRAMS) as compiling,
    ):
        if resume:
            Agreement("record").from_primary(functools.partial(check_record, run_dir))
        # The state: from the newest sound checkpoint, or from the beginning.
        template = state_on_mesh(setup.policy, setup.init_params, config, mesh, learner.regularizers.needs_reference)
        restored = checkpoints.restore_newest(template, say=say) if resume else None
        state = (
            first_state(setup.init_params, setup.load_params(), config, template)
            if restored is None
            else restored.state
        )
        metadata: dict[str, Any] = {"elapsed_seconds": 0.0} if restored is None else restored.metadata
        if resume:
            say(f"going on after {int(state.warm_start_step)} warm-start steps and {int(state.step)} steps")
        last_row = ("rl", int(state.step)) if int(state.step) else ("warm_start", int(state.warm_start_step))
        with MetricsLog(run_dir, last_row if resume else None, metadata.get("digests"), lock.check, trackers) as log:
            rows = _earlier_rows(run_dir) if resume else []
            if change := rate_change(rows, config, state):
                say(change)
            elapsed = float(metadata["elapsed_seconds"])
            watch = Stopwatch(compiled=compiling.seconds)
            recorder = Recorder(log, checkpoints, preemption, _alarm_after(rows), compiling, watch, elapsed)
            state = _warm_start(setup, state, recorder)
            state = _reinforce(setup, state, recorder)
            return state.train.params, recorder.elapsed


def _earlier_rows(run_dir: FilePath) -> list[dict[str, Any]]:
    """Return the rows before a resumption, in the process that writes them; none in the others."""
    return read_metrics(run_dir) if is_primary() and (as_path(run_dir) / "metrics.jsonl").exists() else []


def _alarm_after(rows: list[dict[str, Any]]) -> Alarm:
    """Return an alarm that has seen the rows before a resumption, so that it does not ring for them again."""
    alarm = Alarm()
    for row in rows:
        alarm.update(row)
    return alarm


def _warm_start(setup: Setup, state: RunState, recorder: Recorder) -> RunState:
    """Imitate worked solutions, then hand over to reinforcement learning with a fresh optimizer."""
    config, warm_start, task, watch = setup.config, setup.config.warm_start, setup.problems.task, recorder.watch
    done = int(state.warm_start_step)
    if done >= warm_start.steps or int(state.step):
        return state
    response_width, packing = setup.limits.tokens, Packing(row_length=setup.learner.row_length)
    problems = with_solutions(task, setup.problems.train, config.sampler, setup.limits)
    with recorder.phase("warm_start", warm_start.steps, completed=done):
        for step in range(done + 1, warm_start.steps + 1):
            # Prompts and worked solutions, packed into rows.
            chosen, cursor = problems.take((config.seed, 0), int(state.cursor), warm_start.batch_size)
            solutions = encode_solutions(task, chosen, setup.problems.width, response_width)
            batch, padding = pack(solutions, response_width, np.arange(len(chosen)), packing)
            counted = {"response_tokens": int(jnp.sum(solutions.mask))}
            counted |= skipped_problems(problems, cursor - int(state.cursor) - len(chosen))
            watch.lap("other")
            # Update.
            optimizer = warm_start.decaying_optimizer
            train_state, statistics = supervised_update(setup.policy, optimizer, state.train, batch, config.mesh)
            state = state._replace(train=train_state, cursor=jnp.int32(cursor), warm_start_step=jnp.int32(step))
            numbers, _ = read_statistics([statistics])
            watch.lap("update")
            # End of the step: metrics, hand-over after the last one, checkpoint, stop.
            metrics = numbers | padding | counted | {"learning_rate": optimizer.learning_rate_at(step - 1)}
            recorder.write("warm_start", step, metrics)
            if step == warm_start.steps:
                train_state = init_train_state(state.train.params, config.decaying_optimizer)
                reference = None if state.reference is None else copy_params(train_state.params)
                state = state._replace(train=train_state, cursor=jnp.int32(0), reference=reference)
            stop = recorder.should_stop()
            if stop or step == warm_start.steps or step % config.checkpoint.every == 0:
                recorder.save(state)
            if stop:
                raise Stopped(stop)
    return state


def _reinforce(setup: Setup, state: RunState, recorder: Recorder) -> RunState:
    """Learn from the policy's own responses, one rollout a step."""
    config, learner, optimizer, done = setup.config, setup.learner, setup.config.decaying_optimizer, int(state.step)
    task, watch = setup.problems.task, recorder.watch
    names = reward_names(task)
    if done and done >= config.steps:
        return state
    with recorder.phase("rl", max(config.steps, 1), completed=done):
        if done == 0:
            metrics = evaluate(setup, state, final=True)
            watch.lap("evaluate")
            recorder.write("rl", 0, metrics)
        unwritten: StepMetrics | None = None
        for step in range(done + 1, config.steps + 1):
            if isinstance(task, StepTask):
                task.begin_step(step, config.steps)
            # Draw: the device starts on `group_size` responses to each of the next prompts.
            before = int(state.cursor)
            drawing, state = draw(setup, state)
            watch.lap("draw")
            # Meanwhile the host finishes the step before.
            if unwritten is not None:
                recorder.write("rl", unwritten.step, *unwritten.wait(watch), beside=drawing.first.chunks[0].tokens)
            # Judge the responses chunk by chunk, as they are ready; dynamic sampling may draw more of them.
            judged = [judge_drawing(setup, state, drawing, watch.lap)]
            while wants_more(judged, config):
                more, state = draw(setup, state)
                watch.lap("draw")
                judged.append(judge_drawing(setup, state, more, watch.lap))
            # Advantages: each response is compared with the others of its group.
            rollouts = [with_advantages(setup, one) for one in judged]
            # Choose the groups to learn from: those whose rewards differ first.
            rollout = choose(judged, rollouts, config)
            # Pack: cut the rollout into mini-batches at random, and their responses into rows.
            key, shuffle_key = jax.random.split(jax.random.wrap_key_data(state.key))
            mini_batches, padding = pack_mini_batches(setup, rollout, shuffle_key)
            # All that the host has to know of the updates, before the device is busy.
            epoch_keys = [jax.random.fold_in(shuffle_key, epoch) for epoch in range(config.epochs)]
            orders = [np.asarray(jax.random.permutation(epoch_key, config.mini_batches)) for epoch_key in epoch_keys]
            learning_rate = optimizer.learning_rate_at(int(state.train.updates))
            watch.lap("other")
            # Score: old log-probs and the old route, in the numerics of the loss.
            scored, of_scoring = score_mini_batches(setup, state, mini_batches)
            watch.lap("score")
            # Update on each mini-batch, in a new order each epoch.
            train, of_updates = state.train, []
            scale = state.shift_log_scale if learner.adaptive_shift.adapts else None
            for index in np.concatenate(orders):
                mini_batch = route_to_device(scored[index]) if learner.route_on_host else scored[index]
                train, shown = update(setup.policy, optimizer, train, mini_batch, learner, config.mesh, scale)
                of_updates.append(shown)
            # Adapt the scale of the router shift to what the updates have shown.
            state, scale_shown = adapt_shift(state, of_updates, learner)
            # Reduce their statistics before the device is told to draw again: what it is told last, it does last.
            reduced = reduce_statistics([*of_scoring, *of_updates, scale_shown])
            watch.lap("update")
            # End of the step: metrics, samples, probe, evaluation, checkpoint, stop.
            numbers = rollout_metrics(judged, config, names) | padding | {"learning_rate": learning_rate}
            numbers = ({**task.step_metrics()} if isinstance(task, StepTask) else {}) | numbers
            numbers |= metrics_by_kind(task, judged)
            numbers |= skipped_problems(setup.problems.train, int(state.cursor) - before - len(judged) * config.prompts)
            lengths = ResponseLengths(jnp.float32(numbers["response_length"]), jnp.float32(numbers["longest_response"]))
            key = jax.random.key_data(key)
            state = state._replace(train=train, key=key, step=state.step + 1, lengths=lengths)
            unwritten = StepMetrics(step, of_scoring, reduced, numbers)
            sampling, probing = config.leaves_samples(step), config.probes(step)
            judged, scored = judged if sampling else [], scored if sampling or probing else []
            del drawing, rollouts, rollout, mini_batches, mini_batch  # the device needs the memory
            last, stop = step == config.steps, recorder.should_stop()
            evaluating = last or step % config.evaluation.every == 0
            saving = last or stop or step % config.checkpoint.every == 0
            if evaluating or saving or sampling or probing:
                metrics, arrays = unwritten.wait(watch)
                samples: list[Sample] = []
                if sampling:
                    samples = sample_responses(setup, state, judged, scored)
                    watch.lap("write")
                if probing:
                    metrics |= probe_gradients(setup, state, scored)
                    watch.lap("probe")
                unwritten, judged, scored = None, [], []
                if evaluating:
                    metrics |= evaluate(setup, state, final=last)
                    watch.lap("evaluate")
                recorder.write("rl", step, metrics, arrays, samples)
                stop = recorder.should_stop()  # again, because an evaluation takes its time
            if saving or stop:
                recorder.save(state)
            if stop and not last:
                raise Stopped(stop)
    return state
