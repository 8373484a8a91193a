"""Rewards by name: their notation, functions in files and modules, and digests of their sources."""

import functools
import hashlib
import re
import sys

import pytest

from experiments.tasks.prompts.rewards import HandedOver, Reward, notation, parse, parse_all


def test_the_notation():
    assert parse("rewards.py:correct") == Reward("correct", "rewards.py", "correct", 1.0)
    assert parse("some/where@home/rewards.py:brief@0.2") == Reward("brief", "some/where@home/rewards.py", "brief", 0.2)
    assert parse("package.module:scorers.first@-1e-1") == Reward(
        "scorers.first", "package.module", "scorers.first", -0.1
    )
    names = [reward.name for reward in parse_all(["a.py:f", "b.py:f@0", "c:g", "c:f"])]
    assert names == ["f", "f_2", "g", "f_3"]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["rewards.py"], "'rewards.py' cannot be read: write it as FILE.py:NAME"),
        (["rewards.py:"], "cannot be read"),
        ([":correct"], "cannot be read"),
        (["rewards.py:2nd"], "cannot be read"),
        (["rewards.py:f@much"], "the weight of the reward 'rewards.py:f@much' is no number"),
        (["rewards.py:f@nan"], "is nan: give a finite number"),
        (["rewards.py:f@inf"], "is inf: give a finite number"),
        (["rewards.txt/x:f"], "names neither a Python file nor a module"),
        (["a.py:f@0", "a.py:g@0"], "all rewards have the weight 0"),
        (["rewards.py", "a.py:f@x"], "cannot be read.*; the weight"),
    ],
)
def test_notations_that_are_none(texts, words):
    with pytest.raises(ValueError, match=words):
        parse_all(texts)


def test_functions_come_from_files_and_modules(tmp_path, monkeypatch):
    (tmp_path / "helper_of_rewards.py").write_text("VALUE = 7.0\n")
    source = "import helper_of_rewards\ndef score(**_):\n    return [helper_of_rewards.VALUE]\nclass K:\n    f = len\n"
    (tmp_path / "rewards.py").write_text(source)
    monkeypatch.setattr(sys, "path", [*sys.path])
    reward = parse(f"{tmp_path / 'rewards.py'}:score")
    assert reward.load()() == [7.0] and reward.load() is reward.load()
    assert reward.source_digest() == hashlib.sha256(source.encode()).hexdigest()
    assert parse(f"{tmp_path / 'rewards.py'}:K.f").load() is len
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    module = parse("helper_of_rewards:VALUE.is_integer")
    assert module.load()() is True and module.source_digest() is not None
    (tmp_path / "rewards.py").write_text(source + "\n")
    assert reward.source_digest() == hashlib.sha256(source.encode() + b"\n").hexdigest()


def test_what_cannot_be_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "rewards.py"
    for source, name, words in (
        (None, "f", "there is no file .*rewards.py with a reward in it"),
        ("x = 1\n", "f", "rewards.py has no f"),
        ("x = 1\n", "x", "x of .*rewards.py is no function, but int"),
        ("import nothing_of_this_name\n", "f", "importing .*rewards.py fails: ModuleNotFoundError: No module"),
        ("def f(:\n", "f", "importing .*rewards.py fails: SyntaxError"),
        ("import sys; sys.exit('no')\n", "f", "importing .*rewards.py fails: SystemExit: no"),
    ):
        other = tmp_path / re.sub(r"\W", "", words)[:20]
        other.mkdir(exist_ok=True)
        path = other / "rewards.py"
        path.unlink(missing_ok=True)
        sys.modules.pop(f"_rewards_{hashlib.sha256(bytes(path.resolve())).hexdigest()[:16]}", None)
        if source is not None:
            path.write_text(source)
        with pytest.raises(ValueError, match=words):
            parse(f"{path}:{name}").load()
    with pytest.raises(ValueError, match="importing no_module_of_this_name fails: ModuleNotFoundError"):
        parse("no_module_of_this_name:f").load()
    with pytest.raises(ValueError, match="was a function in a Python program, which cannot be found again"):
        parse("python:correct").load()


def given(completions, **_):
    return [1.0] * len(completions)


def test_functions_that_are_handed_over():
    class Scorer:
        def __call__(self, completions, **_):
            return [0.5] * len(completions)

    local = lambda completions, **_: [0.0] * len(completions)  # noqa: E731
    texts = [notation(one) for one in (given, local, functools.partial(given, x=1), Scorer(), (local, 0.5), "a.py:f")]
    module = __name__
    assert texts == [f"{module}:given", "python:lambda", "python:given", "python:Scorer", "python:lambda@0.5", "a.py:f"]
    rewards = parse_all(texts)
    assert [reward.name for reward in rewards] == ["given", "lambda", "given_2", "Scorer", "lambda_2", "f"]
    assert [reward.load()(completions="ab") for reward in rewards[:4]] == [[1.0] * 2, [0.0] * 2, [1.0] * 2, [0.5] * 2]
    assert rewards[4].weight == 0.5 and rewards[5].function is None and isinstance(texts[0], HandedOver)
    digests = [reward.source_digest() for reward in rewards[:4]]
    assert all(digests) and digests[0] == digests[2] != digests[1]
    assert parse(notation(len)).source_digest() is None
    for wrong in (3, (given, "1"), (given, True), None, [given]):
        with pytest.raises(TypeError, match=r"a reward is a function|the weight of a reward must be a number"):
            notation(wrong)
