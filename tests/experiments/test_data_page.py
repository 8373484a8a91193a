"""The examples of docs/data.md are read as the page says, and its flags exist."""

import dataclasses
import re
from pathlib import Path

import pytest

from experiments.config import RUNS
from experiments.tasks.chats import Asked, Message, read_prompt
from experiments.tasks.code.problems import Test
from experiments.tasks.code.problems import load_problems as load_code
from experiments.tasks.countdown.chat import ChatCountdownConfig
from experiments.tasks.countdown.chat import load_problems as load_countdown
from experiments.tasks.mathematics.config import MathConfig
from experiments.tasks.mathematics.dataset import load_problems as load_mathematics
from experiments.tasks.records import read_records

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


@pytest.fixture
def examples(tmp_path) -> list[str]:
    """The files of the page, in their order."""
    blocks = re.findall(r"```jsonl\n(.*?)```", PAGE, re.DOTALL)
    for number, block in enumerate(blocks):
        (tmp_path / f"{number}.jsonl").write_text(block, encoding="utf-8")
    return [str(tmp_path / f"{number}.jsonl") for number in range(len(blocks))]


def test_every_example_is_read(examples):
    prompts, layout, gsm8k, code, countdown = examples
    question = Message("user", "What is 2 + 3?")
    assert [read_prompt(record.fields) for record in read_records(prompts)] == [
        Asked("What is 2 + 3?"),
        Asked((Message("system", "Be brief."), question)),
        Asked((question,), "It is \\boxed{5}."),
    ]
    answered = load_mathematics(MathConfig(answer_field="answer", test_path=prompts), "test")
    assert [problem.references for problem in answered] == [("5",), ("5",), ("5", "five")]
    named = MathConfig(prompt_field="question", answer_field="label", test_path=layout)
    assert [one.references for one in load_mathematics(named, "test")] == [("2", "-2"), ("13.5",)]
    assert load_mathematics(MathConfig(test_path=gsm8k), "test")[0].answer == "5"
    tests = [problem.tests for problem in load_code(code)]
    assert tests == [(Test("2\n", "4\n"),), (Test([1, 2], 3),), (Test([1], -1),)]
    numbers = load_countdown(ChatCountdownConfig(test_path=countdown), "test")
    assert [(problem.numbers, problem.target) for problem in numbers] == [((44, 19, 35), 98), ((63, 95, 96), 64)]


def test_every_flag_of_the_page_is_one_of_a_task():
    fields = {
        field.name
        for run in RUNS.values()
        for option in dataclasses.fields(run)
        if option.name == "task"
        for field in dataclasses.fields(option.default)  # pyright: ignore[reportArgumentType]
    }
    named = {flag.replace("-", "_") for flag in re.findall(r"--task\.(?:no-)?([a-z-]+)", PAGE)}
    assert len(named) > 15 and named <= fields
