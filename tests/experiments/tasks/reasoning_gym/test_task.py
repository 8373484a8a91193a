"""The reasoning-gym task with a stand-in for the library: streams, held-out problems, prompts and verdicts.

All tasks of this file start processes, which import the stand-in in a moment.
"""

import collections
import os
from pathlib import Path

import pytest
import support

from experiments.tasks.reasoning_gym.config import ReasoningGymConfig
from experiments.tasks.reasoning_gym.task import GymTask
from experiments.tasks.reasoning_gym.text import GymTokenizer
from rspo_jax.rollouts import SamplerConfig, load_problems, with_solutions
from rspo_jax.rollouts.conversation import ConversationConfig, limits_of
from rspo_jax.types import Judgement, KindsTask, ProblemStream

STAND_INS = Path(support.__file__).parent / "stand_ins"


@pytest.fixture(autouse=True)
def library(monkeypatch):
    monkeypatch.syspath_prepend(os.fspath(STAND_INS))


class Chat:
    """A tokenizer that writes everything, with a chat format."""

    pad_id, eos_id, stop_ids, vocabulary_size = 0, 1, (1,), 2**21

    def encode(self, text):
        return [2 + ord(character) for character in text]

    def decode(self, ids):
        return "".join(chr(one - 2) for one in ids if one > 1)

    def chat(self, messages):
        return "".join(f"[{message['role']}] {message['content']}\n" for message in messages) + "[assistant] "


def make_task(*datasets, tokenizer=None, **settings):
    settings = {"workers": 2, "validation": 6, "test": 9} | settings
    return GymTask(ReasoningGymConfig(datasets, **settings), tokenizer or GymTokenizer())


def questions(problems):
    return [problem and problem.question for problem in problems]


def test_the_stream_is_a_function_of_seed_and_position_and_never_repeats():
    task, again = make_task("sums:3", "global", "unanswered:0.5"), make_task("sums:3", "global", "unanswered:0.5")
    assert isinstance(task, ProblemStream) and isinstance(task, KindsTask)
    whole = task.draw((5, 1), range(400))
    # Other processes, another order, and one at a time.
    assert again.draw((5, 1), range(399, -1, -1)) == whole[::-1]
    assert [again.draw((5, 1), [position])[0] for position in (0, 7, 399)] == [whole[0], whole[7], whole[399]]
    drawn = [problem for problem in whole if problem is not None]
    assert len(drawn) > 390 and len({problem.number for problem in drawn}) == len(drawn)
    counts = collections.Counter(task.kind(problem) for problem in drawn)
    assert counts["sums"] > 2 * counts["global"] > 2 * counts["unanswered"] > 0
    others = [
        task.draw((5, 0), range(50)),
        task.draw((6, 1), range(50)),
        make_task("global", seed=1).draw((5, 1), range(50)),
    ]
    for other in others:
        assert not {one.number for one in other if one} & {problem.number for problem in drawn}


def test_held_out_problems_are_different_and_never_trained_on():
    task = make_task("sums", "more_sums:2", validation=30, test=60, difficulty=("sums.high=60", "more_sums.high=60"))
    validation, test = task.problems("validation"), task.problems("test")
    assert (len(validation), len(test)) == (30, 60)
    # The two data sets ask the same questions, so that one's training problem may be the other's held-out one.
    asked = {problem.question for problem in (*validation, *test)}
    assert len(asked) == 90
    assert collections.Counter(map(task.kind, validation)) == {"sums": 10, "more_sums": 20}
    assert len({task.kind(problem) for problem in validation[:4]}) == 2  # mixed from the first on
    drawn = task.draw((0, 1), range(2000))
    assert 0 < sum(problem is None for problem in drawn) < 200
    assert not asked & set(questions(drawn))
    assert validation == make_task(
        *task.config.datasets, validation=30, test=60, difficulty=task.config.difficulty
    ).problems("validation")


def test_of_a_small_data_set_little_is_held_out(capsys):
    task = make_task("sums", validation=200, test=400, difficulty=("sums.high=4",))
    held_out = [*task.problems("validation"), *task.problems("test")]
    assert "because it has few" in capsys.readouterr().out
    assert 2 <= len(held_out) <= 12 and len(set(questions(held_out))) == len(held_out)  # of 25
    drawn = set(questions(task.draw((0, 1), range(300)))) - {None}
    assert drawn == {f"{first}+{second}=" for first in range(5) for second in range(5)} - set(questions(held_out))
    with pytest.raises(ValueError, match="only 1 different problems"):
        make_task("sums", difficulty=("sums.high=0",)).problems("test")


@pytest.mark.parametrize(
    ("datasets", "difficulty", "messages"),
    [
        (["sum", "composite"], [], ["no data set 'sum'; did you mean sums", "no data set 'composite'"]),
        (["sums"], ["sums.hihg=3"], ["no option of sums 'hihg'; did you mean high?"]),
        (["sums"], ["sums.top.level=3"], ["sums.top has the levels 0 to 2, not 3"]),
        (["sums"], ["sums.bottom.level=0"], ["no attribute of the curriculum of sums 'bottom'; choose one of top"]),
        (["sums", "global"], ["level=9"], ["of sums has the levels 0 to 2, not 9", "global has no curriculum"]),
        (["sums"], ["sums.high=many"], ["sums.high is 'many', but the library's is a int, such as 1000"]),
        (["sums"], ["sums.high=true"], ["sums.high is True"]),
        (["sums"], ["sums.high=1", "sums.low=2"], ["sums refuses these settings: low must be <= high"]),
    ],
)
def test_what_the_library_does_not_have_is_refused_at_once(datasets, difficulty, messages):
    with pytest.raises(ValueError) as refused:
        make_task(*datasets, difficulty=tuple(difficulty))
    for message in messages:
        assert message in str(refused.value)


def test_levels_and_options_set_the_difficulty():
    def highest(*difficulty):
        task = make_task("sums", difficulty=difficulty)
        return max(
            int(number) for one in task.draw((0, 1), range(300)) if one for number in one.question[:-1].split("+")
        )

    assert 900 < highest() <= 1000
    assert 90 <= highest("level=1") <= 99
    assert 990 <= highest("level=1", "sums.top.level=2") <= 999
    assert highest("level=1", "sums.high=50") == 50


def test_data_sets_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match=r"most problems of emoji have characters.*'😀'.*--model"):
        make_task("emoji").problems("validation")
    assert len(make_task("emoji", tokenizer=Chat()).problems("validation")) == 6
    with pytest.raises(ValueError, match="fails to make most problems of broken: RuntimeError: no problem today"):
        make_task("broken").problems("validation")


def test_prompts_and_answers_of_both_kinds_of_model():
    small, chat = make_task("sums", "unanswered"), make_task("sums", "unanswered", tokenizer=Chat())
    problem = next(one for one in small.problems("test") if one.name == "sums")
    unanswered = next(one for one in small.problems("test") if one.name == "unanswered")
    assert small.prompt(problem) == problem.question + "\n" and small.solution(problem) == problem.answer
    system = "Put the answer between <answer> and </answer>."
    assert chat.prompt(problem) == f"[system] {system}\n[user] {problem.question}\n[assistant] "
    assert chat.solution(problem) == f"<answer>{problem.answer}</answer>"
    with pytest.raises(ValueError, match="unanswered gives no answers"):
        small.solution(unanswered)
    own = make_task("sums", tokenizer=Chat(), system="Do it.").prompt(problem)
    assert own == f"[system] Do it.\n[user] {problem.question}\n[assistant] "
    assert make_task("sums", tokenizer=Chat(), system="").prompt(problem) == f"[user] {problem.question}\n[assistant] "
    with pytest.raises(ValueError, match=r"task\.system is 'defualt'; choose one of default, direct"):
        make_task("sums", tokenizer=Chat(), system="defualt")
    # The stream of a warm start has problems with answers only.
    sampler = SamplerConfig(20)
    limits = limits_of(small, sampler, ConversationConfig())
    warm = with_solutions(small, load_problems(small, 20).train, sampler, limits).take((0, 0), 0, 20).problems
    assert {problem.name for problem in warm} == {"sums"}


def test_scores_are_rewards_and_verifiers_that_fail_leave_responses_unjudged():
    task = make_task("sums", "unruly", "countdown", time_limit=0.5, wall_limit=1.0, correct_at=0.5)
    sums, unruly, evaluated = (
        next(one for one in task.problems("test") if one.name == name) for name in ("sums", "unruly", "countdown")
    )
    right, unjudged = Judgement(1.0, True), Judgement(0.0, False, unjudged=True)
    cases = [
        (sums, sums.answer, right),
        (sums, str(int(sums.answer) + 1), Judgement(0.5, True)),  # correct from one half on
        (sums, str(int(sums.answer) + 2), Judgement(0.0, False)),
        (sums, "seven", unjudged),  # the verifier raises
        (unruly, "hang", unjudged),
        (unruly, "exit", unjudged),
        (unruly, "nan", unjudged),
        (unruly, "quarter", Judgement(0.25, False)),
        (evaluated, f"{evaluated.answer} + 0", right),
        (evaluated, "__import__('os')._exit(0)", Judgement(0.01, False)),  # nothing of it is evaluated
        (evaluated, "exec(chr(49))", Judgement(0.01, False)),
        (evaluated, "(", Judgement(0.01, False)),
    ]
    verdicts = task.judge([case[0] for case in cases], [case[1] for case in cases])
    assert verdicts == [case[2] for case in cases]
    chat = make_task("sums", tokenizer=Chat())
    drafts = f"<answer>0</answer> no, <answer>\n{sums.answer}\n</answer>."
    assert chat.judge([sums] * 2, [drafts, sums.answer]) == [right, Judgement(0.0, False, unmarked=True)]
