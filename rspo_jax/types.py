"""The pytrees and protocols that the rest of the library is written against.

Each axis has one letter, the same everywhere: B responses (rows), T tokens of a row, L Mixture-of-Experts layers,
E experts of a layer, K experts that a token activates, V entries of the vocabulary, D hidden size, S slots of a cache.
N counts the rows that responses are packed into.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import jax

Array = jax.Array
Params = Any
"""A pytree of arrays; a plain nested dict for the models of this repository."""
RouterScore = Literal["softmax", "sigmoid"]
"""Function that turns router logits into scores: a softmax over all experts, or a sigmoid of each."""


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


# What a model takes and returns


class ModelOutput(NamedTuple):
    """Result of a forward pass.

    Inside `jax.jit`, fields that nobody reads are neither computed nor stored: a loss that takes `hidden` and `head`
    never makes logits, and a loss that takes a reading never stacks router logits.
    """

    logits: Array
    """float [B, T, V], `hidden @ head`; position t scores token t + 1."""
    router_logits: Array | None
    """float32 [L, B, T, E], before any softmax; L counts MoE layers only. None for a dense model."""
    cache: Any = None
    """The updated cache; None if none was given."""
    hidden: Array | None = None
    """float [B, T, D], the input of the output head. None from a policy that gives logits only."""
    head: Array | None = None
    """[D, V] in the dtype of `hidden`."""
    reading: "RouterReading | None" = None
    """The result of the router reader; None if none was given."""


class RouterReader(NamedTuple):
    """A function that reads the routers layer by layer, while the model runs through its layers. A pytree.

    The router logits of all layers together then never exist.
    """

    read: Callable[[Any, Array, Array], tuple[Any, Any]]
    """(carry, router_logits float32 [B, T, E], expert_ids int32 [B, T, K]) -> (carry, reading of this layer). A
    `jax.tree_util.Partial`; arrays bound to it lead with L, and each layer is given its own slice."""
    carry: Any = None
    """The carry that the first layer is given."""


class RouterReading(NamedTuple):
    """Result of a `RouterReader`."""

    carry: Any
    """The carry that the last layer returned."""
    layers: Any
    """The readings of the layers, stacked on a leading axis L."""


class ForcedRoute(NamedTuple):
    """Experts that the tokens of one forward pass go through, in place of the ones that the routers would choose."""

    expert_ids: Array
    """int [L, B, T, K] of any integer type, each in [0, E). A token's experts may stand in any order."""
    weights: Array | None = None
    """float32 [L, B, T, K], positive: scores of these experts, which the model normalizes and scales as it does its
    own. The router then has no gradient from the experts' outputs. None: the scores come from the current router logits
    at `expert_ids`, and gradients flow through them."""


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
        """Run the model and return a `ModelOutput` (Flax's `apply` does not declare its type).

        Args:
          variables: `{"params": params}`.
          tokens: int32 [B, T].
          positions: int32 [B, T], rotary positions; by default counted within each segment.
          segment_ids: int32 [B, T], 0 on padding; tokens attend within their own segment. By default all 1.
          cache: keys and values of the tokens so far, from `init_cache` or an earlier call.
          router_reader: called with the router logits and the chosen experts of each MoE layer. A dense model leaves
            `reading` None.
          forced_route: the experts to use. Router logits, in the output and for the reader, are then the natural ones,
            computed from the same hidden states; the reader's expert ids are the forced ones.
        """
        ...

    def init_cache(self, batch_size: int, length: int) -> Any:
        """Return an empty cache for `batch_size` rows of at most `length` tokens."""
        ...

    def repeat_cache(self, cache: Any, repeats: int) -> Any:
        """Return a cache with each row of `cache` repeated `repeats` times in a row."""
        ...

    def cast_params(self, params: Params) -> Params:
        """Cast the parameters to the dtypes that matrix products read them in.

        A sampler, which needs no gradient, gets the same results from less memory.
        """
        ...

    @property
    def router_score(self) -> RouterScore:
        """Function that turns the router logits into scores (`rspo_jax.routing.shift`)."""
        ...

    def param_axes(self) -> Any:
        """Return a pytree like the parameters, of logical axes (`rspo_jax.sharding.LogicalAxes`)."""
        ...

    def router_params(self) -> Any:
        """Return a pytree like the parameters, of bools: True for parameters that choose and weigh experts."""
        ...


class RouterTrace(NamedTuple):
    """The experts that the old policy activated and their log-probabilities: 3 bytes a slot, 4 with over 256 experts.

    `rspo_jax.routing.shift` makes and reads it; elsewhere only the expert ids have a meaning. Rows lead, so that a
    batch and its trace are cut and sharded alike. Tokens come last, because a TPU pads the last axis to a multiple of
    128 and K is about 8.
    """

    expert_ids: Array
    """uint8 or uint16 [B, L, K, T]."""
    log_probs: Array
    """uint16 [B, L, K, T], log-probabilities at `expert_ids` on a grid; for a softmax router, log-softmax over all E
    experts."""


# Stages of a batch: drawn, judged, packed, scored


class Samples(NamedTuple):
    """Responses that the sampler drew for B prompts."""

    tokens: Array
    """int32 [B, R], response tokens; the padding token after the end."""
    mask: Array
    """bool [B, R], True on tokens that the model drew, the stop token included."""
    log_probs: Array
    """float32 [B, R], under the distribution drawn from; 0 where the mask is False."""
    route: Array | None = None
    """uint8 or uint16 [B, L, K, P + R - 1], P tokens being a prompt: the experts of every token that was read, at its
    column in prompt and response together (the last response token is never read); 0 elsewhere. None unless it was
    asked for."""
    environment: Array | None = None
    """bool [B, R], True on tokens that an environment wrote between the model's turns. They are in the context and
    outside the mask. None for responses of one turn."""


class RolloutBatch(NamedTuple):
    """Judged responses, ready to be scored and learned from. Row b is prompt and response, left-padded.

    The response of a `ConversationTask` is all that follows the prompt: the model's turns and the environment's.
    """

    tokens: Array
    """int32 [B, T + 1]: inputs are `tokens[:, :-1]`, targets `tokens[:, 1:]`."""
    segment_ids: Array
    """int32 [B, T + 1]: 1 on tokens, 0 on padding."""
    mask: Array
    """bool [B, T], aligned with the targets: True on response tokens that the model drew."""
    sampler_log_probs: Array
    """float32 [B, T], aligned with the targets; 0 where the mask is False."""
    advantages: Array
    """float32 [B]."""
    route: Array | None = None
    """uint8 or uint16 [B, L, K, T], aligned with the inputs: the experts that the sampler used; 0 on padding. None
    unless it was recorded."""


class PackedRows(NamedTuple):
    """Sequences side by side in N rows: the inputs of a model and the targets that it scores."""

    inputs: Array
    """int32 [N, T]; 0 on padding."""
    targets: Array
    """int32 [N, T]: the token after each input; 0 on padding."""
    segment_ids: Array
    """int32 [N, T]: 1, 2, … within a row; tokens attend within their own segment. 0 on padding."""


class PackedBatch(NamedTuple):
    """B responses to learn from, packed into N rows. Arrays may lead with the parts of a rollout, [parts, ...]."""

    rows: PackedRows
    places: Array
    """int32 [B, T]: the place in the rows that scores each response token, a flat index into [N, T of the rows]."""
    mask: Array
    """bool [B, T]: True on response tokens that the model drew; T counts the response's tokens from the first."""
    sampler_log_probs: Array
    """float32 [B, T]; 0 where the mask is False."""
    advantages: Array
    """float32 [B]."""
    route: Array | None = None
    """uint8 or uint16 [N, L, K, T of the rows]: the experts that the sampler used for each input; 0 on padding. None
    unless they were recorded."""
    responses: Array | None = None
    """int32 [B]: the place of each response in the rollout that was packed. None if nobody asks for it."""


class ScoredBatch(NamedTuple):
    """Responses with the old policy's scores of them, as the trainer computes them."""

    batch: PackedBatch
    old_log_probs: Array
    """float32 [B, T]."""
    old_route: RouterTrace | None
    """The trace of the rows, [N, L, K, T of the rows]; None for a dense model."""
    reference_log_probs: Array | None = None
    """float32 [B, T], under the policy that a KL penalty pulls towards; None without one."""


# What a task brings


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def pad_id(self) -> int:
        """Id that fills up a batch. It is masked everywhere, so any id will do."""
        ...

    @property
    def eos_id(self) -> int:
        """Id that is appended to worked solutions; one of `stop_ids`."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """All ids that end a response; at least one. A tokenizer may also have `stop_strings`, texts that end one."""
        ...

    @property
    def vocabulary_size(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of the text alone, without a begin or end of sequence."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, without special tokens."""
        ...


class Judgement(NamedTuple):
    """A task's verdict on one response."""

    reward: float
    """Reward of the response; finite."""
    correct: bool
    """True if the response counts as solved in solve rates. Ignored for a `RewardsTask` that does not tell."""
    unjudged: bool = False
    """True if the judge gave up, for example at a limit of time or memory. Such responses are counted."""
    unmarked: bool = False
    """True if the response lacks the text after which responses are judged. Such responses are counted."""
    left_out: bool = False
    """True if no reward applies to the response. It then counts for nothing, neither in the loss nor in the advantages
    of its group, whatever its `reward`. Such responses are counted."""
    parts: tuple[float, ...] = ()
    """The rewards that `reward` is the weighted sum of, in the order of the task's `reward_names`; NaN for one that
    does not apply. Empty for a task that does not name its rewards."""


@runtime_checkable
class ProblemStream(Protocol):
    """Endless problems to train on, in place of a sequence of them."""

    def draw(self, seed: tuple[int, ...], positions: Sequence[int]) -> list[Any]:
        """Return the problems at some positions of the stream that a seed names.

        Each must be a function of seed and position alone, so that a resumed run goes on with the very next problem.

        Args:
          seed: the run's seed, and the phase: 0 for the warm start, 1 for reinforcement learning.
          positions: each 0 or more.

        Returns:
          One problem a position; None where there is none to train on, for example because it is held out.
        """
        ...


class Task(Protocol):
    """Problems and the judge of their answers."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    def problems(self, split: str) -> Sequence[Any] | ProblemStream:
        """Return the problems of "train", "validation" or "test"; only those of "train" may be a stream."""
        ...

    def prompt(self, problem: Any) -> str:
        """Return all that the model reads of a problem, chat markup included."""
        ...

    def solution(self, problem: Any) -> str:
        """Return a worked response, for the warm start."""
        ...

    def judge(self, problems: Sequence[Any], responses: Sequence[Any]) -> list[Judgement]:
        """Judge many responses at once, so that a task may spread the work over processes.

        Responses are whatever a model drew: none of them may raise an error or take for ever.

        Args:
          problems: one for each response.
          responses: the text of each, without special tokens; for a `ConversationTask`, the texts of its turns.

        Returns:
          One judgement a response.
        """
        ...


@runtime_checkable
class RewardsTask(Task, Protocol):
    """A task that names the rewards of a response; each is then a metric of its own."""

    @property
    def reward_names(self) -> tuple[str, ...]:
        """Names of `Judgement.parts`."""
        ...

    @property
    def tells_correct(self) -> bool:
        """True if judgements say which responses are correct; otherwise runs report mean rewards, not solve rates."""
        ...


@runtime_checkable
class TokensTask(Task, Protocol):
    """A task whose judge also looks at the tokens that the model drew."""

    def judge_tokens(
        self, problems: Sequence[Any], responses: Sequence[Any], token_ids: Sequence[Sequence[int]]
    ) -> list[Judgement]:
        """Judge as `judge` does, which is asked in its place where only texts are known.

        Args:
          problems: one for each response.
          responses: the text of each.
          token_ids: those of each response, with the stop token if it has ended.
        """
        ...


@runtime_checkable
class StepTask(Task, Protocol):
    """A task that wants to know the step of the run, and has metrics of its own."""

    def begin_step(self, step: int, steps: int) -> None:
        """Take note of the step, from 1, whose responses are judged next, and of the number of steps of the run."""
        ...

    def step_metrics(self) -> Mapping[str, float]:
        """Return metrics by name of what this process has judged since `begin_step`."""
        ...


@runtime_checkable
class TruncatedTask(Task, Protocol):
    """A task that may judge responses that were cut off at their limit; in other tasks they earn 0, unseen."""

    @property
    def judges_truncated(self) -> bool:
        """True if responses that were cut off are judged like all others."""
        ...


@runtime_checkable
class KindsTask(Task, Protocol):
    """A task whose problems are of several kinds, which metrics and evaluations show one by one."""

    def kind(self, problem: Any) -> str:
        """Return the name of a problem's kind, which becomes part of the names of metrics."""
        ...


Conversation = Sequence[str]
"""The texts of a conversation in turns, after the prompt: the model's, the environment's, the model's, and so on. The
first and the last are the model's."""


@runtime_checkable
class ConversationTask(Task, Protocol):
    """A task of several turns: its environment answers what the model says (`rspo_jax.rollouts.conversation`)."""

    def respond(self, problem: Any, conversation: Conversation) -> str | None:
        """Return what the environment says after the model's last turn, chat markup included; None if it has ended.

        It must be a function of its arguments alone, so that a resumed run goes on bit for bit.

        Args:
          problem: the problem that the conversation is about.
          conversation: the texts of the turns so far. Turns of the model come without their stop tokens; a turn that
            was cut off ends its conversation and is not answered.
        """
        ...


@runtime_checkable
class DemonstrationTask(ConversationTask, Protocol):
    """A task of several turns whose warm start imitates whole conversations, not `solution` as a single turn."""

    def demonstration(self, problem: Any) -> Conversation:
        """Return a worked conversation, for the warm start."""
        ...
