"""The help of the training command, and what it says about mistyped flags."""

import contextlib
import io

import pytest

from experiments import flags, train
from experiments.config import RUNS
from experiments.errors import UserError


@pytest.fixture(scope="module")
def commands():
    return {name: train._command(name, run_type()) for name, run_type in RUNS.items()}


@pytest.fixture(scope="module")
def known(commands):
    return {name: flags.flags_of(command) for name, command in commands.items()}


def help_of(command, *arguments):
    """The text that a call with these arguments prints before it ends."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as exit:
        flags.answer_help("PROG", command, arguments)
    assert exit.value.code == 0
    return said.getvalue()


def listed(text):
    """The flags at the beginnings of lines."""
    words = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    return [word.replace("[no-]", "") for word in words]


def test_every_flag_that_comes_first_belongs_to_a_task(known):
    names = {flag.names[0] for of_task in known.values() for flag in of_task}
    assert set(flags.FIRST) <= names


@pytest.mark.parametrize("task", RUNS)
def test_the_short_help_shows_the_first_flags_and_a_line_for_each_group(task, commands, known):
    text = help_of(commands[task], "--help")
    names = [flag.names[0] for flag in known[task]]
    assert listed(text) == [name for name in flags.FIRST if name in names]
    assert 10 <= len(listed(text)) <= 20
    counts = {}
    for flag in known[task]:
        counts[flag.group] = counts.get(flag.group, 0) + 1
    lines = [line.split() for line in text.partition(f"All {len(names)} flags")[2].splitlines()]
    groups = {words[0]: words for words in lines if len(words) > 2 and words[1].isdigit()}
    assert {group: int(words[1]) for group, words in groups.items()} == counts
    assert "--help GROUP" in text and (commands[task].__doc__ or "")[:30] in text


def test_every_group_without_a_class_of_its_own_is_described(known):
    for of_task in known.values():
        assert {flag.group for flag in of_task if not flag.about} <= set(flags.ABOUT)


@pytest.mark.parametrize("task", RUNS)
def test_the_long_help_shows_every_flag_once(task, commands, known):
    shown = listed(help_of(commands[task], "-h", "all"))
    assert sorted(shown) == sorted(flag.names[0] for flag in known[task])


def test_the_help_of_a_group(commands):
    text = help_of(commands["countdown"], "--steps", "3", "--help", "sampler")
    assert set(listed(text)) == {
        f"--sampler.{name}" for name in ("max-new-tokens", "temperature", "top-k", "top-p", "slots")
    }
    assert "[12]" in text and "likeliest" in text
    assert "--objective" in listed(help_of(commands["countdown"], "--help", "objective"))
    assert "--warm-start.optimizer.beta1" in listed(help_of(commands["countdown"], "--help", "warm_start"))


@pytest.mark.parametrize("word", ["learning-rate", "learning_rate", "--learning-rate"])
def test_the_help_of_a_part_of_names(word, commands):
    expected = ["--decay-learning-rate", "--optimizer.learning-rate", "--warm-start.optimizer.learning-rate"]
    assert listed(help_of(commands["countdown"], "--help", word)) == expected


def test_help_says_the_choices_and_no_absent_defaults(commands):
    text = " ".join(help_of(commands["countdown"], "--help", "objective").split())
    assert "One of rspo, gmpo, gspo" in text and "[rspo]" in text
    assert "None" not in text


def test_help_about_nothing(commands):
    with pytest.raises(UserError, match=r"^no group and no flag is called 'chess'; the groups are run, objective, "):
        flags.answer_help("PROG", commands["countdown"], ["--help", "chess"])


def test_arguments_that_ask_for_no_help(commands):
    assert flags.answer_help("PROG", commands["countdown"], ["--steps", "3"]) is None


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--learing-rate", "--optimizer.learning-rate"),
        ("--learning-rate", "--optimizer.learning-rate"),
        ("--optimizer.learning-rat=3", "--optimizer.learning-rate"),
        ("--lr-decay-learning-rate", "--decay-learning-rate"),
        ("--step", "--steps"),
        ("--trainer.steps", "--steps"),
        ("--group_siz", "--group-size"),
        ("--max-new-token", "--sampler.max-new-tokens"),
        ("--rundir", "--run-dir"),
        ("--no-resum", "--no-resume"),
        ("--temperature", "--sampler.temperature"),
        ("--mesh.expret", "--mesh.expert"),
    ],
)
def test_the_flag_that_was_meant(given, meant, known):
    spelling = given.partition("=")[0].replace("_", "-")
    assert flags.mistyped(known["countdown"], [given, "3"]) == f"there is no flag {spelling} (did you mean {meant}?)"


def test_all_mistyped_flags_are_named_at_once(known):
    arguments = ["--bogus", "--steps", "3", "--gamma_min=0.5", "--sede", "1", "--bogus"]
    assert flags.mistyped(known["countdown"], arguments) == (
        "there is no flag --bogus; there is no flag --sede (did you mean --seed?)"
    )
    assert flags.mistyped(known["countdown"], ["--steps", "3", "--no-resume", "--help", "-3"]) is None


def test_a_wrong_value_keeps_the_words_of_the_parser(capsys):
    with pytest.raises(SystemExit) as exit:
        train.parse(["countdown", "--steps", "many"])
    assert exit.value.code == 2
    assert "invalid literal" in capsys.readouterr().err
