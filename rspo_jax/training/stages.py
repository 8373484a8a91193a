"""The stages of a training step around its updates: draw, judge, advantages, choose groups, pack, score; adapt.

Each is a function of the setup of the run and its state. The training loop and the gradient probe go through them in
this order.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rspo_jax.objectives import ADVANTAGES, OBJECTIVES, overlong_penalty
from rspo_jax.rollouts import (
    FirstTurns,
    Judged,
    Limits,
    Packing,
    Problems,
    assemble,
    choose_groups,
    converse,
    cut,
    encode_prompts,
    is_informative,
    judge,
    limits_of,
    mask_rows,
    pack,
    refilling_pays,
    sample_in_chunks,
)
from rspo_jax.routing import next_log_scale, records_route
from rspo_jax.statistics import Maximum, Statistic, reduce
from rspo_jax.stopwatch import Lap, unmeasured
from rspo_jax.training.config import LearnerConfig, TrainerConfig
from rspo_jax.training.state import RunState, sampling_params
from rspo_jax.training.update import route_to_host, score, split_parts
from rspo_jax.types import Array, ConversationTask, PackedBatch, Params, Policy, RolloutBatch, ScoredBatch


@dataclass(frozen=True)
class Setup:
    """Everything that stays the same over a run."""

    policy: Policy
    init_params: Callable[[Array], Params]
    """Makes the model's parameters from a PRNG key."""
    problems: Problems
    """The task and its problems, from `rspo_jax.rollouts.load_problems(task, config.max_prompt_tokens)`."""
    learner: LearnerConfig
    """Objective, penalties and routing."""
    config: TrainerConfig
    """Everything else."""
    load_params: Callable[[], Params | None] = lambda: None
    """Returns the parameters to begin with, of the shapes of `init_params`, on the mesh in use; None for fresh ones. A
    run that goes on does not call it."""

    @property
    def limits(self) -> Limits:
        """The turns and tokens of a response.

        Raises:
          ValueError: if the config's limits do not fit together or to the task.
        """
        return limits_of(self.problems.task, self.config.sampler, self.config.conversation)


class Drawing(NamedTuple):
    """Responses that the device may still be drawing."""

    problems: list[Any]
    """One a row: each problem `group_size` times."""
    first: FirstTurns
    """The responses; of conversations, the first turns."""
    refilled: bool
    """True if free slots took the next prompt."""


class JudgedRollout(NamedTuple):
    """A rollout with its verdicts."""

    rollout: RolloutBatch
    judged: Judged
    rewards: jax.Array
    """float32 [prompts, group], the penalty for length included."""
    overlong: np.ndarray
    """float32 [B]: the part of each reward that is a penalty for length."""
    refilled: bool
    """True if free slots took the next prompt."""
    problems: list[Any]
    """One a row."""

    @property
    def valid(self) -> np.ndarray | None:
        """bool [prompts, group]: responses that count. None if all of them do."""
        return ~self.judged.left_out.reshape(self.rewards.shape) if self.judged.left_out.any() else None

    @property
    def informative(self) -> np.ndarray:
        """bool [prompts]: groups whose rewards differ."""
        return is_informative(np.asarray(self.rewards), self.valid)


def draw(setup: Setup, state: RunState) -> tuple[Drawing, RunState]:
    """Start to draw `group_size` responses to each of the next prompts, without waiting for the device."""
    config, task = setup.config, setup.problems.task
    key, sample_key = jax.random.split(jax.random.wrap_key_data(state.key))
    problems, cursor = setup.problems.train.take((config.seed, 1), int(state.cursor), config.prompts)
    prompts = encode_prompts(task, problems, setup.problems.width, repeats=config.group_size)
    # Fewer slots than responses: refill them if the last rollout says that this is faster, else draw batch after batch.
    chunks, sampler, refilled = config.rollout_chunks, config.sampler, False
    if sampler.slots is not None and sampler.slots < config.rollout_rows // chunks:
        # Conversations are drawn turn by turn, and free slots wait for the next turn.
        if not isinstance(task, ConversationTask):
            refilled = refilling_pays(float(jnp.sum(prompts.mask) / prompts.mask.shape[0]), state.lengths)
        chunks = chunks if refilled else config.rollout_rows // sampler.slots
    keys = jax.random.split(sample_key, prompts.tokens.shape[0])
    samples = sample_in_chunks(
        setup.policy,
        sampling_params(setup.policy, state.train.params, config),
        prompts,
        keys,
        sampler,
        task.tokenizer,
        chunks,
        config.group_size,
        records_route(setup.learner.routing),
    )
    repeated = [problem for problem in problems for _ in range(config.group_size)]
    state = state._replace(key=jax.random.key_data(key), cursor=jnp.int32(cursor))
    return Drawing(repeated, FirstTurns(prompts, keys, samples), refilled), state


def judge_drawing(setup: Setup, state: RunState, drawing: Drawing, lap: Lap = unmeasured) -> JudgedRollout:
    """Wait for the responses chunk by chunk, going on with conversations to their ends, and reward each.

    Args:
      setup: of the run.
      state: holds the parameters that the drawing began with.
      drawing: from `draw`.
      lap: measures both.
    """
    config, task, prompts = setup.config, setup.problems.task, drawing.first.prompts
    if isinstance(task, ConversationTask):
        params = sampling_params(setup.policy, state.train.params, config)
        conversing = converse(setup.policy, params, task, drawing.problems, drawing.first, config.sampler, setup.limits)
        to_judge, conversations = itertools.tee(conversing)
        judged = judge(task, drawing.problems, to_judge, lap)
        rollout = assemble(prompts, [chunk.samples for chunk in conversations])
    else:
        rollout = assemble(prompts, drawing.first.chunks)
        judged = judge(task, drawing.problems, drawing.first.chunks, lap)
        if getattr(task.tokenizer, "stop_strings", ()):
            rollout = cut(rollout, judged.lengths)
    rewards, overlong = jnp.asarray(judged.rewards), np.zeros_like(judged.rewards)
    if config.overlong_buffer:
        lengths = jnp.asarray(judged.lengths if judged.turns is None else judged.turns.tokens)
        penalty = overlong_penalty(lengths, setup.limits.tokens, config.overlong_buffer)
        rewards, overlong = rewards + penalty, np.asarray(penalty)
    rewards = rewards.reshape(-1, config.group_size)
    lap("judge")
    return JudgedRollout(rollout, judged, rewards, overlong, drawing.refilled, drawing.problems)


def wants_more(judged: list[JudgedRollout], config: TrainerConfig) -> bool:
    """Return whether dynamic sampling draws another rollout: too few groups have rewards that differ so far."""
    if not config.dynamic_sampling or len(judged) >= config.max_rollouts:
        return False
    return sum(int(one.informative.sum()) for one in judged) < config.wanted_groups


def with_advantages(setup: Setup, judged: JudgedRollout) -> RolloutBatch:
    """Compare each response with others, by the estimator of the configuration or of the objective's source.

    Responses that were cut off are compared too, also where `mask_truncated` then takes them out of the mask. Those
    that no reward applies to are neither compared nor in the mask.
    """
    estimator = setup.config.advantages or OBJECTIVES[setup.learner.objective].advantages
    valid = None if judged.valid is None else jnp.asarray(judged.valid)
    advantages = ADVANTAGES[estimator](judged.rewards, valid=valid).reshape(-1)
    rollout, kept = judged.rollout._replace(advantages=advantages), ~judged.judged.left_out
    if setup.config.mask_truncated:
        kept &= ~judged.judged.truncated
    return rollout if kept.all() else mask_rows(rollout, kept)


def choose(judged: list[JudgedRollout], rollouts: list[RolloutBatch], config: TrainerConfig) -> RolloutBatch:
    """Return the responses to learn from: all of them, or the groups whose rewards differ first."""
    if config.learned_groups is None and not config.dynamic_sampling:
        return rollouts[0]
    informative = np.concatenate([one.informative for one in judged])
    return choose_groups(rollouts, informative, config.wanted_groups, only_informative=config.dynamic_sampling)


def pack_mini_batches(
    setup: Setup, rollout: RolloutBatch, key: jax.Array
) -> tuple[list[PackedBatch], dict[str, float]]:
    """Cut a rollout into mini-batches at random, and pack each into rows; also return the share of padding."""
    config, learner = setup.config, setup.learner
    order = np.asarray(jax.random.permutation(key, config.learned_rows))
    packing = Packing(config.mini_batches, learner.micro_batches, learner.row_length)
    batch, metrics = pack(rollout, setup.limits.tokens, order, packing)
    return split_parts(batch, config.mini_batches), metrics


def score_mini_batches(
    setup: Setup, state: RunState, mini_batches: list[PackedBatch]
) -> tuple[list[ScoredBatch], list[dict[str, Statistic]]]:
    """Score the mini-batches with the parameters of the state, which are those that drew them."""
    scored, statistics = [], []
    for mini_batch in mini_batches:
        old, of_mini_batch = score(setup.policy, state.train.params, mini_batch, setup.learner, state.reference)
        scored.append(route_to_host(old) if setup.learner.route_on_host else old)
        statistics.append(of_mini_batch)
    return scored, statistics


def adapt_shift(
    state: RunState, statistics: list[dict[str, Statistic]], learner: LearnerConfig
) -> tuple[RunState, dict[str, Statistic]]:
    """Set the scale of an adaptive router shift for the next step, by what the updates of this one have shown.

    Args:
      state: holds the scale of this step.
      statistics: those of the updates are used.
      learner: names the rule; nothing changes under the rule "fixed".

    Returns:
      The state with the next scale, and the metric `shift_scale` of this step.

    Raises:
      ValueError: if the model has no router.
    """
    if not learner.adaptive_shift.adapts:
        return state, {}
    used = [
        {name: shown[name] for name in ("drift_quantiles", "effective_sample_size")}
        for shown in statistics
        if "drift_quantiles" in shown
    ]
    if not used:
        raise ValueError("this model has no router whose shift could be adapted: leave adaptive_shift.rule at fixed")
    scale: dict[str, Statistic] = {"shift_scale": Maximum(jnp.exp(state.shift_log_scale))}
    return state._replace(shift_log_scale=_next_log_scale(state.shift_log_scale, used, learner)), scale


@functools.partial(jax.jit, static_argnames="learner")
def _next_log_scale(log_scale: jax.Array, used: list[dict[str, Statistic]], learner: LearnerConfig) -> jax.Array:
    found = reduce(jax.tree.map(lambda *leaves: jnp.stack(leaves), *used))
    assert learner.gamma_min is not None
    return next_log_scale(
        log_scale, found["drift_quantiles"], found["effective_sample_size"], learner.gamma_min, learner.adaptive_shift
    )
