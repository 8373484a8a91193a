"""Countdown for chat models: prompts, the answer between the tags in the notations of chat models, files and splits."""

import dataclasses
import json

import pytest
from support.data_sets import save_to_disk
from support.tasks import ChatCharacters

from experiments.evaluation.subject import FOLDER_TASKS, Source
from experiments.tasks.countdown import Problem, verify
from experiments.tasks.countdown.chat import (
    ChatCountdownConfig,
    ChatCountdownTask,
    answer_of,
    expression_of,
    load_problems,
)
from experiments.tasks.splits import SPLITS
from rspo_jax.types import Judgement

PROBLEM = Problem((44, 19, 35), 98, "44+19+35")
SMALL = ChatCountdownConfig(train=20, validation=5, test=5)


def made(**changes) -> ChatCountdownTask:
    return ChatCountdownTask(dataclasses.replace(SMALL, **changes), ChatCharacters())


def write(path, *records) -> str:
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


def test_the_prompt_is_that_of_tinyzero():
    prompt = made().prompt(PROBLEM)
    assert prompt.startswith("<system>You are a helpful assistant.")
    assert "<user>Using the numbers [44, 19, 35], create an equation that equals 98. You can use" in prompt
    assert prompt.endswith("for example <answer> (1 + 2) / 3 </answer>.<assistant>")
    own = made(prompt="{target}? {numbers} <answer>", system="", begin="Let me think.\n<think>")
    assert own.prompt(PROBLEM) == "<user>98? [44, 19, 35] <answer><assistant>Let me think.\n<think>"


@pytest.mark.parametrize("marker", ["", "</think>"])
def test_worked_solutions_of_generated_problems_are_right(marker):
    task = made(judge_after=marker)
    for split in SPLITS:
        problems = task.problems(split)
        assert len(problems) == {"train": 20, "validation": 5, "test": 5}[split]
        assert {len(problem.numbers) for problem in problems} <= {3, 4}
        judged = task.judge(problems, [task.solution(problem) for problem in problems])
        assert judged == [Judgement(1.0, True)] * len(problems)


def test_the_last_answer_between_the_tags_is_judged():
    answers = {
        "<answer>1</answer>": "1",
        "<think><answer>1</answer></think> <answer> 2\n</answer> that is it": " 2\n",
        "<answer>1</answer> or <answer>2": "1",
        "<answer><answer>1</answer></answer>": "1</answer>",
        "<answer></answer>": "",
        "</answer><answer>1": None,
        "<answer>1": None,
        "1</answer>": None,
        "44+19+35": None,
        "": None,
    }
    for response, answer in answers.items():
        assert answer_of(response) == answer
    assert answer_of("so <answer> 1+2 ", is_cut=True) == " 1+2 "
    assert answer_of("so", is_cut=True) is None


def test_answers_are_read_in_the_notations_of_chat_models():
    numbers, target = (6, 8, 2, 3), 15
    right = [
        "(6 + 8) + 3 - 2",
        "6 + 8 + 3 - 2 = 15",
        " 6+8+3-2=15. ",
        "6 + 8 + 3 − 2",
        "$6 + 8 + 3 - 2$",
        "\\(6 + 8 + 3 - 2 = 15\\)",
        "\\[6 + 8\n + 3 - 2\\]",
        "\\boxed{6 + 8 + 3 - 2}",
        "\\left(6 + 8\\right) + 3 - 2",
    ]
    for answer in right:
        assert verify(expression_of(answer, target), numbers, target).correct, answer
    forms = ["6*8/(2*3)", "6 × 8 ÷ (2 ⋅ 3)", "6 \\times 8 \\div (2 \\cdot 3)", "\\frac{6 \\times 8}{2 \\cdot 3}"]
    forms += ["\\dfrac{6·8}{2∗3} = 8", "\\frac{8}{\\frac{2*3}{6}}", "$$\\boxed{6 \\times 8 / (2 \\times 3)}$$"]
    for answer in forms:
        assert verify(expression_of(answer, 8), numbers, 8).correct, answer
    wrong = [
        "6 + 8 / 2 * 3 - 3",
        "2 × 6 + 8 - 3 - 2",
        "6 + 8 + 3 - 2 = 16",
        "15 = 6 + 8 + 3 - 2",
        "6 + 8 = 14 + 3 - 2 = 15",
        "6 + 8 + 3 - 2 = 15 = 15",
        "15",
        "The answer is 6 + 8 + 3 - 2",
        "6 + 8 + 3",
        "6 + 8 + 3 - 2 # " + "0" * 500,
        "\\frac{6}{8",
        "\\input{/etc/passwd}",
        "",
        "=",
        "=15",
        "__import__('os')",
    ]
    for answer in wrong:
        assert not verify(expression_of(answer, target), numbers, target).correct, answer


def test_rewards_and_hostile_responses():
    responses = [
        "<think>44+19=63</think> <answer> 44 + 19 + 35 = 98 </answer>",
        "<answer>44 + 19</answer>",
        "<answer>none</answer>",
        "44 + 19 + 35",
        "<answer>" * 100_000,
        "<answer>" * 100_000 + "</answer>" * 100_000,
        "<answer>" + "\\frac{" * 100_000 + "</answer>",
        "<answer>" + "(" * 100_000 + "</answer>",
        "\ud800\x00<answer>\ud800\x00</answer>",
    ]
    correct = [index == 0 for index in range(len(responses))]
    plain = made().judge([PROBLEM] * len(responses), responses)
    assert plain == [Judgement(float(one), one) for one in correct]
    rewarded = made(format_reward=0.1).judge([PROBLEM] * len(responses), responses)
    assert [one.reward for one in rewarded] == [1.0, 0.1, 0.1, 0.0, 0.0, 0.1, 0.1, 0.1, 0.1]
    assert [one.correct for one in rewarded] == correct
    some = made(use_all=False).judge([PROBLEM._replace(target=63)] * 2, responses[:2])
    assert [one.correct for one in some] == [False, True]
    after = made(judge_after="</think>").judge([PROBLEM] * 2, ["<answer>44+19+35</answer></think>", responses[0]])
    assert after == [Judgement(0.0, False), Judgement(1.0, True)]


def test_an_answer_that_a_stop_string_ends_is_judged():
    tokenizer = ChatCharacters()
    tokenizer.stop_strings = ("</answer>",)  # pyright: ignore[reportAttributeAccessIssue]
    task = ChatCountdownTask(SMALL, tokenizer)
    assert task.judge([PROBLEM], ["<think>so</think><answer>44+19+35"]) == [Judgement(1.0, True)]


def test_files_of_the_public_layout_are_split_whatever_the_order_of_the_numbers(tmp_path):
    rows = [{"target": target, "nums": [target % 7, 5, target % 11]} for target in range(10, 90)]
    turned = [row | {"nums": row["nums"][::-1]} for row in rows]
    path = write(tmp_path / "a.jsonl", *rows, *turned)
    config = dataclasses.replace(SMALL, train_path=path, validation_share=0.2, test_share=0.2)
    parts = {split: load_problems(config, split) for split in SPLITS}
    names = {split: {(*sorted(one.numbers), one.target) for one in problems} for split, problems in parts.items()}
    assert all(parts.values()) and sum(map(len, parts.values())) == 160
    assert sum(map(len, names.values())) == len(set.union(*names.values())) == 80
    assert parts["train"][0].solution == ""
    folder = save_to_disk(tmp_path / "saved", {"train": rows, "test": rows[:3]})
    saved = dataclasses.replace(config, train_path=folder, test_path=folder, validation_share=0.5)
    assert load_problems(saved, "test") == [Problem(tuple(row["nums"]), row["target"], "") for row in rows[:3]]
    with pytest.raises(ValueError, match="no worked solutions; train without a warm start"):
        ChatCountdownTask(saved, ChatCharacters()).solution(load_problems(saved, "test")[0])
    with pytest.raises(ValueError, match="has the splits train, test, but no 'validation'"):
        load_problems(dataclasses.replace(saved, validation_path=folder), "validation")


def test_wrong_records_and_settings_are_refused(tmp_path):
    wrong = {
        "'nums' is missing or null; the record has 'numbers', 'target'": {"numbers": [1, 2], "target": 3},
        "'nums' is '1 2': it must be a list": {"nums": "1 2", "target": 3},
        "'nums' is [1]": {"nums": [1], "target": 3},
        "'nums' is [1, -2]": {"nums": [1, -2], "target": 3},
        "'nums' is [1, 2.5]": {"nums": [1, 2.5], "target": 3},
        "'nums' is [1, True]": {"nums": [1, True], "target": 3},
        "'target' is '3': it must be a whole number": {"nums": [1, 2], "target": "3"},
        "'target' is 3.5": {"nums": [1, 2], "target": 3.5},
    }
    path = write(tmp_path / "a.jsonl", *wrong.values())
    with pytest.raises(ValueError) as caught:
        load_problems(dataclasses.replace(SMALL, test_path=path), "test")
    *lines, hint = str(caught.value).splitlines()
    assert "task.numbers_field" in hint
    for number, (line, reason) in enumerate(zip(lines, wrong, strict=True), start=1):
        assert line.startswith(f"{path}, line {number}: {reason}")
    named = dataclasses.replace(SMALL, test_path=write(tmp_path / "b", {"n": [1, 2], "t": 3}), numbers_field="n")
    assert load_problems(dataclasses.replace(named, target_field="t"), "test") == [Problem((1, 2), 3, "")]
    with pytest.raises(ValueError, match="there are no train problems: give a file of them as train_path"):
        load_problems(named, "train")
    settings = {
        "prompt has no {numbers} and no {target}": {"prompt": "<answer>"},
        "neither prompt nor system asks for them": {"prompt": "{numbers} {target}"},
        "format_reward is 1.0": {"format_reward": 1.0},
        "validation_path is given alone": {"validation_path": "a"},
        "numbers_min is 1": {"numbers_min": 1},
        "test_share is 1.5": {"test_share": 1.5},
    }
    for reason, change in settings.items():
        with pytest.raises(ValueError, match=reason):
            made(**change)


def test_a_model_of_a_folder_can_be_evaluated_on_it(tmp_path):
    path = write(tmp_path / "a.jsonl", {"nums": [44, 19, 35], "target": 98})
    source = Source(model=tmp_path, task="countdown_chat", problems=path, judge_after="</think>", system="")
    task = FOLDER_TASKS["countdown_chat"]("countdown_chat", source, ChatCharacters())  # pyright: ignore
    (problem,) = task.problems("test")
    assert task.prompt(problem).startswith("<user>Using the numbers [44, 19, 35]")
    assert task.judge([problem], ["</think><answer>44+19+35</answer>"]) == [Judgement(1.0, True)]
