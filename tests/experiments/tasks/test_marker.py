"""The part of a response after a marker: what is judged, and what is counted."""

import pytest
from support.tasks import Characters

from experiments.tasks.countdown import CountdownConfig, CountdownReward
from experiments.tasks.countdown.problems import Problem
from experiments.tasks.countdown.task import CountdownTask
from experiments.tasks.marker import check_marker, judge_after, part_after
from rspo_jax.types import Judgement


def test_the_last_occurrence_counts():
    for marker, response, part in (
        ("", "all", "all"),
        ("</think>", "a</think>b", "b"),
        ("</think>", "a</think>b</think> c\n", " c\n"),
        ("</think>", "a</think>", ""),
        ("</think>", "a", None),
        ("</think>", "a</thin", None),
        ("</think>", "", None),
        ("aa", "aaab", "b"),
    ):
        assert part_after(marker, response) == part


def test_responses_without_the_marker_are_not_shown_to_the_judge():
    shown = []

    def judge(problems, responses):
        shown.append((problems, responses))
        return [Judgement(float(len(response)), True) for response in responses]

    verdicts = judge_after("|", judge, [1, 2, 3], ["a|bc", "def", "x|y|z"], unmarked_reward=-1.0)
    assert shown == [([1, 3], ["bc", "z"])]
    assert verdicts == [Judgement(2.0, True), Judgement(-1.0, False, unmarked=True), Judgement(1.0, True)]
    assert judge_after("|", judge, [1], ["a"]) == [Judgement(0.0, False, unmarked=True)]
    assert len(shown) == 1


def test_a_marker_that_no_response_contains():
    check_marker("", Characters("ab"))
    check_marker("ab", Characters("ab"))
    with pytest.raises(ValueError, match="judge_after is 'x', but the text of a response never contains it"):
        check_marker("x", type("Special", (Characters,), {"encode": lambda self, text: [0]})("ab"))


def test_a_marker_that_the_template_writes():
    class Chat(Characters):
        end = ""

        def chat(self, messages):
            return f"b{messages[0]['content']}" + self.end

    tokenizer = Chat("ab")
    check_marker("b", tokenizer)
    tokenizer.end = "ab"
    check_marker("ba", tokenizer)
    with pytest.raises(ValueError, match="the chat template writes it before the response begins"):
        check_marker("b", tokenizer)


def test_countdown_after_a_marker():
    problem = Problem((2, 8, 1), 14, "2*(8-1)")
    task = CountdownTask(CountdownConfig(judge_after="="), CountdownReward())
    responses = ["2*(8-1)=2", "1+1=2*(8-1)", "2*(8-1)", task.solution(problem)]
    assert [judgement.correct for judgement in task.judge([problem] * 4, responses)] == [False, True, False, True]
    assert [judgement.unmarked for judgement in task.judge([problem] * 4, responses)] == [False, False, True, False]
    with pytest.raises(ValueError, match="The character '<' at position 0 is not in the vocabulary"):
        CountdownTask(CountdownConfig(judge_after="</think>"), CountdownReward())
