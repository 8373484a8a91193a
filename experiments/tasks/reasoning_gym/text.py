"""A tokenizer of characters for the texts of reasoning-gym."""

from collections.abc import Iterable

_OTHERS = "°£€×÷¬’→↔↑↓∧∨⊕∫▀▄█▌▐─│┌┐└┘├✅❌❔"
"""Characters beyond ASCII that questions and answers of the library's data sets use; emoji_mystery has more."""
_CHARACTERS = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1))) + _OTHERS
_CHARACTER_TO_ID = {character: index for index, character in enumerate(_CHARACTERS, start=2)}


class GymTokenizer:
    """An `rspo_jax.types.Tokenizer` that maps each character to one id: printable ASCII, line breaks and a few others.

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
        if missing := self.missing(text):
            raise ValueError(f"the character {missing[0]!r} is not in the vocabulary of the tokenizer of characters")
        return [_CHARACTER_TO_ID[character] for character in text]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids, without padding and ends."""
        return "".join(_CHARACTERS[int(one) - 2] for one in ids if one not in (self.pad_id, self.eos_id))

    def missing(self, text: str) -> list[str]:
        """Return the characters of a text that are not in the vocabulary."""
        return sorted(set(text) - set(_CHARACTERS))
