"""The mathematics task: prompts, rewards, hostile answers in its processes, and the whole data sets if given.

Set RSPO_MATH_DATA to a folder with the six files that `experiments.bench_verifier` names, and the verifier is tried
on all of them.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support.tasks import ChatCharacters

from experiments.bench import verifier as bench_verifier
from experiments.evaluation.subject import Votes
from experiments.tasks.mathematics.config import MathConfig
from experiments.tasks.mathematics.problems import SETS, Problem
from experiments.tasks.mathematics.task import LONGEST_RESPONSE, MathTask
from experiments.tasks.pool import FAILURES, Outcome, WorkerPool
from rspo_jax.types import Judgement

DATA = os.environ.get("RSPO_MATH_DATA", "")
QUESTION = Problem("What is {9} + 9?", "18", "So \\boxed{18}.")


@pytest.fixture(scope="module")
def task() -> Iterator[MathTask]:
    """Rewards that distinguish right, wrong and missing answers, and a short time limit for hostile ones."""
    config = MathConfig(workers=2, time_limit=1.5, correct_reward=1.0, wrong_reward=0.25, unanswered_reward=-0.5)
    task = MathTask(config, ChatCharacters())
    yield task
    task.close()


def test_prompts_are_written_by_the_tokenizer(task):
    asked = "What is {9} + 9?\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert task.prompt(QUESTION) == f"<user>{asked}<assistant>"
    config = MathConfig(system="Think, and use \\boxed{}.", prompt="Q: {problem}")
    told = MathTask(config, ChatCharacters())
    assert told.prompt(QUESTION) == "<system>Think, and use \\boxed{}.<user>Q: What is {9} + 9?<assistant>"
    assert told.solution(QUESTION) == "So \\boxed{18}."


def test_problems_are_read_once(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "Q", "answer": "#### 5"}))
    task = MathTask(MathConfig(test_path=str(path)), ChatCharacters())
    problems = task.problems("test")
    path.unlink()
    assert task.problems("test") is problems
    assert [problem.answer for problem in problems] == ["5"]


def test_any_of_several_references_earns(task, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": [{"role": "user", "content": "Q"}], "answer": ["t(0,4]", "1/2", 3, "0.5"]}))
    config = dataclasses.replace(task.config, prompt_field="prompt", test_path=str(path), train_path=str(path))
    several = MathTask(dataclasses.replace(config, validation=0), ChatCharacters())
    (problem,) = several.problems("test")
    assert "test: the judge cannot read 1 of 4 references" in capsys.readouterr().out
    responses = [f"\\boxed{{{answer}}}" for answer in ("3", "0.50", "t(0,4]", "4", "t(0,5]")]
    assert [one.correct for one in several.judge([problem] * 5, responses)] == [True, True, True, False, False]
    assert several.answers([problem] * 4, responses[:4]) == ["3", "1/2", "t(0,4]", "4"]
    assert several.prompt(problem).startswith("<user>Q\nPlease reason")
    several.problems("train")
    assert "the splits test and train share prompts, 1 in number" in capsys.readouterr().out
    several.close()


def test_a_box_before_the_marker_earns_nothing(task):
    marked = MathTask(dataclasses.replace(task.config, judge_after="</think>"), ChatCharacters())
    responses = ["\\boxed{18}</think>17", "\\boxed{17}</think>\\boxed{18}", "\\boxed{18}", marked.solution(QUESTION)]
    right, unanswered = Judgement(1.0, True), Judgement(-0.5, False)
    verdicts = marked.judge([QUESTION] * 4, responses)
    assert verdicts == [unanswered, right, Judgement(-0.5, False, unmarked=True), right]
    assert marked.answers([QUESTION] * 4, responses) == [None, "18", None, "18"]
    marked.close()


def test_references_that_cannot_be_read_are_said_when_they_are_loaded(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(record_of("olympiadbench", answer)) for answer in ("5", "t(0,4]", "x \\to y")))
    task = MathTask(MathConfig("olympiadbench", test_path=str(path)), ChatCharacters())
    for _ in range(2):
        assert len(task.problems("test")) == 3
    printed = capsys.readouterr().out
    assert "test: the judge cannot read 2 of 3 references" in printed
    assert printed.endswith("\n  t(0,4]\n  x \\to y\n")
    assert printed.count("cannot read") == 1


def test_a_wrong_config_is_refused_at_once():
    with pytest.raises(ValueError, match="there is no set"):
        MathTask(MathConfig("algebra"), ChatCharacters())


def test_rewards(task):
    problems = [QUESTION, QUESTION, QUESTION, QUESTION._replace(answer="7")]
    responses = ["\\boxed{18}", "\\boxed{7}", "18", "\\boxed{7}"]
    assert task.judge(problems, responses) == [
        Judgement(1.0, True),
        Judgement(0.25, False),
        Judgement(-0.5, False),
        Judgement(1.0, True),
    ]
    assert task.judge([], []) == []
    votes = task.answers(problems[:3], ["\\boxed{9 + 9}", "\\boxed{14/2}", "18"])
    assert votes == ["18", "7", None] and isinstance(task, Votes)
    with pytest.raises(ValueError, match="shorter"):
        task.judge([QUESTION], [])


def test_what_the_processes_are_given(monkeypatch):
    """The pool is given the answer, the end of the response, and whether a box is needed; a limit met earns nothing."""
    given = []

    def judge(pool: WorkerPool, items: Sequence[tuple[str, str, bool]]) -> list[Outcome]:
        given.extend(items)
        return [Outcome({"answered": True, "correct": True}), Outcome(None, "time limit", "no answer within 5 s")]

    monkeypatch.setattr(WorkerPool, "map", judge)
    task = MathTask(MathConfig(must_be_boxed=False), ChatCharacters())
    response = "\\boxed{7}" + LONGEST_RESPONSE * "x"
    assert task.judge([QUESTION] * 2, [response, "18"]) == [Judgement(1.0, True), Judgement(0.0, False, unjudged=True)]
    assert given == [(("18",), LONGEST_RESPONSE * "x", False), (("18",), "18", False)]


SLOW = ["\\boxed{9**9**9}", "\\boxed{9^{9^{9}}}", "\\boxed{18 + 9^{9^{9}} - 9^{9^{9}}}", "\\boxed{(9!)!!}"]
HOSTILE = [
    *SLOW,
    "\\boxed{" + 10**5 * "{" + "18" + 10**5 * "}" + "}",
    "\\boxed{" + 900 * "{" + "18" + 900 * "}" + "}",
    "\\boxed{" + 900 * "(" + "18" + 900 * ")" + "}",
    10**5 * "{",
    "\\boxed{" + 140 * "\\frac{1}{" + "18" + 140 * "}" + "}",
    "\\boxed{" + 10**6 // 11 * "\\frac{1}{2}" + "}",
    "$" + 10**6 // 12 * "\\frac{1}{2}+" + "$",
    10**5 * "\\boxed{",
    "\\boxed{18",
    "\\boxed{18\x00}",
    "\x00",
    "\\boxed{١٨}",
    "\\boxed{\ud800}",
    "\\boxed{__import__('os')._exit(0)}",
    "\\boxed{\\text{__import__('os')._exit(0)}}",
    "\\boxed{\\input{/etc/passwd}}",
]


def test_hostile_answers_get_nothing_and_stop_nothing(task):
    before = task.counts()
    responses = [text for hostile in HOSTILE for text in (hostile, "\\boxed{18}")]
    judgements = task.judge([QUESTION] * len(responses), responses)
    assert judgements[1::2] == [Judgement(1.0, True)] * len(HOSTILE)
    assert not [text[:40] for text, judgement in zip(HOSTILE, judgements[::2], strict=True) if judgement.correct]
    after = task.counts()
    assert after["items"] - before["items"] == len(responses)
    assert {name: after[name] - before[name] for name in FAILURES} == dict.fromkeys(FAILURES, 0)


def test_the_benchmark_prints_counts_throughput_and_exceptions(tmp_path, capsys):
    answers = {"gsm8k": ["5", "6"], "math500": ["\\frac12", "x=3"], "aime24": ["025", "113"], "amc23": ["1", "2"]}
    answers |= {"minerva": ["4.5e-33", "4.6e-33"], "olympiadbench": ["t(0,4]", "(2,4)"]}
    for name, (first, second) in answers.items():
        lines = [json.dumps(record_of(name, answer)) for answer in (first, second)]
        (tmp_path / bench_verifier.FILES[name]).write_text("\n".join(lines) + "\n")
    assert bench_verifier.main(["--data", str(tmp_path), "--workers", "1", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert "exception: olympiadbench, compared as text: t(0,4]" in printed
    assert printed.count("exception:") == 1
    assert "verdicts a second" in printed
    assert printed.count("answers of another problem, wrong") == len(answers)
    with pytest.raises(ValueError, match="at least 1"):
        bench_verifier.main(["--data", str(tmp_path), "--workers", "0"])


def record_of(name: str, answer: str) -> dict[str, object]:
    layout = SETS[name]
    record: dict[str, object] = {layout.question: f"Q {answer}", layout.answer: answer}
    if name == "gsm8k":
        record[layout.answer] = f"So it is.\n#### {answer}"
    elif name == "olympiadbench":
        record[layout.answer] = [f"${answer}$"]
    if layout.solution is not None and name != "gsm8k":
        record[layout.solution] = f"So \\boxed{{{answer}}}."
    return record


@pytest.mark.parametrize(
    ("answer", "value"),
    [("x=5", "5"), ("\\frac12", "1/2"), ("-\\dfrac{35}{9}", "-35/9"), ("10,\\!080", "10080"), ("3.50", "7/2")],
)
def test_values_of_answers_that_differ_in_form_alone(answer, value):
    assert bench_verifier.plain_value(answer) == bench_verifier.plain_value(value)


@pytest.mark.skipif(not DATA, reason="RSPO_MATH_DATA names no folder of the problems")
@pytest.mark.parametrize("name", bench_verifier.FILES)
def test_verdicts_on_all_problems(name):
    sizes = {"gsm8k": 1319, "math500": 500, "aime24": 30, "amc23": 40, "minerva": 272, "olympiadbench": 675}
    with bench_verifier.start_pool(2, 10.0) as pool:
        checks = bench_verifier.checks_of(pool, Path(DATA), name)
    found = {check.kind: check.exceptions for check in checks}
    # One solution of Minerva has its answer as Python source: "np.arcsin(10/13)".
    allowed = {"reference solutions, right": 1} if name == "minerva" else {}
    assert {check.items for check in checks} == {sizes[name]}
    assert {kind: len(lines) for kind, lines in found.items()} == {kind: allowed.get(kind, 0) for kind in found}, found
