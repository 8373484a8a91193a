"""The pytrees and protocols that the rest of the library is written against.

Axes have one letter each, everywhere: B responses (rows), T tokens of a row, L Mixture-of-Experts layers,
E experts of a layer, K experts that a token activates, V entries of the vocabulary, S slots of a cache.
This file must never know a concrete model, task or training framework.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax

Array = jax.Array
Params = Any  # a pytree of arrays, a plain nested dict for the models of this repository


class ModelOutput(NamedTuple):
    """What a forward pass returns."""

    logits: Array
    """float [B, T, V]; position t scores token t + 1."""
    router_logits: Array | None
    """float32 [L, B, T, E], before any softmax; L counts MoE layers only. None for a dense model."""
    cache: Any = None
    """The updated cache where one was given, else None."""


class Policy(Protocol):
    """A model as the sampler and the trainer see it; a Flax module fits without an adapter."""

    def apply(
        self,
        variables: Mapping[str, Params],
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        cache: Any = None,
    ) -> Any:
        """Runs the model and returns a `ModelOutput` (which Flax's `apply` does not declare).

        Args:
          variables: `{"params": params}`.
          tokens: int32 [B, T].
          positions: int32 [B, T] rotary positions; counted within each segment when absent.
          segment_ids: int32 [B, T]; tokens attend within their own segment, 0 is padding. All 1 when absent.
          cache: keys and values of the tokens so far, from `init_cache` or an earlier call.
        """
        ...

    def init_cache(self, batch_size: int, length: int) -> Any:
        """An empty cache for `batch_size` rows of at most `length` tokens."""
        ...


class RouterTrace(NamedTuple):
    """Which experts the old policy activated, and how sure it was. Opaque outside `router.py`, except that its arrays
    lead with the rows, so that a batch and its trace are cut alike."""

    expert_ids: Array
    """unsigned [B, T, L, K]."""
    log_probs: Array
    """float32 [B, T, L, K], log-softmax over all E experts, at `expert_ids`."""


class Samples(NamedTuple):
    """What the sampler returns for B prompts."""

    tokens: Array
    """int32 [B, R] response tokens; the padding token after the end."""
    mask: Array
    """bool [B, R]; True on response tokens, the stop token included."""
    log_probs: Array
    """float32 [B, R] under the distribution drawn from; 0 where the mask is False."""


class RolloutBatch(NamedTuple):
    """Responses, ready to be scored and learned from. Row b is prompt and response, left-padded."""

    tokens: Array
    """int32 [B, T + 1]: inputs are `tokens[:, :-1]`, targets `tokens[:, 1:]`."""
    segment_ids: Array
    """int32 [B, T + 1]: 1 on tokens, 0 on padding."""
    mask: Array
    """bool [B, T], aligned with the targets: True on response tokens."""
    sampler_log_probs: Array
    """float32 [B, T], aligned with the targets; 0 where the mask is False."""
    advantages: Array
    """float32 [B]."""


class ScoredBatch(NamedTuple):
    """A rollout together with what the old policy, as the trainer computes it, says of it."""

    rollout: RolloutBatch
    old_log_probs: Array
    """float32 [B, T]."""
    old_route: RouterTrace | None
    """None for a dense model."""


class TokenBatch(NamedTuple):
    """Token sequences to imitate, in the layout of a rollout."""

    tokens: Array
    """int32 [B, T + 1]."""
    segment_ids: Array
    """int32 [B, T + 1]."""
    mask: Array
    """bool [B, T], aligned with the targets `tokens[:, 1:]`: True on tokens to learn."""


class Tokenizer(Protocol):
    """Text to token ids and back."""

    pad_id: int
    eos_id: int

    @property
    def vocabulary_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Task(Protocol):
    """Problems and the judge of their answers."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    def problems(self, split: str) -> Sequence[Any]:
        """The problems of "train", "validation" or "test"."""
        ...

    def prompt(self, problem: Any) -> str: ...

    def solution(self, problem: Any) -> str:
        """A worked response, for the warm start."""
        ...

    def reward(self, problem: Any, response: str) -> float: ...

    def is_correct(self, problem: Any, response: str) -> bool: ...
