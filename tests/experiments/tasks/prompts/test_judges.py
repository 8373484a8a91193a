"""Where rewards are called: in this process and in workers, and that no response costs another one its reward."""

import contextlib
import threading

import pytest

from experiments.tasks.prompts.calling import Batch, Failure
from experiments.tasks.prompts.judges import InProcess, InWorkers, in_waves
from experiments.tasks.prompts.rewards import notation, parse_all

SOURCE = """
import asyncio, os, time

def length(completions, log_metric, **_):
    log_metric("calls", 1.0)
    return [len(text) for text in completions]

def picky(completions, answer, **_):
    if any("bad" in text for text in completions):
        raise ValueError("bad")
    return [None if text in answer else 1.0 for text in completions]

def sleepy(completions, **_):
    for text in completions:
        if "sleep" in text:
            time.sleep(600)
    return [0.5] * len(completions)

def forever(completions, **_):
    time.sleep(600)

def deadly(completions, **_):
    if "die" in completions:
        os.kill(os.getpid(), 9)
    return [2.0] * len(completions)

async def waiting(completions, **_):
    await asyncio.sleep(600 if "sleep" in completions else 0.01)
    if "bad" in completions:
        raise KeyError("waiting")
    return [3.0] * len(completions)

async def blocking(completions, **_):
    if "sleep" in completions:
        time.sleep(600)
    return [4.0] * len(completions)
"""
NAMES = ("length", "picky", "sleepy", "forever", "deadly", "waiting", "blocking")
TEXTS = ["one", "bad", "sleep", "die", "five"]
LATE = "did not return within"


def batch_of(texts):
    return Batch(["?"] * len(texts), texts, [[1]] * len(texts), {"answer": ["one"] * len(texts)})


def words_of(values):
    return [value.reason if isinstance(value, Failure) else value for value in values]


@pytest.fixture
def path(tmp_path):
    (tmp_path / "rewards.py").write_text(SOURCE)
    return tmp_path / "rewards.py"


def test_rewards_in_workers(path):
    texts = [f"{path}:{name}" for name in NAMES]
    logged = []
    with contextlib.closing(InWorkers(parse_all(texts), texts, limit=0.5, workers=2)) as judge:
        assert judge.mistakes(["answer"]) == []
        found = judge.score(batch_of(TEXTS), lambda *entry: logged.append(entry))
        table = {name: words_of(values) for name, values in zip(NAMES, found, strict=True)}
        again = judge.score(batch_of(["one"]), lambda *entry: None)
    late = "did not return within 0.5 s"
    assert table["length"] == [3, 3, 5, 3, 4] and logged == [("calls", 1.0)] * 5
    assert table["picky"] == [None, "raised ValueError: bad", 1.0, 1.0, 1.0]
    assert table["sleepy"] == [0.5, 0.5, late, 0.5, 0.5]
    # All of the first wave are late, one a worker; nothing after it is tried.
    assert table["forever"][:2] == [late, late] and all("was not tried" in one for one in table["forever"][2:])
    assert table["deadly"] == [2.0, 2.0, 2.0, "ended its process: killed", 2.0]
    assert table["waiting"] == [3.0, "raised KeyError: 'waiting'", late, 3.0, 3.0]
    assert table["blocking"] == [4.0, 4.0, late, 4.0, 4.0]
    assert [words_of(values) for values in again][:3] == [[3.0], [None], [0.5]]


def test_rewards_that_workers_cannot_call(path):
    texts = [f"{path}:{name}" for name in ("picky", "nothing")] + ["no_such_file.py:f"]
    with contextlib.closing(InWorkers(parse_all(texts), texts, limit=5.0, workers=1)) as judge:
        first, second, third = judge.mistakes(["reference"])
    assert "reward picky of" in first or "picky" in first
    mistakes = [first, second, third]
    assert any("takes answer, but the data has the columns reference" in one for one in mistakes)
    assert any("has no nothing" in one for one in mistakes)
    assert any("there is no file no_such_file.py" in one for one in mistakes)


def test_rewards_in_this_process(path):
    calls = []

    def whole(completions, **_):
        calls.append(len(completions))
        return [float(len(completions))] * len(completions)

    def needs_main_thread(completions, **_):
        return [float(threading.current_thread() is threading.main_thread())] * len(completions)

    names = ("picky", "sleepy", "forever", "waiting")
    rewards = parse_all([f"{path}:{name}" for name in names] + [notation(whole), notation(needs_main_thread)])
    with contextlib.closing(InProcess(rewards, limit=0.1)) as judge:
        assert judge.mistakes(["answer"]) == []
        found = judge.score(batch_of(TEXTS), lambda *entry: None)
    table = {name: words_of(values) for name, values in zip((*names, "whole", "main"), found, strict=True)}
    late = f"{LATE} 0.1 s"
    assert table["picky"] == [None, "raised ValueError: bad", 1.0, 1.0, 1.0]
    assert table["sleepy"] == [0.5, 0.5, late, 0.5, 0.5]
    assert table["forever"][0] == late and all("was not tried" in one for one in table["forever"][1:])
    assert table["waiting"] == [3.0, "raised KeyError: 'waiting'", late, 3.0, 3.0]
    assert table["whole"] == [5.0] * 5 and calls == [5]  # a whole batch at a time
    assert table["main"] == [1.0] * 5


def test_waves_grow_until_all_of_one_are_late():
    late, other, waves = Failure("late", by_time=True), Failure("other"), []

    def results(values):
        waves.clear()

        def try_rows(rows):
            waves.append(list(rows))
            return [values[row] for row in rows]

        return in_waves(len(values), 2, try_rows)

    assert results([1.0] * 20) == [1.0] * 20 and [len(wave) for wave in waves] == [2, 8, 10]
    assert results([late, other] + [late] * 8 + [1.0] * 5)[:10] == [late, other] + [late] * 8
    assert [len(wave) for wave in waves] == [2, 8]
    assert words_of(results([late] * 3)) == ["late", "late", results([late] * 3)[2].reason] and waves == [[0, 1]]
    assert results([]) == []
