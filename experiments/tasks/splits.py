"""Splits of one file: which problems are for training, which for validation and which for the test."""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from experiments.tasks.chats import Prompt, text_of

Problem = TypeVar("Problem")
SPLITS = ("train", "validation", "test")


def check_split(split: str) -> None:
    """Raise ValueError if there is no such split."""
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}")


def check_shares(validation: float, test: float) -> None:
    """Raise ValueError if shares of a file are none, or leave nothing for training."""
    for name, share in (("validation_share", validation), ("test_share", test)):
        if not (math.isfinite(share) and 0 <= share < 1):
            raise ValueError(f"{name} is {share}; set it to a share of at least 0 and below 1")
    if validation + test >= 1:
        raise ValueError(
            f"validation_share and test_share are {validation:g} and {test:g}, which leaves nothing to train on; lower "
            "them"
        )


def rank_of(prompt: Prompt, seed: int) -> bytes:
    """Return the hash of a prompt that splits are drawn by: 32 bytes, the same for the same prompt and seed."""
    return hashlib.sha256(f"{seed}/{text_of(prompt)}".encode()).digest()


def split_of(prompt: Prompt, validation: float, test: float, seed: int) -> str:
    """Return the split of a prompt in a file that is split by shares.

    It follows from the prompt, the shares and the seed alone, so that neither the order of a file nor further records
    move a prompt, and the same prompt is never in two splits. With a larger share a split keeps what it has.

    Args:
      prompt: the prompt.
      validation: share of the prompts, from 0 to below 1, in the split "validation".
      test: share in the split "test".
      seed: determines which prompts these are.
    """
    place = int.from_bytes(rank_of(prompt, seed)[:8], "big") / 2**64
    # From both ends, so that each share can be changed without moving the other split.
    return "test" if place < test else "validation" if place >= 1 - validation else "train"


def draw(
    problems: list[Problem], prompt_of: Callable[[Problem], Prompt], count: int, seed: int
) -> tuple[list[Problem], list[Problem]]:
    """Split problems in two, by a hash of the seed and the prompt.

    The draw depends neither on the order of the problems nor on the version of a random generator, and a larger
    `count` includes what a smaller one draws.

    Returns:
      All but `count` of the problems, without those that ask the same as one of them, and those `count`, both in their
      original order.

    Raises:
      ValueError: if no problem would be left.
    """
    if count >= len(problems):
        raise ValueError(
            f"validation is {count}, but there are {len(problems)} problems to draw it from; lower validation"
        )
    ranks = [rank_of(prompt_of(problem), seed) for problem in problems]
    drawn = set(sorted(range(len(problems)), key=ranks.__getitem__)[:count])
    asked = {ranks[index] for index in drawn}
    rest = [problem for problem, rank in zip(problems, ranks, strict=True) if rank not in asked]
    return rest, [problems[index] for index in sorted(drawn)]


class Overlaps:
    """A watch for prompts that stand in the files of two splits, which would flatter what is measured."""

    def __init__(self) -> None:
        self._splits: dict[str, set[bytes]] = {}

    def note(self, split: str, prompts: Sequence[Prompt]) -> list[str]:
        """Return a sentence for each split, among those noted before, that has prompts of this one."""
        ranks, sentences = {rank_of(prompt, 0) for prompt in prompts}, []
        for other, seen in self._splits.items():
            if other != split and (both := len(ranks & seen)):
                sentences.append(
                    f"the splits {other} and {split} share prompts, {both} in number: leave them out of one of both"
                )
        self._splits[split] = ranks
        return sentences
