"""Splits by share and by count: the same prompt is never in two, and nothing but prompt and seed moves one."""

import hashlib

import pytest

from experiments.tasks.chats import Message
from experiments.tasks.splits import SPLITS, Overlaps, check_shares, draw, split_of

PROMPTS = [f"Q{number}" for number in range(2000)]


def in_split(split, validation, test, seed=0):
    return {prompt for prompt in PROMPTS if split_of(prompt, validation, test, seed) == split}


def test_shares_follow_from_the_hash_of_seed_and_prompt():
    for prompt in PROMPTS[:200]:
        place = int(hashlib.sha256(f"3/{prompt}".encode()).hexdigest()[:16], 16) / 2**64
        split = "test" if place < 0.25 else "validation" if place >= 0.9 else "train"
        assert split_of(prompt, 0.1, 0.25, 3) == split
    parts = [in_split(split, 0.1, 0.25) for split in SPLITS]
    assert sum(map(len, parts)) == len(PROMPTS) == len(set.union(*parts))
    # Four standard deviations of a binomial distribution.
    assert abs(len(parts[1]) - 200) < 54 and abs(len(parts[2]) - 500) < 78


def test_a_larger_share_keeps_what_a_smaller_one_has_and_leaves_the_other_alone():
    assert in_split("test", 0.1, 0.1) < in_split("test", 0.1, 0.2)
    assert in_split("validation", 0.1, 0.1) == in_split("validation", 0.1, 0.2) < in_split("validation", 0.3, 0.2)
    assert in_split("test", 0.0, 0.2) != in_split("test", 0.0, 0.2, seed=1)
    assert in_split("train", 0.0, 0.0) == set(PROMPTS)
    chats = [(Message("user", prompt),) for prompt in PROMPTS[:50]]
    assert len({split_of(chat, 0.3, 0.3, 0) for chat in chats}) == 3


def test_impossible_shares_are_refused():
    check_shares(0.0, 0.0)
    check_shares(0.5, 0.4)
    wrong = {(-0.1, 0.0): "validation_share is -0.1", (0.0, 1.0): "test_share is 1.0", (float("nan"), 0.0): "nan"}
    wrong |= {(0.5, 0.5): "leaves nothing to train on"}
    for shares, reason in wrong.items():
        with pytest.raises(ValueError, match=reason):
            check_shares(*shares)


def test_a_prompt_that_is_drawn_is_nowhere_in_the_rest():
    prompts = ["a", "b", "c", "a", "b", "c"]
    for count in range(1, 6):
        rest, drawn = draw(prompts, lambda prompt: prompt, count, seed=0)
        assert len(drawn) == count and not set(rest) & set(drawn)


def test_prompts_in_two_files_are_counted():
    overlaps = Overlaps()
    assert overlaps.note("train", ["a", "b", "c"]) == overlaps.note("test", ["d", "e"]) == []
    (sentence,) = overlaps.note("test", ["b", "c", "d"])
    assert sentence.startswith("the splits train and test share prompts, 2 in number")
