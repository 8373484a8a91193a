"""The metrics of a step: what the host counted, and what the statistics from the device come to."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rspo_jax.routing import numbers_and_arrays
from rspo_jax.statistics import Statistic, reduce
from rspo_jax.training.config import TrainerConfig
from rspo_jax.training.stages import JudgedRollout
from rspo_jax.types import Array

Numbers = dict[str, float]
Arrays = dict[str, np.ndarray]


class StepMetrics(NamedTuple):
    """The metrics of a step, of which the statistics may still be on their way from the device."""

    step: int
    statistics: list[dict[str, Statistic]]
    numbers: Numbers
    """Metrics that the host knows already."""
    started: float
    """Time at which the step began, in seconds of `time.monotonic`."""

    def wait(self) -> tuple[Numbers, Arrays]:
        """Wait for the statistics and join them with the host's numbers: numbers and arrays by name."""
        numbers, arrays = read_statistics(self.statistics)
        return numbers | self.numbers | speed(self.started, int(self.numbers["response_tokens"])), arrays


def read_statistics(statistics: list[dict[str, Statistic]]) -> tuple[Numbers, Arrays]:
    """Wait for the statistics of several programs, and reduce each name over all of them.

    Returns:
      Numbers and arrays by name, with those derived from them (`rspo_jax.routing.diagnostics`).
    """
    by_name: dict[str, list[Statistic]] = {}
    for of_program in statistics:
        for name, statistic in of_program.items():
            by_name.setdefault(name, []).append(statistic)
    return numbers_and_arrays(jax.device_get(_reduce_stacked(by_name)))


@jax.jit
def _reduce_stacked(by_name: dict[str, list[Any]]) -> dict[str, Array]:
    return reduce({name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts) for name, parts in by_name.items()})


def rollout_metrics(judged: list[JudgedRollout], config: TrainerConfig) -> Numbers:
    """Return the metrics of all responses drawn in a step: rewards, verdicts, lengths and informative groups."""
    verdicts, wanted = [one.judged for one in judged], config.wanted_groups
    informative = np.concatenate([one.informative for one in judged])
    lengths = np.concatenate([one.lengths for one in verdicts])
    metrics = {
        "reward": np.concatenate([one.rewards for one in verdicts]).mean(),
        "solve_rate": np.concatenate([one.correct for one in verdicts]).mean(),
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
    if config.dynamic_sampling:
        metrics["rollouts"] = len(judged)
        metrics["dropped_groups"] = max(0, wanted - int(informative.sum()))
    if config.overlong_buffer:
        metrics["overlong_penalty"] = np.concatenate([one.overlong for one in judged]).mean()
    return {name: float(value) for name, value in metrics.items()}


def speed(started: float, tokens: int) -> Numbers:
    """Return the seconds since `started`, and response tokens per second."""
    seconds = time.monotonic() - started
    return {"step_seconds": seconds, "tokens_per_second": tokens / seconds}
