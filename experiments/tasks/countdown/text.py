"""How Countdown looks as text and as token ids: the prompt, and a tokenizer of one id a character.

A prompt such as "2,8,1=14:" is followed by a response such as "2*(8-1)" and the id that ends a
sequence. This module must never know which expressions are right.
"""

from collections.abc import Iterable

from experiments.tasks.countdown.problems import Problem

_CHARACTERS = "0123456789+-*/()=,: "
_CHARACTER_TO_ID = {character: index for index, character in enumerate(_CHARACTERS, start=2)}
_ID_TO_CHARACTER = {index: character for character, index in _CHARACTER_TO_ID.items()}


class CharacterTokenizer:
    """Maps each character of prompts and responses to one id.

    Attributes:
        pad_id: the id that fills up a batch; it stands for no text.
        eos_id: the id that ends a response; it stands for no text.
        stop_ids: all ids that end a response: `eos_id` alone.
        vocabulary_size: how many ids there are; they run from 0 to vocabulary_size - 1.
    """

    pad_id: int = 0
    eos_id: int = 1
    stop_ids: tuple[int, ...] = (1,)
    vocabulary_size: int = 2 + len(_CHARACTERS)

    def encode(self, text: str) -> list[int]:
        """Returns one id for each character, without an end id.

        Raises:
            ValueError: if a character is not in the vocabulary.
        """
        ids = []
        for position, character in enumerate(text):
            if character not in _CHARACTER_TO_ID:
                raise ValueError(
                    f"The character {character!a} at position {position} is not in the "
                    f"vocabulary; use only {_CHARACTERS!r}."
                )
            ids.append(_CHARACTER_TO_ID[character])
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text before the first end id, leaving out padding.

        Args:
            ids: Python or numpy integers; what follows the first end id is not looked at.

        Raises:
            ValueError: if an id is negative or not below `vocabulary_size`.
        """
        characters = []
        for position, token_id in enumerate(ids):
            if not 0 <= token_id < self.vocabulary_size:
                raise ValueError(
                    f"The id {token_id} at position {position} is not in the vocabulary; "
                    f"ids lie between 0 and {self.vocabulary_size - 1}."
                )
            if token_id == self.eos_id:
                break
            if token_id != self.pad_id:
                characters.append(_ID_TO_CHARACTER[int(token_id)])
        return "".join(characters)


def prompt_text(problem: Problem) -> str:
    """Returns the prompt of a problem, such as "2,8,1=14:", numbers in the order given."""
    return f"{','.join(map(str, problem.numbers))}={problem.target}:"
