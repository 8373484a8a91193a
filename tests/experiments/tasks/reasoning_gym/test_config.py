"""The settings of a reasoning-gym task as the flags write them; what needs the library is in test_task.py."""

import re

import pytest

from experiments.tasks.reasoning_gym.config import DataSet, ReasoningGymConfig


def test_weights_and_difficulty_of_each_data_set():
    config = ReasoningGymConfig(
        datasets=("chain_sum:0.5", "countdown", "maze:2"),
        difficulty=(
            "level=1",
            "countdown.level=3",
            "maze.size.level=2",
            "chain_sum.max_terms=4",
            "chain_sum.allow_negation=true",
            "countdown.operators=['+', '-']",
            "countdown.word=left=right",
        ),
    )
    assert config.data_sets() == [
        DataSet("chain_sum", 0.5, 1, {}, {"max_terms": 4, "allow_negation": True}),
        DataSet("countdown", 1.0, 3, {}, {"operators": ["+", "-"], "word": "left=right"}),
        DataSet("maze", 2.0, 1, {"size": 2}, {}),
    ]


@pytest.mark.parametrize(
    ("datasets", "difficulty", "message"),
    [
        ((), (), "name the data sets with task.datasets"),
        (("a:",), (), "'a:' is not NAME or NAME:WEIGHT"),
        (("a:0",), (), "with a weight above 0"),
        (("a:-1",), (), "with a weight above 0"),
        (("a:inf",), (), "with a weight above 0"),
        (("a:nan",), (), "with a weight above 0"),
        ((":1",), (), "':1' is not NAME"),
        (("a", "a:2"), (), "names a twice"),
        (("a",), ("3",), "'3' has none of the forms level=1"),
        (("a",), ("a=3",), "'a=3' has none of the forms"),
        (("a",), ("a.b.c=3",), "'a.b.c=3' has none of the forms"),
        (("a",), ("a.b.c.level=3",), "none of the forms"),
        (("a",), ("level=high",), "a whole number from 0 on"),
        (("a",), ("a.level=-1",), "a whole number from 0 on"),
        (("a",), ("a.level=true",), "a whole number from 0 on"),
        (("a",), ("b.c=3",), "is for b, which is not among task.datasets"),
        (("a",), ("b.level=3",), "is for b, which is not among"),
        (("a",), ("a.seed=3",), "the seed of all data sets is task.seed"),
        (("a",), ("a.size=3",), "sets no difficulty"),
    ],
)
def test_entries_that_are_refused(datasets, difficulty, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ReasoningGymConfig(datasets, difficulty).data_sets()


def test_all_mistakes_are_named_at_once(monkeypatch):
    monkeypatch.setattr("experiments.tasks.reasoning_gym.config.installed_version", lambda: "1.2")
    config = ReasoningGymConfig(
        ("a:x", "b"), ("c.d=1",), validation=0, workers=0, time_limit=9, wall_limit=3, version="1.1"
    )
    with pytest.raises(ValueError) as refused:
        config.check()
    for part in ("reasoning-gym 1.1, but version 1.2 is installed", "'a:x'", "c, which", "task.validation", "workers"):
        assert part in str(refused.value)
    assert "wall_limit (3) is below task.time_limit (9)" in str(refused.value)


def test_without_the_package_the_way_to_it_is_named(monkeypatch):
    monkeypatch.setattr("experiments.tasks.reasoning_gym.config.installed_version", lambda: "")
    with pytest.raises(ValueError, match=r"pip install 'rspo-jax\[reasoning-gym\]'"):
        ReasoningGymConfig(("chain_sum",)).check()
