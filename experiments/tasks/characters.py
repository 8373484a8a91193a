"""A tokenizer of characters, for small models that are trained from scratch."""

from collections.abc import Iterable
from typing import ClassVar


class Characters:
    """An `rspo_jax.types.Tokenizer` that maps each character to one id; a subclass names its `characters`.

    Attributes:
        characters: those of the vocabulary, each once, in the order of their ids.
        pad_id: the padding of a batch; it stands for no text.
        eos_id: the id that ends a response; it stands for no text.
        stop_ids: all ids that end a response: `eos_id` alone.
        vocabulary_size: number of ids, which run from 0 to vocabulary_size - 1.
    """

    characters: ClassVar[str]
    pad_id: int = 0
    eos_id: int = 1
    stop_ids: tuple[int, ...] = (1,)
    vocabulary_size: int
    _ids: ClassVar[dict[str, int]]

    def __init_subclass__(cls) -> None:
        cls._ids = {character: index for index, character in enumerate(cls.characters, start=2)}
        cls.vocabulary_size = 2 + len(cls._ids)

    def encode(self, text: str) -> list[int]:
        """Return one id for each character, without an end id.

        Raises:
            ValueError: if a character is not in the vocabulary.
        """
        if missing := self.missing(text):
            raise ValueError(f"the character {missing[0]!r} is not in the vocabulary of the tokenizer of characters")
        return [self._ids[character] for character in text]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids, without padding and ends."""
        return "".join(self.characters[int(one) - 2] for one in ids if one not in (self.pad_id, self.eos_id))

    def missing(self, text: str) -> list[str]:
        """Return the characters of a text that are not in the vocabulary."""
        return sorted(set(text) - self._ids.keys())
