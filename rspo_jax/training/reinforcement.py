"""One step of reinforcement learning: prompts → rollout → rewards → advantages → scoring pass → updates.

`start_rollout` only starts the device's work, so that the host can finish the step before meanwhile; `learn` waits for
it and does the rest. Both are functions of the run state. This file must never know what a run leaves behind: metrics
files, checkpoints, evaluations.
"""

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rspo_jax.objectives import ADVANTAGES, OBJECTIVES, overlong_penalty
from rspo_jax.rollouts import (
    Judged,
    Packing,
    Prompts,
    ResponseLengths,
    SamplerConfig,
    assemble,
    encode_prompts,
    judge,
    pack,
    refilling_pays,
    sample_in_chunks,
    take,
)
from rspo_jax.routing import next_log_scale, records_route
from rspo_jax.sharding import constrain, fetch
from rspo_jax.statistics import Maximum, Statistic, reduce
from rspo_jax.training.config import TrainerConfig
from rspo_jax.training.probe import probe
from rspo_jax.training.state import RunState, sampling_params
from rspo_jax.training.update import LearnerConfig, OptimizerConfig, score, split_parts, to_device, to_host, update
from rspo_jax.types import Policy, RolloutBatch, ScoredBatch, Task

Batch = TypeVar("Batch")
_PROBE = 0x70726F62  # far from the small numbers by which other keys are made of the same one


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
    scored: list[ScoredBatch]
    """The mini-batches, for `probe_gradients`; none in a step that is not probed."""


def start_rollout(run: Run, state: RunState) -> tuple[Draws, RunState]:
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
        records_route(run.learner.routing),
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


class Learnable(NamedTuple):
    """A judged rollout."""

    rollout: RolloutBatch
    judged: Judged
    informative: np.ndarray
    """bool [prompts]: groups whose rewards differ."""
    overlong: np.ndarray
    """float32 [B]: what was added to the rewards for length."""
    refilled: bool


def learn(run: Run, state: RunState, draws: Draws) -> tuple[RunState, StepRecord]:
    """Rewards → advantages → scoring pass → mini-batches × epochs of updates."""
    config, learner = run.config, run.learner
    found = [_judged(run, draws)]
    while _more_is_wanted(found, config):
        again, state = start_rollout(run, state)
        found.append(_judged(run, again))
    rollout = _learned_rows(found, config)
    key, shuffle_key = jax.random.split(jax.random.wrap_key_data(state.key))
    scored, statistics, packing_metrics = _scored(run, state, rollout, shuffle_key)
    optimizer, train_state = config.decaying_optimizer, state.train
    scale = state.shift_log_scale if learner.adaptive_shift.adapts else None
    learning_rate = learning_rate_at(optimizer, int(train_state.updates))
    for epoch in range(config.epochs):
        for index in np.asarray(jax.random.permutation(jax.random.fold_in(shuffle_key, epoch), config.mini_batches)):
            mini_batch = to_device(scored[index]) if learner.route_on_host else scored[index]
            train_state, update_statistics = update(
                run.policy, optimizer, train_state, mini_batch, learner, config.mesh, scale
            )
            statistics.append(update_statistics)
    state, scale_metrics = _adapt(state, statistics, learner)
    statistics.append(scale_metrics)
    metrics = _rollout_metrics(found, config) | packing_metrics | {"learning_rate": learning_rate}
    lengths = ResponseLengths(jnp.float32(metrics["response_length"]), jnp.float32(metrics["longest_response"]))
    state = state._replace(train=train_state, key=jax.random.key_data(key), step=state.step + 1, lengths=lengths)
    step = int(state.step)
    return state, StepRecord(step, statistics, metrics, draws.started, scored if config.probes(step) else [])


def _scored(
    run: Run, state: RunState, rollout: RolloutBatch, key: jax.Array
) -> tuple[list[ScoredBatch], list[dict[str, Statistic]], dict[str, float]]:
    """The mini-batches of a rollout, cut at random and scored by the parameters of the state."""
    config, learner = run.config, run.learner
    order = np.asarray(jax.random.permutation(key, config.learned_rows))
    packing = Packing(config.mini_batches, learner.micro_batches, learner.row_length)
    batch, packing_metrics = pack(rollout, config.sampler.max_new_tokens, order, packing)
    scored, statistics = [], []
    for mini_batch in split_parts(batch, config.mini_batches):
        old, score_statistics = score(run.policy, state.train.params, mini_batch, learner, state.reference)
        scored.append(to_host(old) if learner.route_on_host else old)
        statistics.append(score_statistics)
    return scored, statistics, packing_metrics


def probe_gradients(run: Run, state: RunState, scored: list[ScoredBatch]) -> dict[str, float]:
    """What all objectives' gradients are at the end of a step (`rspo_jax.training.probe`).

    Draws a rollout for the step's prompts from its last parameters, with a key of its own. Nothing of the state
    changes.

    Args:
      run: it says how to draw and judge.
      state: after the step.
      scored: that of its record.

    Returns:
      The metrics.
    """
    config = run.config
    key, cut_key = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state.key), _PROBE))
    again = state._replace(key=jax.random.key_data(key), cursor=state.cursor - config.prompts)
    draws, _ = start_rollout(run, again)
    rollout = _learned_rows([_judged(run, draws)], config)
    fresh, *_ = _scored(run, state, rollout, cut_key)
    return probe(run.policy, state.train.params, scored, fresh, run.learner, config.mesh)


def _adapt(
    state: RunState, statistics: list[dict[str, Statistic]], learner: LearnerConfig
) -> tuple[RunState, dict[str, Statistic]]:
    """Sets the scale of the router shift for the next step, by what the updates of this one have recorded."""
    if not learner.adaptive_shift.adapts:
        return state, {}
    used = [
        {name: of_update[name] for name in ("drift_quantiles", "effective_sample_size")}
        for of_update in statistics
        if "drift_quantiles" in of_update
    ]
    if not used:
        raise ValueError("this model has no router whose shift could be adapted: leave adaptive_shift.rule at fixed")
    following = _next_log_scale(state.shift_log_scale, used, learner)
    shown: dict[str, Statistic] = {"shift_scale": Maximum(jnp.exp(state.shift_log_scale))}
    return state._replace(shift_log_scale=following), shown


@functools.partial(jax.jit, static_argnames="learner")
def _next_log_scale(log_scale: jax.Array, used: list[dict[str, Statistic]], learner: LearnerConfig) -> jax.Array:
    found = reduce(jax.tree.map(lambda *leaves: jnp.stack(leaves), *used))
    assert learner.gamma_min is not None
    return next_log_scale(
        log_scale, found["drift_quantiles"], found["effective_sample_size"], learner.gamma_min, learner.adaptive_shift
    )


def _judged(run: Run, draws: Draws) -> Learnable:
    """Waits for the responses, and says how good each is beside the others."""
    config = run.config
    judged = judge(run.task, draws.problems, draws.chunks)  # chunk by chunk, while the device draws the next
    rewards, overlong = jnp.asarray(judged.rewards), np.zeros_like(judged.rewards)
    if config.overlong_buffer:
        lengths = jnp.asarray(fetch(jnp.sum(draws.rollout.mask, axis=1)))
        penalty = overlong_penalty(lengths, config.sampler.max_new_tokens, config.overlong_buffer)
        rewards, overlong = rewards + penalty, np.asarray(penalty)
    rewards = rewards.reshape(-1, config.group_size)
    estimator = config.advantages or OBJECTIVES[run.learner.objective].advantages
    advantages = ADVANTAGES[estimator](rewards)
    informative = np.ptp(np.asarray(rewards), axis=1) > 0
    rollout = draws.rollout._replace(advantages=advantages.reshape(-1))
    return Learnable(rollout, judged, informative, overlong, draws.refilled)


def _wanted_groups(config: TrainerConfig) -> int:
    return config.learned_groups or config.prompts


def _more_is_wanted(found: list[Learnable], config: TrainerConfig) -> bool:
    if not config.dynamic_sampling or len(found) >= config.max_rollouts:
        return False
    return sum(int(one.informative.sum()) for one in found) < _wanted_groups(config)


def _learned_rows(found: list[Learnable], config: TrainerConfig) -> RolloutBatch:
    """The responses of the groups to learn from: those whose rewards differ first. Under dynamic sampling the others
    are masked out, and so count in no mean."""
    rollout, wanted = found[0].rollout, _wanted_groups(config)
    if config.learned_groups is None and not config.dynamic_sampling:
        return rollout
    informative = np.concatenate([one.informative for one in found])
    groups = np.argsort(~informative, kind="stable")[:wanted]
    rows = (groups[:, None] * config.group_size + np.arange(config.group_size)[None, :]).reshape(-1)
    rollout = _take_rows([one.rollout for one in found], rows)
    if not config.dynamic_sampling:
        return rollout
    return _mask_rows(rollout, np.repeat(informative[groups], config.group_size))


@jax.jit
def _take_rows(batches: list[Batch], rows: ArrayLike) -> Batch:
    def take_from(first: jax.Array, *others: jax.Array) -> jax.Array:
        leaf = jnp.concatenate([first, *others]) if others else first
        return constrain(leaf[rows], "rows", *(None,) * (leaf.ndim - 1))

    return jax.tree.map(take_from, *batches)


@jax.jit
def _mask_rows(rollout: RolloutBatch, kept: ArrayLike) -> RolloutBatch:
    return rollout._replace(mask=rollout.mask & jnp.asarray(kept)[:, None])


def _rollout_metrics(found: list[Learnable], config: TrainerConfig) -> dict[str, float]:
    judged, wanted = [one.judged for one in found], _wanted_groups(config)
    informative = np.concatenate([one.informative for one in found])
    lengths = np.concatenate([fetch(jnp.sum(one.rollout.mask, axis=1)) for one in found])
    metrics = {
        "reward": np.concatenate([one.rewards for one in judged]).mean(),
        "solve_rate": np.concatenate([one.correct for one in judged]).mean(),
        "truncated_fraction": np.concatenate([one.truncated for one in judged]).mean(),
        "unjudged": np.concatenate([one.unjudged for one in judged]).sum(),
        "response_length": lengths.mean(),
        "longest_response": lengths.max(),
        "response_tokens": lengths.sum(),
        "refilled": any(one.refilled for one in found),
        "informative_groups": informative.mean(),
        "unlearned_informative_groups": max(0, int(informative.sum()) - wanted) / config.prompts,
    }
    if config.dynamic_sampling:
        metrics["rollouts"] = len(found)
        metrics["dropped_groups"] = max(0, wanted - int(informative.sum()))
    if config.overlong_buffer:
        metrics["overlong_penalty"] = np.concatenate([one.overlong for one in found]).mean()
    return {name: float(value) for name, value in metrics.items()}


def learning_rate_at(optimizer: OptimizerConfig, updates: int) -> float:
    return float(np.asarray(optimizer.schedule()(updates)))
