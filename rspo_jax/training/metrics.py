"""The metrics of a step: what the host counted, and what the statistics from the device come to."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rspo_jax.rollouts import UsableProblems, UsableStream
from rspo_jax.routing import numbers_and_arrays
from rspo_jax.statistics import Statistic, reduce
from rspo_jax.stopwatch import Stopwatch
from rspo_jax.training.config import TrainerConfig
from rspo_jax.training.stages import JudgedRollout
from rspo_jax.training.state import RunState
from rspo_jax.types import Array, KindsTask, Task

Numbers = dict[str, float]
Arrays = dict[str, np.ndarray]


class StepMetrics(NamedTuple):
    """The metrics of a step, of which the statistics may still be on their way from the device."""

    step: int
    of_scoring: list[dict[str, Statistic]]
    """Statistics of the scoring pass, which the device makes before the updates."""
    reduced: dict[str, Array]
    """All statistics, reduced."""
    numbers: Numbers
    """Metrics that the host knows already."""

    def wait(self, watch: Stopwatch) -> tuple[Numbers, Arrays]:
        """Wait for the statistics and join them with the host's numbers: numbers and arrays by name."""
        jax.block_until_ready(self.of_scoring)
        watch.lap("score")
        numbers, arrays = numbers_and_arrays(jax.device_get(self.reduced))
        watch.lap("update")
        return numbers | self.numbers, arrays


def read_statistics(statistics: list[dict[str, Statistic]]) -> tuple[Numbers, Arrays]:
    """Wait for the statistics of several programs, and reduce each name over all of them.

    Returns:
      Numbers and arrays by name, with those derived from them (`rspo_jax.routing.diagnostics`).
    """
    return numbers_and_arrays(jax.device_get(reduce_statistics(statistics)))


def reduce_statistics(statistics: list[dict[str, Statistic]]) -> dict[str, Array]:
    """Reduce each name over the statistics of several programs, without waiting for any of them."""
    by_name: dict[str, list[Statistic]] = {}
    for of_program in statistics:
        for name, statistic in of_program.items():
            by_name.setdefault(name, []).append(statistic)
    return _reduce_stacked(by_name)


@jax.jit
def _reduce_stacked(by_name: dict[str, list[Any]]) -> dict[str, Array]:
    return reduce({name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts) for name, parts in by_name.items()})


def rollout_metrics(judged: list[JudgedRollout], config: TrainerConfig, names: Sequence[str] = ()) -> Numbers:
    """Return the metrics of all responses drawn in a step: rewards, verdicts, lengths and informative groups.

    Args:
      judged: the rollouts of the step.
      config: the trainer's settings.
      names: those of the task's rewards. Each has the mean and the spread of its values, and the share of responses
        that it gave none.
    """
    verdicts, wanted = [one.judged for one in judged], config.wanted_groups
    informative = np.concatenate([one.informative for one in judged])
    lengths = np.concatenate([one.lengths for one in verdicts])
    counted = ~np.concatenate([one.left_out for one in verdicts])
    correct = [one.correct for one in verdicts if one.correct is not None]
    metrics = {
        "reward": mean_of(np.concatenate([one.rewards for one in verdicts])[counted]),
        **({"solve_rate": mean_of(np.concatenate(correct)[counted])} if correct else {}),
        "truncated_fraction": np.concatenate([one.truncated for one in verdicts]).mean(),
        "unjudged": np.concatenate([one.unjudged for one in verdicts]).sum(),
        "unmarked": np.concatenate([one.unmarked for one in verdicts]).sum(),
        "response_length": lengths.mean(),
        "longest_response": lengths.max(),
        "response_tokens": lengths.sum(),
        "refilled": any(one.refilled for one in judged),
        "informative_groups": informative.mean(),
        "unlearned_informative_groups": max(0, int(informative.sum()) - wanted) / config.prompts,
    }
    if names or not counted.all():
        metrics["left_out"] = (~counted).sum()
    for name, values in zip(names, np.concatenate([one.parts for one in verdicts]).T, strict=True):
        given = values[np.isfinite(values)]
        metrics[f"rewards/{name}/mean"] = mean_of(given)
        metrics[f"rewards/{name}/std"] = given.std() if given.size else math.nan
        metrics[f"rewards/{name}/none"] = 1 - given.size / values.size
    turns = [one.turns for one in verdicts if one.turns is not None]
    if turns:
        metrics["turns"] = np.concatenate([one.counts for one in turns]).mean()
        metrics["conversation_length"] = np.concatenate([one.tokens for one in turns]).mean()
        metrics["turn_limited_fraction"] = np.concatenate([one.turn_limited for one in turns]).mean()
        metrics["token_limited_fraction"] = np.concatenate([one.token_limited for one in turns]).mean()
    if config.dynamic_sampling:
        metrics["rollouts"] = len(judged)
        metrics["dropped_groups"] = max(0, wanted - int(informative.sum()))
    if config.mask_truncated:
        metrics["masked_truncated"] = np.concatenate([one.truncated for one in verdicts]).sum()
    if config.overlong_buffer:
        metrics["overlong_penalty"] = np.concatenate([one.overlong for one in judged]).mean()
    return {name: float(value) for name, value in metrics.items()}


def mean_of(values: np.ndarray) -> Any:
    """Return the mean of some values; NaN without any."""
    return values.mean() if values.size else math.nan


def metrics_by_kind(task: Task, judged: list[JudgedRollout]) -> Numbers:
    """Return mean reward and solve rate of each kind of problems; none for a task that tells no kinds apart."""
    if not isinstance(task, KindsTask):
        return {}
    verdicts = [one.judged for one in judged]
    counted = ~np.concatenate([one.left_out for one in verdicts])
    kinds = np.array([task.kind(problem) for one in judged for problem in one.problems])[counted]
    metrics = mean_by_kind("reward", kinds, np.concatenate([one.rewards for one in verdicts])[counted])
    correct = [one.correct for one in verdicts if one.correct is not None]
    return metrics | (mean_by_kind("solve_rate", kinds, np.concatenate(correct)[counted]) if correct else {})


def mean_by_kind(name: str, kinds: np.ndarray, values: np.ndarray) -> Numbers:
    """Return the metrics `kinds/KIND/name`: the mean of the values [B] over the responses to problems of each kind.

    Args:
      name: of the values.
      kinds: of the problem of each response, str [B].
      values: one a response.
    """
    return {f"kinds/{kind}/{name}": float(values[kinds == kind].mean()) for kind in sorted(set(kinds.tolist()))}


def skipped_problems(problems: UsableProblems | UsableStream, skipped: int) -> Numbers:
    """Return the metric of the problems that a step has skipped, which only a stream has."""
    return {"skipped_problems": float(skipped)} if isinstance(problems, UsableStream) else {}


def rate_change(rows: Sequence[Mapping[str, Any]], config: TrainerConfig, state: RunState) -> str:
    """Return in words how the learning rate of a resumed run leaves its course, because its schedule was changed.

    Args:
      rows: the rows of the run so far, from `metrics.jsonl`.
      config: the trainer's settings from now on.
      state: the state that the run goes on from.

    Returns:
      The rate of the last step and that of the next one; empty if the present schedule had the same rate in the last
      step, or if there is no next one.
    """
    if step := int(state.step):
        phase, steps, optimizer = "rl", config.steps, config.decaying_optimizer
    else:
        phase, step, steps = "warm_start", int(state.warm_start_step), config.warm_start.steps
        optimizer = config.warm_start.decaying_optimizer
    row = next((row for row in reversed(rows) if (row["phase"], row["step"]) == (phase, step)), {})
    if step >= steps or "learning_rate" not in row:
        return ""
    # A row has the rate of the first update of its step.
    next_update, first = step, step - 1
    if phase == "rl":
        next_update = int(state.train.updates)
        first = max(0, next_update - config.epochs * config.mini_batches + int(row.get("skipped_updates", 0)))
    before, same = row["learning_rate"], optimizer.learning_rate_at(first)
    if math.isclose(before, same, rel_tol=1e-6):
        return ""
    after = optimizer.learning_rate_at(next_update)
    decay = "is constant" if optimizer.decay_updates is None else f"decays over {optimizer.decay_updates} updates"
    return (
        f"the learning rate was {before:.3g} in the last step and is {after:.3g} in the next one: its schedule has "
        f"changed and now {decay}"
    )
