"""Draws responses from a policy: one prefill, then cached decoding until the last row has stopped.

Pure and jitted; deterministic in the key, row by row. This file must never know a task, a reward or a concrete model.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rspo_jax.types import Array, Params, Policy, Samples


@dataclass(frozen=True)
class SamplerConfig:
    """How to draw."""

    max_new_tokens: int = 16
    temperature: float = 1.0
    """0 is greedy: the likeliest token, whose log-probability is reported at temperature 1."""
    top_k: int | None = None
    """Draw among the k likeliest tokens only."""
    top_p: float = 1.0
    """Draw among the fewest likeliest tokens that hold this much probability (after `top_k`)."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}; leave it out to draw among all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")


def pad_prompts(prompts: list[list[int]], width: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Left-pads prompts to one width, so that all rows start to answer in the same cache slot.

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


class _DecodeState(NamedTuple):
    step: Array  # int32 scalar: tokens drawn so far
    samples: Samples
    finished: Array  # bool [B]
    last_tokens: Array  # int32 [B]
    cache: object


@functools.partial(jax.jit, static_argnames=("policy", "config", "stop_tokens", "pad_id"))
def generate(
    policy: Policy,
    params: Params,
    prompts: Array,
    prompt_mask: Array,
    key: Array,
    config: SamplerConfig,
    stop_tokens: tuple[int, ...],
    pad_id: int = 0,
) -> Samples:
    """Draws one response a row.

    Args:
      policy: the model.
      params: its parameters.
      prompts: int32 [B, P], left-padded (`pad_prompts`).
      prompt_mask: bool [B, P].
      key: a PRNG key. Row b draws from `split(key, B)[b]`, whatever the other rows do.
      config: how to draw.
      stop_tokens: a row is finished once it draws one of them; that token still belongs to the response.
      pad_id: fills the rest.

    Returns:
      `Samples` with R = `config.max_new_tokens`.

    Raises:
      ValueError: if the shapes do not fit.
    """
    if prompts.ndim != 2 or prompt_mask.shape != prompts.shape:
        raise ValueError(f"prompts and prompt_mask must both be [B, P], got {prompts.shape} and {prompt_mask.shape}")
    batch_size, width = prompts.shape
    row_keys = jax.random.split(key, batch_size)
    cache = policy.init_cache(batch_size, width + config.max_new_tokens)
    output = policy.apply({"params": params}, prompts, segment_ids=prompt_mask.astype(jnp.int32), cache=cache)
    empty = jnp.zeros((batch_size, config.max_new_tokens))
    start = _DecodeState(
        step=jnp.int32(0),
        samples=Samples(jnp.full(empty.shape, pad_id, jnp.int32), empty.astype(bool), empty),
        finished=jnp.zeros(batch_size, bool),
        last_tokens=prompts[:, -1],
        cache=output.cache,
    )

    def draw(state: _DecodeState, logits: Array, cache: object) -> _DecodeState:
        tokens, log_probs = _draw_tokens(logits, row_keys, state.step, config)
        tokens = jnp.where(state.finished, pad_id, tokens)
        samples = Samples(
            state.samples.tokens.at[:, state.step].set(tokens),
            state.samples.mask.at[:, state.step].set(~state.finished),
            state.samples.log_probs.at[:, state.step].set(jnp.where(state.finished, 0, log_probs)),
        )
        stopped = (
            jnp.isin(tokens, jnp.asarray(stop_tokens, jnp.int32)) if stop_tokens else jnp.zeros_like(state.finished)
        )
        return _DecodeState(state.step + 1, samples, state.finished | stopped, tokens, cache)

    def decode(state: _DecodeState) -> _DecodeState:
        output = policy.apply(
            {"params": params},
            state.last_tokens[:, None],
            segment_ids=(~state.finished).astype(jnp.int32)[:, None],
            cache=state.cache,
        )
        return draw(state, output.logits[:, -1], output.cache)

    def unfinished(state: _DecodeState) -> Array:
        return (state.step < config.max_new_tokens) & ~jnp.all(state.finished)

    first = draw(start, output.logits[:, -1], output.cache)
    return jax.lax.while_loop(unfinished, decode, first).samples


def _draw_tokens(logits: Array, row_keys: Array, step: Array, config: SamplerConfig) -> tuple[Array, Array]:
    """One token a row and its log-probability: [B, V] -> int32 [B], float32 [B]."""
    logits = logits.astype(jnp.float32)
    if config.temperature == 0:
        tokens = jnp.argmax(logits, axis=-1)
    else:
        logits = truncate_logits(logits / config.temperature, config.top_k, config.top_p)
        noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, step), logits.shape[1:]))(row_keys)
        tokens = jnp.argmax(logits + noise, axis=-1)
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), log_probs


def truncate_logits(logits: Array, top_k: int | None, top_p: float) -> Array:
    """Sets to -inf all but the `top_k` likeliest tokens, and of these all but the fewest that hold `top_p`.

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
