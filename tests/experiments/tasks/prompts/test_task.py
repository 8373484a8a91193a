"""The task of prompts and rewards: problems and prompts from files, and judgements of what the rewards say."""

import json
import math

import pytest
from support.tasks import ChatCharacters

from experiments.errors import UserError
from experiments.tasks.prompts.config import PromptsConfig
from experiments.tasks.prompts.rewards import notation
from experiments.tasks.prompts.task import PromptsTask
from rspo_jax.rollouts import judge_texts
from rspo_jax.types import RewardsTask, StepTask, TokensTask, TruncatedTask


class PlainCharacters(ChatCharacters):
    def plain(self, text):
        return "^" + text


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(count=10):
    return [
        {"prompt": f"{index}?", "answer": str(index), **({"hint": "h"} if index == 3 else {})} for index in range(count)
    ]


def correct(completions, answer, **_):
    return [float(text == one) for text, one in zip(completions, answer, strict=True)]


def brief(completions, **_):
    return [None if text == "?" else -float(len(text)) for text in completions]


def task_of(data, *rewards, **settings):
    names = tuple(map(notation, rewards or (correct, (brief, 0.5))))
    return PromptsTask(PromptsConfig(data=data, rewards=names, **settings), PlainCharacters())


def by_answer(task):
    return {
        problem.columns["answer"]: problem
        for name in ("train", "validation", "test")
        for problem in task.problems(name)
    }


def test_problems_and_prompts_of_texts(tmp_path):
    task = task_of(write(tmp_path / "data.jsonl", rows()))
    assert all(isinstance(task, protocol) for protocol in (RewardsTask, TokensTask, TruncatedTask, StepTask))
    assert [len(task.problems(split)) for split in ("train", "validation", "test")] == [8, 1, 1]
    problems = by_answer(task)
    assert len(problems) == 10
    assert problems["3"].columns == {"answer": "3", "hint": "h"} and problems["4"].columns == {
        "answer": "4",
        "hint": None,
    }
    assert task.prompt(problems["3"]) == "^3?" and problems["3"].place.endswith("data.jsonl, line 4")
    same = task_of(write(tmp_path / "reversed.jsonl", rows()[::-1]))
    assert {one.prompt for one in same.problems("test")} == {one.prompt for one in task.problems("test")}
    with pytest.raises(ValueError, match="no response to imitate"):
        task.solution(problems["3"])
    with pytest.raises(ValueError, match="there is no split 'dev'"):
        task.problems("dev")


def test_chats_a_system_message_and_files_of_their_own(tmp_path):
    chats = [{"prompt": [{"role": "user", "content": f"{index}?"}], "answer": str(index)} for index in range(4)]
    chats[3]["prompt"] += [{"role": "assistant", "content": "It is "}]
    path = write(tmp_path / "chats.jsonl", chats)
    task = task_of(path, validation_path=path, test_path=path, system="Be brief.")
    assert [len(task.problems(split)) for split in ("train", "validation", "test")] == [4, 4, 4]
    problems = by_answer(task)
    assert task.prompt(problems["1"]) == "<system>Be brief.<user>1?<assistant>"
    assert task.prompt(problems["3"]) == "<system>Be brief.<user>3?<assistant>It is "
    seen = []

    def looks(prompts, completions, **_):
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    task_of(path, looks, validation_path=path, test_path=path).judge([problems["1"], problems["3"]], ["one", "three"])
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "1?"}
    assert seen[0] == ([system, user], [{"role": "assistant", "content": "one"}])
    assert seen[1][1] == [{"role": "assistant", "content": "It is three"}]  # as TRL does
    texts = task_of(write(tmp_path / "data.jsonl", rows()), system="Be brief.")
    assert texts.prompt(by_answer(texts)["2"]) == "<system>Be brief.<user>2?<assistant>"


def test_conversations_have_a_response_to_imitate(tmp_path):
    turns = [{"role": "user", "content": "Hi {}"}, {"role": "assistant", "content": "Hello {}"}]
    data = [{"messages": [{**turn, "content": turn["content"].format(index)} for turn in turns]} for index in range(5)]
    task = task_of(write(tmp_path / "data.jsonl", data), brief)
    problem = task.problems("train")[0]
    assert problem.columns == {} and task.solution(problem) == task.prompt(problem)[6:-11].replace("Hi", "Hello")


def test_judgements(tmp_path):
    task = task_of(write(tmp_path / "data.jsonl", rows()))
    problems = by_answer(task)
    assert task.reward_names == ("correct", "brief") and task.tells_correct and task.judges_truncated
    right, wrong, partly = task.judge([problems["3"]] * 3, ["3", "44", "?"])
    assert right[:2] == (1.0 - 0.5, True) and right.parts == (1.0, -1.0)
    assert wrong[:2] == (-1.0, False) and not wrong.left_out
    assert partly.reward == 0.0 and math.isnan(partly.parts[1])
    # No reward applies: left out. Without `correct_at` the task does not tell what is correct.
    silent = task_of(task.config.data, brief, correct_at=None)
    judged = judge_texts(silent, [problems["3"]] * 2, ["?", "abc"])
    assert judged[:, 4].tolist() == [1, 0] and judged[:, 0].tolist() == [0, -3] and not silent.tells_correct
    # The reward of the largest weight decides, the first of several, before its weight.
    decisive = task_of(task.config.data, (correct, 0.5), (brief, 2.0), correct_at=-1.0)
    assert [one.correct for one in decisive.judge([problems["3"]] * 2, ["3", "33"])] == [True, False]


def test_tokens_and_steps_reach_the_rewards(tmp_path):
    seen = []

    def looks(completions, completion_ids, trainer_state, log_metric):
        seen.append((completion_ids, trainer_state.global_step, trainer_state.max_steps))
        log_metric("seen", len(completions))
        return [1.0 / len(text) for text in completions]

    task = task_of(write(tmp_path / "data.jsonl", rows()), looks)
    problem = task.problems("train")[0]
    task.begin_step(3, 10)
    judge_texts(task, [problem], ["ab"], [[7, 8, 9, 1]])
    judge_texts(task, [problem, problem], ["ab", ""])
    ids = [2 + ord("a"), 2 + ord("b"), 1]
    assert seen[0] == ([[7, 8, 9, 1]], 3, 10) and seen[1][0] == [ids, [1]]
    # The second call failed, and was made again row by row: one row did not fail.
    assert task.step_metrics() == {"rewards/looks/failed": 1.0, "task/seen": (1 + 2 + 1 + 1) / 4}
    task.begin_step(4, 10)
    assert task.step_metrics() == {"rewards/looks/failed": 0.0}


def test_failures_are_named_counted_and_printed_at_first(tmp_path, capsys):
    def broken(completions, answer, **_):
        return [1.0 / float(one) for one in answer]

    path = write(tmp_path / "data.jsonl", rows())
    task = task_of(path, broken, (brief, 0.5))
    problems = by_answer(task)
    failed, fine = task.judge([problems["0"], problems["2"]], ["a", "b"])
    assert failed.unjudged and failed.reward == -0.5 and not failed.left_out and not failed.correct
    assert not fine.unjudged and fine.parts == (0.5, -1.0)
    said = capsys.readouterr().out
    assert said == (
        f"reward broken raised ZeroDivisionError: float division by zero; the response is one to {path}, line 1, '0?'. "
        "It goes without this reward\n"
    )
    task.judge([problems["0"]] * 5, ["a"] * 5)
    assert len(capsys.readouterr().out.splitlines()) == 3  # two more, and that the others are counted only
    assert task.step_metrics()["rewards/broken/failed"] == 6
    stopping = task_of(path, broken, on_error="stop")
    with pytest.raises(UserError, match=r"reward broken raised ZeroDivisionError.*line 1, '0\?'. The run stops"):
        stopping.judge([problems["0"]], ["a"])


@pytest.mark.parametrize(
    ("data", "settings", "words"),
    [
        (rows(), {"data": None, "rewards": ()}, "name their file with --task.data; a run needs a reward"),
        (rows(), {"rewards": ("x",)}, "'x' cannot be read"),
        (rows(), {"correct_at": math.nan}, "correct_at is nan"),
        (rows(), {"time_limit": 0.0}, "time_limit is 0.0"),
        (rows(), {"workers": 0}, "workers is 0"),
        (rows(), {"on_error": "ignore"}, "on_error must be one of go-on, stop; got 'ignore'"),
        (rows(), {"test_share": 0.0}, "test_share is 0 and there is no test_path"),
        (rows(), {"validation_share": 0.6, "test_share": 0.6}, "leaves nothing to train on"),
        (rows(), {"prompt_field": "question"}, "data.jsonl, line 1: 'question' is missing"),
        (rows(2), {}, "has 2 different prompts, too few to set some apart"),
        ([{"answer": "1"}], {}, "data.jsonl, line 1: 'prompt' is missing"),
        ([{"prompt": "a"}, {"prompt": 3}, {"prompt": ""}], {}, "line 2: 'prompt' is 3.*\n.*line 3: 'prompt' is empty"),
        ([{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}], {}, "line 2: the prompt is a chat, but"),
        ([{"prompt": f"{index}"} for index in range(9)], {}, "reward correct takes answer, but the data has no column"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path, data, settings, words):
    config = {"data": write(tmp_path / "data.jsonl", data), "rewards": (notation(correct),)} | settings
    with pytest.raises(ValueError, match=words):
        PromptsTask(PromptsConfig(**config), PlainCharacters())


def test_columns_that_cannot_leave_the_process(tmp_path, monkeypatch):
    import datetime

    from experiments.tasks.prompts import dataset

    path, real = write(tmp_path / "data.jsonl", rows()), dataset.read_records
    monkeypatch.setattr(
        dataset,
        "read_records",
        lambda *arguments: [
            record._replace(fields=record.fields | {"day": datetime.date(2020, 1, 1)}) for record in real(*arguments)
        ],
    )
    (tmp_path / "rewards.py").write_text("def f(completions, day, **_):\n    return [1.0] * len(day)\n")
    spec = f"{tmp_path / 'rewards.py'}:f"
    with pytest.raises(ValueError, match=r"line .*the column day holds what cannot be sent.*--task.rewards-in-process"):
        PromptsTask(PromptsConfig(data=path, rewards=(spec,)), PlainCharacters())
    task = PromptsTask(PromptsConfig(data=path, rewards=(spec,), rewards_in_process=True), PlainCharacters())
    assert task.judge(task.problems("train")[:1], ["a"])[0].reward == 1.0
