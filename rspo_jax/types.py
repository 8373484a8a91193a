"""The pytrees and protocols that the rest of the library is written against.

Axes have one letter each, everywhere: B responses (rows), T tokens of a row, L Mixture-of-Experts layers,
E experts of a layer, K experts that a token activates, V entries of the vocabulary, S slots of a cache.
This file must never know a concrete model, task or training framework.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, get_args

import jax

Array = jax.Array
Params = Any  # a pytree of arrays, a plain nested dict for the models of this repository


def check_choice(name: str, value: str, choices: Any) -> None:
    """Refuse a value that a `Literal` does not list.

    Args:
      name: the option, for the message.
      value: its value, from a file or a caller that no type checker saw.
      choices: a `typing.Literal` of strings.

    Raises:
      ValueError: naming the option and its choices.
    """
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}; got {value!r}")


class ModelOutput(NamedTuple):
    """What a forward pass returns.

    Inside `jax.jit`, what nobody reads is neither computed nor stored: a loss that takes `hidden` and `head` never
    makes logits, and one that takes a reading never stacks router logits.
    """

    logits: Array
    """float [B, T, V], `hidden @ head`; position t scores token t + 1."""
    router_logits: Array | None
    """float32 [L, B, T, E], before any softmax; L counts MoE layers only. None for a dense model."""
    cache: Any = None
    """The updated cache where one was given, else None."""
    hidden: Array | None = None
    """[B, T, D], what the output head multiplies. None from a policy that gives logits only."""
    head: Array | None = None
    """[D, V] in the dtype of `hidden`."""
    reading: "RouterReading | None" = None
    """What the router reader saw, where one was given."""


class RouterReader(NamedTuple):
    """What a caller wants to know of the routers, computed layer by layer while the model runs through its layers, so
    that the router logits of all layers never exist together. A pytree."""

    read: Callable[[Any, Array, Array], tuple[Any, Any]]
    """(carry, router_logits float32 [B, T, E], expert_ids int32 [B, T, K]) -> (carry, reading of this layer). A
    `jax.tree_util.Partial`; arrays bound to it lead with L, and each layer is given its own slice."""
    carry: Any = None
    """What the first layer is given."""


class RouterReading(NamedTuple):
    """What came of a `RouterReader`."""

    carry: Any
    """From the last layer."""
    layers: Any
    """The reading of each layer, stacked on a leading axis L."""


class ForcedRoute(NamedTuple):
    """Experts that the tokens of one forward pass go through, in place of those that the routers would choose."""

    expert_ids: Array
    """int [L, B, T, K], of any integer type, each in [0, E). A token's experts may stand in any order."""
    weights: Array | None = None
    """float32 [L, B, T, K], positive: the scores of these experts, before the model divides them by their sum and
    scales them as it does its own. The router then has no gradient from what the experts return. None: the scores come
    from the current router logits at `expert_ids`, and gradients flow through them."""


class Policy(Protocol):
    """A model as the sampler and the trainer see it; a Flax module fits without an adapter."""

    def apply(
        self,
        variables: Mapping[str, Params],
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        cache: Any = None,
        router_reader: RouterReader | None = None,
        forced_route: ForcedRoute | None = None,
    ) -> Any:
        """Runs the model and returns a `ModelOutput` (which Flax's `apply` does not declare).

        Args:
          variables: `{"params": params}`.
          tokens: int32 [B, T].
          positions: int32 [B, T] rotary positions; counted within each segment when absent.
          segment_ids: int32 [B, T]; tokens attend within their own segment; 0 is padding. All 1 when absent.
          cache: keys and values of the tokens so far, from `init_cache` or an earlier call.
          router_reader: called with the router logits and the chosen experts of each MoE layer. A dense model leaves
            `reading` None.
          forced_route: the experts to use. Router logits, in the output and for the reader, are what they would have
            been for the same hidden states; the reader's expert ids are those used.
        """
        ...

    def init_cache(self, batch_size: int, length: int) -> Any:
        """An empty cache for `batch_size` rows of at most `length` tokens."""
        ...

    def repeat_cache(self, cache: Any, repeats: int) -> Any:
        """A cache in which each row of `cache` stands `repeats` times in a row."""
        ...

    def cast_params(self, params: Params) -> Params:
        """The parameters in the dtypes that products read them in: the same results from less memory, for a sampler
        that needs no gradient."""
        ...

    @property
    def router_score(self) -> str:
        """What turns the router logits into scores, "softmax" or "sigmoid" (`rspo_jax.routing.shift`)."""
        ...

    def param_axes(self) -> Any:
        """A pytree like that of the parameters, with the logical axes of each (`rspo_jax.sharding.RULES`): a tuple of
        names, or of None for axes that are never split."""
        ...

    def router_params(self) -> Any:
        """A pytree like that of the parameters, of bools: True on those that choose and weigh experts."""
        ...


class RouterTrace(NamedTuple):
    """Which experts the old policy activated, and how sure it was: 3 bytes a slot with up to 256 experts, 4 with more.

    Opaque outside `router.py`, except that the ids are what they say, and that its arrays lead with the rows, so that a
    batch and its trace are cut and sharded alike. The tokens come last because a TPU pads the last axis to a multiple
    of 128, and K is about 8.
    """

    expert_ids: Array
    """uint8 or uint16 [B, L, K, T]."""
    log_probs: Array
    """uint16 [B, L, K, T], log-softmax over all E experts at `expert_ids`, on a grid."""


class Samples(NamedTuple):
    """What the sampler returns for B prompts."""

    tokens: Array
    """int32 [B, R] response tokens; the padding token after the end."""
    mask: Array
    """bool [B, R]; True on response tokens, the stop token included."""
    log_probs: Array
    """float32 [B, R] under the distribution drawn from; 0 where the mask is False."""
    route: Array | None = None
    """uint8 or uint16 [B, L, K, P + R - 1]: the experts of every token that was read, at its column in prompt and
    response together (the last response token is never read); 0 elsewhere. None unless it was asked for."""


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
    route: Array | None = None
    """uint8 or uint16 [B, L, K, T], aligned with the inputs: the experts that the sampler used; 0 on padding. None
    unless it was recorded."""


class PackedRows(NamedTuple):
    """Sequences side by side in N rows: what a model reads and is scored on."""

    inputs: Array
    """int32 [N, T]; 0 on padding."""
    targets: Array
    """int32 [N, T]: the token after each input; 0 on padding."""
    segment_ids: Array
    """int32 [N, T]: 1, 2, … within a row; tokens attend within their own segment. 0 on padding."""


class PackedBatch(NamedTuple):
    """Responses to learn from: B of them, in N rows. Arrays may lead with the parts of a rollout, [parts, ...]."""

    rows: PackedRows
    places: Array
    """int32 [B, T]: where the rows score each response token, a flat index into [N, T of the rows]."""
    mask: Array
    """bool [B, T]: True on response tokens; T counts them from the first."""
    sampler_log_probs: Array
    """float32 [B, T]; 0 where the mask is False."""
    advantages: Array
    """float32 [B]."""
    route: Array | None = None
    """uint8 or uint16 [N, L, K, T of the rows]: the experts that the sampler used for each input; 0 on padding. None
    unless they were recorded."""


class ScoredBatch(NamedTuple):
    """Responses together with what the old policy, as the trainer computes it, says of them."""

    batch: PackedBatch
    old_log_probs: Array
    """float32 [B, T]."""
    old_route: RouterTrace | None
    """Of the rows, [N, L, K, T of the rows]; None for a dense model."""
    reference_log_probs: Array | None = None
    """float32 [B, T] of the policy that a KL penalty holds on to; None without one."""


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def pad_id(self) -> int:
        """Fills up a batch. It is masked everywhere, so any id will do."""
        ...

    @property
    def eos_id(self) -> int:
        """Appended to worked solutions; one of `stop_ids`."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """All ids that end a response; at least one."""
        ...

    @property
    def vocabulary_size(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """The ids of the text and nothing else: no begin or end of a sequence is added."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, without special tokens."""
        ...


class Judgement(NamedTuple):
    """What a task says of a response."""

    reward: float
    """Finite."""
    correct: bool
    """What solve rates count."""
    unjudged: bool = False
    """Whether the judge gave up, at a limit of time or memory, say. Such responses are counted."""


class Task(Protocol):
    """Problems and the judge of their answers."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    def problems(self, split: str) -> Sequence[Any]:
        """The problems of "train", "validation" or "test"."""
        ...

    def prompt(self, problem: Any) -> str:
        """All that the model reads of a problem, the marks of a chat included."""
        ...

    def solution(self, problem: Any) -> str:
        """A worked response, for the warm start."""
        ...

    def judge(self, problems: Sequence[Any], responses: Sequence[str]) -> list[Judgement]:
        """One judgement a response; problem i is the one that response i answers.

        Many at once, so that a task may spread them over processes. No response may raise an error or take for ever:
        they are what a model drew.
        """
        ...
