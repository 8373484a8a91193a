"""The text format of Countdown: prompts, and a tokenizer with one id per character.

A prompt such as "2,8,1=14:" is followed by a response such as "2*(8-1)" and the id that ends a sequence.
"""

from collections.abc import Iterable

from experiments.tasks.countdown.problems import Problem

_CHARACTERS = "0123456789+-*/()=,: "
_CHARACTER_TO_ID = {character: index for index, character in enumerate(_CHARACTERS, start=2)}
_ID_TO_CHARACTER = {index: character for character, index in _CHARACTER_TO_ID.items()}


class CharacterTokenizer:
    """A tokenizer that maps each character of prompts and responses to one id.

    Attributes:
        pad_id: the padding of a batch; it stands for no text.
        eos_id: the id that ends a response; it stands for no text.
        stop_ids: all ids that end a response: `eos_id` alone.
        vocabulary_size: number of ids, which run from 0 to vocabulary_size - 1.
    """

    pad_id: int = 0
    eos_id: int = 1
    stop_ids: tuple[int, ...] = (1,)
    vocabulary_size: int = 2 + len(_CHARACTERS)

    def encode(self, text: str) -> list[int]:
        """Return one id for each character, without an end id.

        Raises:
            ValueError: if a character is not in the vocabulary.
        """
        ids = []
        for position, character in enumerate(text):
            if character not in _CHARACTER_TO_ID:
                raise ValueError(
                    f"The character {character!a} at position {position} is not in the vocabulary; use only "
                    f"{_CHARACTERS!r}."
                )
            ids.append(_CHARACTER_TO_ID[character])
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text before the first end id, without padding.

        Args:
            ids: Python or numpy integers; those after the first end id are ignored.

        Raises:
            ValueError: if an id is negative or not below `vocabulary_size`.
        """
        characters = []
        for position, token_id in enumerate(ids):
            if not 0 <= token_id < self.vocabulary_size:
                raise ValueError(
                    f"The id {token_id} at position {position} is not in the vocabulary; ids lie between 0 and "
                    f"{self.vocabulary_size - 1}."
                )
            if token_id == self.eos_id:
                break
            if token_id != self.pad_id:
                characters.append(_ID_TO_CHARACTER[int(token_id)])
        return "".join(characters)


def prompt_text(problem: Problem) -> str:
    """Return the prompt of a problem, such as "2,8,1=14:", with the numbers in the order given."""
    return f"{','.join(map(str, problem.numbers))}={problem.target}:"
