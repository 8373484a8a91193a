"""The part of a response that is judged: what follows the last occurrence of a marker such as "</think>".

What a model writes before it is a draft, and a right answer in a draft earns nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

from experiments.text import ChatTokenizer
from rspo_jax.types import Judgement, Tokenizer


def part_after(marker: str, response: str) -> str | None:
    """Return what follows the last occurrence of the marker, None if there is none; all, if the marker is empty."""
    _, found, part = response.rpartition(marker) if marker else ("", True, response)
    return part if found else None


def judge_after(
    marker: str,
    judge: Callable[[Sequence[Any], Sequence[str]], list[Judgement]],
    problems: Sequence[Any],
    responses: Sequence[str],
    unmarked_reward: float = 0.0,
) -> list[Judgement]:
    """Judge the part of each response after the marker; a response without it is wrong, and marked as such.

    Args:
        marker: the text after which responses are judged; empty: all of each is.
        judge: of the task.
        problems: one for each response.
        responses: as the model wrote them.
        unmarked_reward: reward of a response without the marker.
    """
    parts = [part_after(marker, response) for response in responses]
    pairs = [(problem, part) for problem, part in zip(problems, parts, strict=True) if part is not None]
    judged = iter(judge([problem for problem, _ in pairs], [part for _, part in pairs]) if pairs else [])
    return [Judgement(unmarked_reward, False, unmarked=True) if part is None else next(judged) for part in parts]


def check_marker(marker: str, tokenizer: Tokenizer) -> None:
    """Refuse a marker that responses will not contain.

    Raises:
        ValueError: if the tokenizer cannot write it, or leaves it out of a response's text as a special token; or if
            the chat template writes it before the response begins.
    """
    if not marker:
        return
    if tokenizer.decode(tokenizer.encode(marker)) != marker:
        raise ValueError(
            f"judge_after is {marker!r}, but the text of a response never contains it, because the tokenizer counts it "
            'among its special tokens; choose another text, or set "special" to false for it in tokenizer.json and '
            "tokenizer_config.json"
        )
    if isinstance(tokenizer, ChatTokenizer):
        question = "A question"
        if marker in tokenizer.chat([{"role": "user", "content": question}]).rpartition(question)[2]:
            raise ValueError(
                f"judge_after is {marker!r}, but the chat template writes it before the response begins, so that no "
                "response will; leave judge_after out, or let the model think (chat.options)"
            )
