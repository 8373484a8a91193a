"""The texts of single tokens join to the text of the response, whatever the tokenizer does with characters, spaces and
special tokens."""

import random

import tokenizers

from rspo_jax.rollouts import text_pieces

TEXTS = (
    "",
    "a",
    " two  words\n\n",
    "naïve café",
    "日本語 и русский",
    "👩\u200d💻 → 🇨🇭!",
    "\u202eabc\ufeff",
    "e\u0301\u0327",
    "x\ufffdy\ufffd",
)


def bytes_of(text):
    return list(text.encode())


def decode_bytes(ids):
    """Every id is a byte, as the worst byte-level vocabulary has it; 256 and above are special tokens."""
    return bytes(one for one in ids if one < 256).decode(errors="replace")


def test_bytes_join_to_characters_that_the_last_byte_gets():
    assert text_pieces(decode_bytes, bytes_of("aé日")) == ["a", "", "é", "", "", "日"]
    assert text_pieces(decode_bytes, [256, *bytes_of("é"), 256, *bytes_of("b"), 300]) == ["", "", "é", "", "b", ""]
    assert text_pieces(decode_bytes, []) == []


def test_pieces_of_any_text_join_to_it():
    rng = random.Random(0)
    for text in TEXTS:
        assert "".join(text_pieces(decode_bytes, bytes_of(text))) == text
    for _ in range(200):  # most of these are no UTF-8, and some end inside a character
        ids = [rng.choice((rng.randrange(256), 0xE6, 0x97, 0xA5, 300)) for _ in range(rng.randrange(30))]
        pieces = text_pieces(decode_bytes, ids)
        assert (len(pieces), "".join(pieces)) == (len(ids), decode_bytes(ids))


def test_a_decoder_that_drops_the_first_space_loses_none_between_tokens():
    words = ["▁two", "▁", "wor", "ds", "▁here"]

    def decode(ids):
        return "".join(words[one] for one in ids).replace("▁", " ").removeprefix(" ")

    assert text_pieces(decode, [0, 2, 3, 4]) == ["two", "wor", "ds", " here"]
    pieces = text_pieces(decode, [1, 0, 1, 4])
    assert "".join(pieces) == decode([1, 0, 1, 4]) and len(pieces) == 4


def test_a_decoder_that_changes_what_it_has_said_still_joins():
    """Clean-up of spaces before punctuation reaches back over tokens."""
    words = ["hello", " ", ".", "there"]

    def decode(ids):
        return "".join(words[one] for one in ids).replace(" .", ".")

    ids = [0, 1, 2, 1, 3, 1, 2]
    assert "".join(text_pieces(decode, ids)) == decode(ids) == "hello. there."


def test_a_byte_level_tokenizer_with_merges():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert "".join(text_pieces(tokenizer.decode, ids)) == text
    rng = random.Random(1)
    for _ in range(50):
        ids = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(20)]
        assert "".join(text_pieces(tokenizer.decode, ids)) == tokenizer.decode(ids)
