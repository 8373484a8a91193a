"""Sample responses of a run, each with the router shift of its tokens: one JSON object a response in `samples.jsonl`.

A line is `{"phase": "rl", "step": 25, "prompt": "…", "response": "…", "reward": 1.0, …}`, with the fields of `Sample`;
a step has several lines. The file grows and is rolled back with the run's other rows (`rspo_jax.records.metrics`).
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rspo_jax.records.files import FilePath, as_path
from rspo_jax.records.rows import POSITION_NAMES, read_rows

SAMPLES_FILE = "samples.jsonl"
_SIGNIFICANT_DIGITS = 6


@dataclass(frozen=True)
class Sample:
    """One response that a step learned from."""

    prompt: str
    """All that the model read before it answered, chat markup included."""
    response: str
    """The text of all tokens after the prompt."""
    reward: float
    """Total reward, a penalty for length included."""
    correct: bool | None
    """None if the task does not say which responses are correct."""
    truncated: bool
    """True if the response was cut off at the limit of tokens."""
    advantage: float
    token_ids: list[int]
    """Ids of the tokens after the prompt."""
    tokens: list[str]
    """Their texts, which join to `response`. A token that ends in the middle of a character has an empty text, and the
    one that completes the character has all of it; so has a special token."""
    old_log_probs: list[float | None]
    """Log-probability of each token under the policy that drew it, in the numerics of the loss."""
    log_probs: list[float | None]
    """Log-probability of each token after the step."""
    gamma: list[float | None] | None = None
    """Router shift γ of each token over the whole step: the routers after its last update against the old route. It is
    the raw ratio of `rspo_jax.router_shift`, before the objective's floor and an adaptive scale. None for a model
    without routers."""
    rewards: dict[str, float | None] = dataclasses.field(default_factory=dict)
    """The rewards that the total is made of, by name; None for one that did not apply. Empty if the task has no names
    for them."""
    left_out: bool = False
    """True if no reward applied to the response, which then counted for nothing."""
    environment: list[bool] | None = None
    """True for tokens that the environment of a conversation said; None if the model said all of them."""

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            if not _FITS[option.name](getattr(self, option.name)):
                raise TypeError(f"{option.name} of a sample cannot be {getattr(self, option.name)!r}")
        lengths = {
            name: len(values)
            for name in ("token_ids", "tokens", "old_log_probs", "log_probs", "gamma", "environment")
            if (values := getattr(self, name)) is not None
        }
        if len(set(lengths.values())) != 1:
            raise ValueError(f"the lists of a sample differ in length: {lengths}")
        if "".join(self.tokens) != self.response:
            raise ValueError("the tokens of a sample do not join to its response")

    def row(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them: floats of six significant digits, None for non-finite ones."""
        return {name: _rounded(value) for name, value in dataclasses.asdict(self).items()}


def read_samples(run_dir: FilePath) -> dict[int, list[Sample]]:
    """Read the sample responses of a run.

    Args:
      run_dir: the run's folder, or its address in a bucket.

    Returns:
      Step -> the samples of that step, in the order written; empty for a run that recorded none.

    Raises:
      DamagedRows: if a line is not a sample, except for a last line that was cut while it was written.
    """
    path = as_path(run_dir) / SAMPLES_FILE
    by_step: dict[int, list[Sample]] = {}
    for _, row in read_rows(path, sample_of, several=True) if path.is_file() else []:
        values = {name: value for name, value in row.items() if name not in POSITION_NAMES}
        by_step.setdefault(row["step"], []).append(sample_of(values))
    return by_step


def sample_of(values: Mapping[str, Any]) -> Sample:
    """Return the sample of a line without its position; names that this version does not know are left out.

    Raises:
      TypeError, ValueError: if a field is missing or wrong.
    """
    known: dict[str, Any] = {"correct": None} | {name: value for name, value in values.items() if name in _FITS}
    return Sample(**known)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(value is None or _is_number(value) for value in values)


_FITS = {
    "prompt": lambda value: isinstance(value, str),
    "response": lambda value: isinstance(value, str),
    "reward": _is_number,
    "correct": lambda value: value is None or isinstance(value, bool),
    "truncated": lambda value: isinstance(value, bool),
    "advantage": _is_number,
    "token_ids": lambda value: isinstance(value, list) and all(type(one) is int for one in value),
    "tokens": lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
    "old_log_probs": _are_numbers,
    "log_probs": _are_numbers,
    "gamma": lambda value: value is None or _are_numbers(value),
    "rewards": lambda value: isinstance(value, dict) and _are_numbers(list(value.values())),
    "left_out": lambda value: isinstance(value, bool),
    "environment": lambda value: (
        value is None or (isinstance(value, list) and all(isinstance(one, bool) for one in value))
    ),
}
"""Field -> whether a value, from JSON or from the trainer, is one of it."""
