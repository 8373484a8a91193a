"""A tokenizer of characters for the texts of reasoning-gym."""

from experiments.tasks.characters import Characters

_OTHERS = "°£€×÷¬’→↔↑↓∧∨⊕∫▀▄█▌▐─│┌┐└┘├✅❌❔"
"""Characters beyond ASCII that questions and answers of the library's data sets use; emoji_mystery has more."""


class GymTokenizer(Characters):
    """One id for each of printable ASCII, line breaks and a few others."""

    characters = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1))) + _OTHERS
