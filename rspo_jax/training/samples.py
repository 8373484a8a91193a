"""Sample responses of a step: texts, rewards, and how far the routers moved on each token.

They come from the first mini-batch of the step, a random part of the rollout, and cost one forward pass over a few rows
at the parameters after the step. Groups with different rewards come first, each with its best and its worst response.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rspo_jax.records.samples import Sample
from rspo_jax.rollouts import chosen_rows, reward_names, text_pieces, unpack
from rspo_jax.sharding import constrain, fetch, parts_of
from rspo_jax.training.stages import JudgedRollout, Setup
from rspo_jax.training.state import RunState
from rspo_jax.training.update import rescore, route_to_device
from rspo_jax.types import Array, PackedRows, ScoredBatch


def sample_responses(
    setup: Setup, state: RunState, judged: list[JudgedRollout], scored: list[ScoredBatch]
) -> list[Sample]:
    """Return some of the responses that a step has learned from; the state does not change.

    Args:
      setup: of the run.
      state: the state after the last update of the step.
      judged: the rollouts of the step.
      scored: its mini-batches, with the old policy's log-probabilities and route.

    Returns:
      At most `samples.count` responses, in every process.
    """
    config, mini_batch = setup.config, scored[0]
    # Which responses of all that were drawn the mini-batch holds, and which of these to show.
    assert mini_batch.batch.responses is not None
    packed = fetch(mini_batch.batch.responses)
    drawn = np.arange(sum(len(one.problems) for one in judged))
    if config.learned_groups is not None or config.dynamic_sampling:
        informative = np.concatenate([one.informative for one in judged])
        drawn = chosen_rows(informative, config.wanted_groups, config.group_size)
    drawn = drawn[packed.reshape(-1)]
    rewards = np.concatenate([np.asarray(one.rewards).reshape(-1) for one in judged])
    left_out = np.concatenate([one.judged.left_out for one in judged])
    shown = show_first(rewards[drawn], drawn // config.group_size, left_out[drawn])[: config.samples.count]
    # A batch of their rows alone, of a size that the mesh can share: the last one stands for those that are missing.
    size = -(-config.samples.count // parts_of("rows")) * parts_of("rows")
    filled = np.pad(shown, (0, size - len(shown)), mode="edge")
    mini_batch = route_to_device(mini_batch) if setup.learner.route_on_host else mini_batch
    batch = _take(mini_batch, *np.divmod(filled, packed.shape[1]))
    log_probs, gamma = rescore(setup.policy, state.train.params, batch, setup.learner)
    fetched = jax.tree.map(fetch, (batch, log_probs, gamma, _targets(batch)))
    return _read(setup, judged, drawn[shown], rewards, fetched)


def _read(
    setup: Setup,
    judged: list[JudgedRollout],
    rows: np.ndarray,
    rewards: np.ndarray,
    fetched: Any,
) -> list[Sample]:
    """Return the samples with their texts and verdicts.

    Args:
      setup: of the run.
      judged: the rollouts of the step.
      rows: int [n], the responses to show, counted through all rollouts.
      rewards: float [B], those of all responses.
      fetched: NumPy arrays of the batch of these responses, their log-probabilities and γ after the step, and tokens.
    """
    batch, log_probs, gamma, tokens = fetched
    task, names = setup.problems.task, reward_names(setup.problems.task)
    problems = [problem for one in judged for problem in one.problems]
    lengths, truncated, parts = (
        np.concatenate([getattr(one.judged, name) for one in judged]) for name in ("lengths", "truncated", "parts")
    )
    left_out = np.concatenate([one.judged.left_out for one in judged])
    correct = np.concatenate([one.judged.correct for one in judged if one.judged.correct is not None] or [[]])
    # Of a conversation: all tokens, and which of them the model drew.
    said: np.ndarray | None = None
    turns = [one.judged.turns for one in judged if one.judged.turns is not None]
    if turns:
        lengths = np.concatenate([one.tokens for one in turns])
        said = fetch(_rows_of([one.rollout.mask for one in judged], rows))[:, -setup.limits.tokens :]
    samples = []
    for index, row in enumerate(rows):
        own = slice(lengths[row])
        ids = tokens[0, index, own].tolist()
        drawn_here = np.ones(len(ids), bool) if said is None else said[index, own]
        samples.append(
            Sample(
                prompt=task.prompt(problems[row]),
                response=task.tokenizer.decode(ids),
                reward=float(rewards[row]),
                rewards=dict(zip(names, parts[row].tolist(), strict=True)),
                correct=bool(correct[row]) if len(correct) else None,
                truncated=bool(truncated[row]),
                left_out=bool(left_out[row]),
                advantage=float(batch.batch.advantages[0, index]),
                token_ids=ids,
                tokens=text_pieces(task.tokenizer.decode, ids),
                old_log_probs=_where(drawn_here, batch.old_log_probs[0, index, own]),
                log_probs=_where(drawn_here, log_probs[0, index, own]),
                gamma=None if gamma is None else _where(drawn_here, gamma[0, index, own]),
                environment=None if said is None else (~drawn_here).tolist(),
            )
        )
    return samples


@jax.jit
def _rows_of(masks: list[Array], rows: Any) -> Array:
    return jnp.concatenate(masks)[rows]


def _where(drawn: np.ndarray, values: Any) -> list[float | None]:
    """Return values of tokens, None for those that the model did not draw."""
    return [value if own else None for own, value in zip(drawn.tolist(), values.tolist(), strict=True)]


def show_first(rewards: np.ndarray, groups: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """Return the order in which responses are shown: int [B], positions.

    The best and the worst response of each group whose rewards differ come first, then one of each other group, then
    the rest, and last those that no reward applied to; equals stay in their order.

    Args:
      rewards: float [B].
      groups: int [B], the group of each response.
      left_out: bool [B]: True for a response that no reward applied to.
    """
    rank = np.where(left_out, 3, 2)
    for group in np.unique(groups[~left_out]):
        members = np.flatnonzero((groups == group) & ~left_out)
        best, worst = members[np.argmax(rewards[members])], members[np.argmin(rewards[members])]
        rank[[best, worst]] = 0 if rewards[best] > rewards[worst] else 1
    return np.lexsort((-rewards, groups, rank))


@jax.jit
def _take(mini_batch: ScoredBatch, parts: Any, responses: Any) -> ScoredBatch:
    """Return some responses of a mini-batch as a batch of one part, each with a copy of the row that it is packed into.

    Args:
      mini_batch: [parts, ...].
      parts: int [n], the part of each response.
      responses: int [n], its place in the part.
    """
    batch = mini_batch.batch
    length = batch.rows.inputs.shape[-1]
    rows, columns = jnp.divmod(batch.places[parts, responses], length)

    def of_rows(leaf: Array) -> Array:
        taken = leaf[parts, rows[:, 0]]
        return constrain(taken, "rows", *(None,) * (taken.ndim - 1))

    def of_responses(leaf: Array) -> Array:
        taken = leaf[parts, responses]
        return constrain(taken, "rows", *(None,) * (taken.ndim - 1))

    places = columns + length * jnp.arange(len(parts), dtype=jnp.int32)[:, None]
    taken = jax.tree.map(of_responses, mini_batch._replace(batch=batch._replace(rows=None), old_route=None))
    taken = taken._replace(
        batch=taken.batch._replace(rows=PackedRows(*map(of_rows, batch.rows)), places=places),
        old_route=jax.tree.map(of_rows, mini_batch.old_route),
    )
    return jax.tree.map(lambda leaf: leaf[None], taken)


@jax.jit
def _targets(batch: ScoredBatch) -> Array:
    """Return the response tokens of each part, int32 [parts, B, T]."""
    return jax.vmap(unpack)(batch.batch.rows.targets, batch.batch.places)
