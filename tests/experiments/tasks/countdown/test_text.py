"""The prompts of Countdown and the character tokenizer."""

import numpy as np
import pytest

from experiments.tasks.countdown.problems import CountdownConfig, Problem, generate_problems
from experiments.tasks.countdown.text import CharacterTokenizer, prompt_text

tokenizer = CharacterTokenizer()


def test_prompt_gives_the_numbers_in_order_and_the_target():
    assert prompt_text(Problem((3, 17, 25), 42, "25+17")) == "3,17,25=42:"
    assert prompt_text(Problem((25, 3), 75, "25*3")) == "25,3=75:"


def test_every_character_has_its_own_id_after_padding_and_end():
    ids = tokenizer.encode("0123456789+-*/()=,: ")
    assert ids == list(range(2, 22))
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocabulary_size) == (0, 1, 22)


def test_prompts_and_solutions_survive_a_round_trip():
    for problem in generate_problems(CountdownConfig(2, 5, train=200), "train"):
        for text in (prompt_text(problem), problem.solution, f" {problem.solution} = 1"):
            ids = tokenizer.encode(text)
            assert len(ids) == len(text)
            assert tokenizer.decode(ids) == text


def test_nothing_is_encoded_as_nothing():
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("text", ["1+x", "1\n", "1+²", "3×4", "٣", "\0", "\ud800", "1.5", "a"])
def test_an_unknown_character_is_named(text):
    unknown = next(character for character in text if character not in "0123456789+-*/()=,: ")
    with pytest.raises(ValueError, match="is not in the vocabulary") as error:
        tokenizer.encode(text)
    assert f"{unknown!a} at position {text.index(unknown)}" in str(error.value)


def test_decode_stops_at_the_first_end_id_and_skips_padding():
    one, plus, two = tokenizer.encode("1+2")
    assert tokenizer.decode([0, 0, one, 0, plus, two, 1, two, 1, 0]) == "1+2"
    assert tokenizer.decode([1, one]) == ""
    assert tokenizer.decode([0, 0]) == ""


@pytest.mark.parametrize("wrong", [-1, 22, 1_000_000, -(2**31)])
def test_decode_refuses_an_id_outside_of_the_vocabulary(wrong):
    with pytest.raises(ValueError, match=f"The id {wrong} at position 1"):
        tokenizer.decode([2, wrong])


def test_ids_after_the_end_are_not_looked_at():
    assert tokenizer.decode([2, 1, -1, 22]) == "0"


def test_decode_takes_arrays():
    ids = np.array([*tokenizer.encode("17+25"), 1, 0, 0], dtype=np.int32)
    assert tokenizer.decode(ids) == "17+25"
    with pytest.raises(ValueError, match="The id 22 at position 0"):
        tokenizer.decode(np.array([22], dtype=np.int32))
