"""The sampler: one prefill, then cached decoding until the last response has stopped.

Responses are decoded in slots. A slot whose response has ended takes the next waiting prompt, fed token by token beside
the decoding of the others, so that one long response does not keep the rest of the batch waiting. It is one program,
compiled once, and each response depends on its own key alone, whatever slot draws it. On request it records which
experts each token went through.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rspo_jax.routing import ROUTE_AXES, route_of, route_reader
from rspo_jax.sharding import constrain
from rspo_jax.types import Array, Params, Policy, Samples


@dataclass(frozen=True)
class SamplerConfig:
    """Settings of the sampler."""

    max_new_tokens: int = 16
    """Tokens of a response at most."""
    temperature: float = 1.0
    """0 is greedy: it takes the likeliest token and reports its log-probability at temperature 1."""
    top_k: int | None = None
    """Draw among the k likeliest tokens only."""
    top_p: float = 1.0
    """Draw among the fewest likeliest tokens that hold this much probability (after `top_k`)."""
    slots: int | None = None
    """Responses drawn at once, which is also the size of the cache; all of them when absent. A slot that is done takes
    the next prompt. The trainer refills slots only where that is faster than batch after batch
    (`rspo_jax.rollouts.refilling_pays`)."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")
        if self.slots is not None and self.slots < 1:
            raise ValueError(f"slots must be at least 1, got {self.slots}; leave it out to draw all responses at once")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}; leave it out to draw among all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")


def pad_prompts(prompts: list[list[int]], width: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Left-pad prompts to one width, so that all rows start to answer in the same cache slot.

    Returns:
      int32 [B, width] tokens and bool [B, width] mask, True on prompt tokens.

    Raises:
      ValueError: if a prompt is empty or longer than the width.
    """
    tokens = np.full((len(prompts), width), pad_id, np.int32)
    mask = np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= width:
            raise ValueError(f"prompt {row} has {len(prompt)} tokens, which does not fit the range 1 to {width}")
        tokens[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = True
    return tokens, mask


class _Requests(NamedTuple):
    """The responses asked for; the rows of everything else point here."""

    prompts: Array  # int32 [B / repeats, P], left-padded
    prompt_lengths: Array  # int32 [B / repeats]
    keys: Array  # PRNG keys [B]
    limits: Array | None  # int32 [B], the most tokens of each response; one with 0 is not drawn
    repeats: int  # responses to each prompt: response b answers prompt b // repeats

    def prompt_of(self, request: Array) -> Array:
        return request // self.repeats

    @property
    def count(self) -> int:
        return self.prompts.shape[0] * self.repeats


class _Read(NamedTuple):
    """The outcome of reading T tokens a row."""

    logits: Array  # [rows, V] at the last token
    cache: object
    route: Array | None  # [rows, T, L, K]: the experts of all tokens, if asked for


class _Model(NamedTuple):
    """The policy with its parameters."""

    policy: Policy
    params: Params
    record_route: bool

    def read(self, tokens: Array, segment_ids: Array, cache: object) -> _Read:
        options: dict[str, Any] = {"router_reader": route_reader()} if self.record_route else {}
        output = self.policy.apply({"params": self.params}, tokens, segment_ids=segment_ids, cache=cache, **options)
        if not self.record_route:
            return _Read(output.logits[:, -1], output.cache, None)
        if output.reading is None:
            raise ValueError("this model has no experts, so it has no route to record: leave record_route out")
        return _Read(output.logits[:, -1], output.cache, jnp.moveaxis(route_of(output.reading), -1, 1))


class _Slots(NamedTuple):
    """The state of each slot; every array is [slots]."""

    request: Array  # int32: the response it draws
    active: Array  # bool
    segment: Array  # int32: sets this response's tokens apart from those of earlier ones in the cache
    fed: Array  # int32: prompt tokens in the cache
    drawn: Array  # int32: response tokens drawn
    last_token: Array  # int32


class _DecodeState(NamedTuple):
    """The state of decoding between two steps."""

    slots: _Slots
    waiting: Array  # int32 scalar: the first request that no slot has taken yet
    tokens: Array  # int32 [B, R]
    log_probs: Array  # float32 [B, R]
    lengths: Array  # int32 [B]
    cache: object
    route: Array | None  # [B, P + R - 1, L, K]: one write of a slot is contiguous


@functools.partial(jax.jit, static_argnames=("policy", "config", "stop_tokens", "pad_id", "repeats", "record_route"))
def generate(
    policy: Policy,
    params: Params,
    prompts: Array,
    prompt_mask: Array,
    keys: Array,
    config: SamplerConfig,
    stop_tokens: tuple[int, ...],
    pad_id: int = 0,
    repeats: int = 1,
    record_route: bool = False,
    limits: Array | None = None,
) -> Samples:
    """Draw `repeats` responses to each prompt, B in all.

    Args:
      policy: the model.
      params: its parameters.
      prompts: int32 [B / repeats, P], left-padded (`pad_prompts`).
      prompt_mask: bool [B / repeats, P].
      keys: PRNG keys [B], one a response, which depends on no other row.
      config: temperature, limits and slots.
      stop_tokens: ids that end a response; the one drawn still belongs to it.
      pad_id: fills the rest of a row.
      repeats: responses to each prompt, in consecutive rows. The prompt is read once for all of them.
      record_route: if True, record the experts of every token read; the responses do not depend on it.
      limits: int32 [B], the most tokens of each response, beside `config.max_new_tokens`. A response with 0 is not
        drawn: its mask is empty, and no step of decoding is made for it. None for no further limits.

    Returns:
      `Samples` with R = `config.max_new_tokens`.

    Raises:
      ValueError: if the shapes do not fit, there is not one key a response, `repeats` is not positive, limits are given
        for responses that wait for slots, or the route of a model without experts is asked for.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if prompts.ndim != 2 or prompt_mask.shape != prompts.shape:
        raise ValueError(f"prompts and prompt_mask must both be [B, P], got {prompts.shape} and {prompt_mask.shape}")
    batch_size = prompts.shape[0] * repeats
    if keys.shape != (batch_size,):
        raise ValueError(
            f"{batch_size} responses need as many keys, [{batch_size}]; got shape {keys.shape}: "
            "make them with jax.random.split(key, number of responses)"
        )
    if limits is not None and (limits.shape != (batch_size,) or (config.slots or batch_size) < batch_size):
        raise ValueError(
            f"limits need one entry and one slot a response, {batch_size}; got shape {limits.shape} and {config.slots} "
            "slots: leave slots out"
        )
    prompts, prompt_mask = (constrain(array, "rows", None) for array in (prompts, prompt_mask))
    requests = _Requests(prompts, jnp.sum(prompt_mask, axis=1, dtype=jnp.int32), keys, limits, repeats)
    model = _Model(policy, params, record_route)
    take_in = functools.partial(_take_in, requests=requests, config=config, stop_tokens=stop_tokens)

    def decode(state: _DecodeState) -> _DecodeState:
        return take_in(*_read_next(state, model, requests, pad_id))

    first = take_in(*_prefill(model, requests, prompt_mask, config, pad_id))
    end = jax.lax.while_loop(lambda state: jnp.any(state.slots.active), decode, first)
    mask = jnp.arange(config.max_new_tokens, dtype=jnp.int32)[None, :] < end.lengths[:, None]
    samples = Samples(*(constrain(array, "rows", None) for array in (end.tokens, mask, end.log_probs)))
    if end.route is None:
        return samples
    return samples._replace(route=constrain(jnp.transpose(end.route, (0, 2, 3, 1)), *ROUTE_AXES))


def _prefill(
    model: _Model, requests: _Requests, prompt_mask: Array, config: SamplerConfig, pad_id: int
) -> tuple[_DecodeState, Array]:
    """Read the prompts of the first slots; return the first state and the logits [slots, V] of the first tokens."""
    batch_size, (width, response_width) = requests.count, (requests.prompts.shape[1], config.max_new_tokens)
    num_slots = min(config.slots or batch_size, batch_size)
    num_prompts = -(-num_slots // requests.repeats)
    shared = num_slots % requests.repeats == 0  # else one prompt's responses do not all begin at once
    rows = jnp.arange(num_prompts) if shared else requests.prompt_of(jnp.arange(num_slots))
    # The cache is a ring as long as the longest sequence, whatever it held before.
    cache = model.policy.init_cache(rows.size, width + response_width)
    segment_ids = prompt_mask[rows].astype(jnp.int32)
    logits, cache, prompt_route = model.read(requests.prompts[rows], segment_ids, cache)
    if prompt_route is not None:
        prompt_route = jnp.where(prompt_mask[rows][:, :, None, None], prompt_route, 0)
    if shared and requests.repeats > 1:
        # An index, not `jnp.repeat`: with that, XLA's compiler for CPUs never finishes at some vocabulary sizes.
        prompt_of_slot = requests.prompt_of(jnp.arange(num_slots))
        prompt_route = None if prompt_route is None else prompt_route[prompt_of_slot]
        logits, cache = logits[prompt_of_slot], model.policy.repeat_cache(cache, requests.repeats)
    ones, zeros = jnp.ones(num_slots, jnp.int32), jnp.zeros(num_slots, jnp.int32)
    request = jnp.arange(num_slots, dtype=jnp.int32)
    state = _DecodeState(
        slots=_Slots(
            request=request,
            active=ones.astype(bool) if requests.limits is None else requests.limits > 0,
            segment=ones,
            fed=requests.prompt_lengths[requests.prompt_of(request)],
            drawn=zeros,
            last_token=zeros,
        ),
        waiting=jnp.int32(num_slots),
        tokens=jnp.full((batch_size, response_width), pad_id, jnp.int32),
        log_probs=jnp.zeros((batch_size, response_width), jnp.float32),
        lengths=jnp.zeros(batch_size, jnp.int32),
        cache=cache,
        route=None,
    )
    if prompt_route is not None:
        route = jnp.zeros((batch_size, width + response_width - 1, *prompt_route.shape[2:]), prompt_route.dtype)
        route = constrain(route.at[:num_slots, :width].set(prompt_route), "rows", None, None, None)
        state = state._replace(route=route)
    return state, logits


def _read_next(state: _DecodeState, model: _Model, requests: _Requests, pad_id: int) -> tuple[_DecodeState, Array]:
    """Read one token in every slot; return the state after it and the logits [slots, V] of the next token."""
    slots, width = state.slots, requests.prompts.shape[1]
    # The rest of the prompt comes first, then the token drawn last.
    prompt = requests.prompt_of(slots.request)
    prompt_length = requests.prompt_lengths[prompt]
    feeding = slots.fed < prompt_length
    column = jnp.minimum(width - prompt_length + slots.fed, width - 1)
    inputs = jnp.where(feeding, requests.prompts[prompt, column], slots.last_token)
    segment_ids = jnp.where(slots.active, slots.segment, 0)[:, None]
    inputs = jnp.where(slots.active, inputs, pad_id)
    logits, cache, token_route = model.read(inputs[:, None], segment_ids, state.cache)
    route = state.route
    if route is not None and token_route is not None:
        # Record the token's experts at its column in prompt + response.
        unread = prompt_length - slots.fed
        column = jnp.where(unread > 0, width - unread, width + slots.drawn - 1)
        row = jnp.where(slots.active, slots.request, requests.count)  # out of bounds is dropped
        route = route.at[row, column].set(token_route[:, 0], mode="drop")
    slots = slots._replace(fed=slots.fed + feeding.astype(jnp.int32))
    return state._replace(slots=slots, cache=cache, route=route), logits


def _take_in(
    state: _DecodeState, logits: Array, requests: _Requests, config: SamplerConfig, stop_tokens: tuple[int, ...]
) -> _DecodeState:
    """Draw a token in every slot that has read its prompt, and hand the next requests to the slots that are done."""
    slots, num_requests = state.slots, requests.count
    drawing = slots.active & (slots.fed >= requests.prompt_lengths[requests.prompt_of(slots.request)])
    tokens, log_probs = _draw_tokens(logits, requests.keys[slots.request], slots.drawn, config)
    row = jnp.where(drawing, slots.request, num_requests)  # out of bounds is dropped
    drawn = slots.drawn + drawing.astype(jnp.int32)
    stops = jnp.isin(tokens, jnp.asarray(stop_tokens, jnp.int32)) if stop_tokens else jnp.zeros_like(drawing)
    at_limit = drawn == config.max_new_tokens
    if requests.limits is not None:
        at_limit = at_limit | (drawn == requests.limits[slots.request])
    done = drawing & (stops | at_limit)
    next_request = state.waiting + jnp.cumsum(done, dtype=jnp.int32) - 1
    refilled = done & (next_request < num_requests)
    return _DecodeState(
        slots=_Slots(
            request=jnp.where(refilled, next_request, slots.request),
            active=slots.active & (~done | refilled),
            segment=slots.segment + refilled.astype(jnp.int32),
            fed=jnp.where(refilled, 0, slots.fed),
            drawn=jnp.where(refilled, 0, drawn),
            last_token=tokens,
        ),
        waiting=state.waiting + jnp.sum(done, dtype=jnp.int32),
        tokens=state.tokens.at[row, slots.drawn].set(tokens, mode="drop"),
        log_probs=state.log_probs.at[row, slots.drawn].set(log_probs, mode="drop"),
        lengths=state.lengths.at[row].set(drawn, mode="drop"),
        cache=state.cache,
        route=state.route,
    )


def _draw_tokens(logits: Array, keys: Array, index: Array, config: SamplerConfig) -> tuple[Array, Array]:
    """Draw the `index`-th token of each row's response, with its log-probability: [B, V] -> int32 [B], float32 [B]."""
    logits = logits.astype(jnp.float32)
    if config.temperature == 0:
        tokens = jnp.argmax(logits, axis=-1)
    else:
        logits = truncate_logits(logits / config.temperature, config.top_k, config.top_p)
        noise = jax.vmap(
            lambda key, token: jax.random.gumbel(jax.random.fold_in(key, token), logits.shape[1:], jnp.float32)
        )(keys, index)
        tokens = jnp.argmax(logits + noise, axis=-1)
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), log_probs


def truncate_logits(logits: Array, top_k: int | None, top_p: float) -> Array:
    """Set all logits to −inf but those of the `top_k` likeliest tokens, and of these the fewest that hold `top_p`.

    Args:
      logits: float [B, V], already divided by the temperature.
      top_k: at least 1, or None for no limit.
      top_p: in (0, 1]; the likeliest token is always kept.
    """
    if top_k is None and top_p == 1:
        return logits
    order = jnp.argsort(-logits, axis=-1, stable=True)
    rank = jnp.arange(logits.shape[-1])[None, :]
    kept = jnp.broadcast_to(rank < (top_k or logits.shape[-1]), logits.shape)
    if top_p < 1:
        ranked = jnp.take_along_axis(logits, order, axis=-1)
        probs = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
        kept = kept & ((rank == 0) | (jnp.cumsum(probs, axis=-1) - probs < top_p))
    kept = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, logits, -jnp.inf)
