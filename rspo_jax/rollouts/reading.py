"""Responses as text: where each of them ends, and whether it has ended at all."""

import bisect
from typing import NamedTuple

from rspo_jax.types import Tokenizer


class Reading(NamedTuple):
    """A response, or one turn of a conversation, as text."""

    length: int
    """Tokens that belong to it, up to where it ends."""
    text: str
    """Its text, without what ends it."""
    stopped: bool
    """False if it was cut off before its end."""


def read_response(response: list[int], tokenizer: Tokenizer) -> Reading:
    """Return the text of a response, which ends before the first stop string in it, or else at its stop token.

    Args:
      response: the ids that were drawn; at least one.
      tokenizer: names the stop tokens and, if it has any, the stop strings.
    """
    stopped = response[-1] in tokenizer.stop_ids
    text = tokenizer.decode(response[:-1] if stopped else response)
    stop_strings = getattr(tokenizer, "stop_strings", ())
    if not any(stop in text for stop in stop_strings):
        return Reading(len(response), text, stopped)

    def contains_stop(length: int) -> bool:
        return any(stop in tokenizer.decode(response[:length]) for stop in stop_strings)

    # The token that completes a stop string is the last one, as if the sampler had seen it.
    length = bisect.bisect_left(range(len(response)), True, key=contains_stop)
    text = tokenizer.decode(response[:length])
    return Reading(length, text[: min(text.index(stop) for stop in stop_strings if stop in text)], True)
