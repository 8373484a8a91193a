"""The text of each token of a response."""

from collections.abc import Callable, Sequence

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def text_pieces(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> list[str]:
    """Cut the text of a response into the texts of its tokens, which join to it exactly.

    A token by itself may decode to a part of a character, or lose a leading space. So tokens are decoded together with
    those before them, and a token gets what it adds to their text; one that ends inside a character adds nothing, and
    the token that completes the character adds all of it. Only a few tokens before each one are decoded again.

    Args:
      decode: `Tokenizer.decode`.
      ids: n token ids.

    Returns:
      n texts.
    """
    whole, pieces, cut = decode(ids), [], 0
    start, done = 0, 0  # the window begins at `start`; the tokens before `done` have their texts
    for end in range(1, len(ids) + 1):
        known, text = decode(ids[start:done]), decode(ids[start:end])
        piece = "" if text.endswith(_INCOMPLETE) or not text.startswith(known) else text[len(known) :]
        # A decoder may treat the beginning of a text in a way of its own: what is not in the whole text stays open.
        if piece and whole.startswith(piece, cut):
            start, done, cut = done, end, cut + len(piece)
            pieces.append(piece)
        else:
            pieces.append("")
    if pieces:
        pieces[-1] += whole[cut:]
    return pieces
