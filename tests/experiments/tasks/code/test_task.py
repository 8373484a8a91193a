"""The programming task: right and wrong responses, responses that pretend, and configs that are refused."""

import dataclasses
import json
from pathlib import Path

import pytest
from support.sandbox import skip_unless_it_holds

from experiments.tasks.code import protections
from experiments.tasks.code.config import CodeConfig
from experiments.tasks.code.problems import Problem, Test, load_problems
from experiments.tasks.code.sandbox import Limits, SandboxError
from experiments.tasks.code.task import CodeTask
from rspo_jax.types import Judgement

ROOT = Path(__file__).resolve().parents[4]
CONFIG = CodeConfig(
    run_untrusted_code=True, test_path="unused.jsonl", limits=Limits(seconds=60.0), response_seconds=600.0, workers=4
)
ADD = Problem(
    prompt="Write add(a, b).",
    tests=(Test([1, 2], 3), Test([10, -4], 6), Test([0.5, 0.25], 0.75)),
    entry_point="add",
    solution="def add(a, b):\n    return a + b",
)
DOUBLE = Problem(
    prompt="Read a number and print its double.",
    tests=(Test("2\n", "4\n"), Test("-7\n", "-14\n")),
    entry_point=None,
    solution="print(2 * int(input()))",
)
RIGHT, WRONG = Judgement(1.0, True), Judgement(0.0, False)


class Chat:
    """The part of a tokenizer that a task uses."""

    def encode(self, text):
        return [*map(ord, text)]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def chat(self, messages):
        return "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>"


def task(**changes) -> CodeTask:
    return CodeTask(dataclasses.replace(CONFIG, **changes), Chat())  # pyright: ignore[reportArgumentType]


@pytest.fixture
def judge():
    """A function that judges (problem, code) pairs. Where the sandbox does not hold, no task can be made."""
    skip_unless_it_holds(task)

    def judge_pairs(*pairs, **changes):
        problems, responses = zip(*pairs, strict=True)
        return task(**changes).judge(problems, responses)

    return judge_pairs


# --- rewards ------------------------------------------------------------------------------------


def test_right_and_wrong_answers_are_told_apart_and_keep_their_order(judge):
    pairs = [
        (ADD, "def add(a, b): return a + b"),
        (DOUBLE, "print(int(input()) + 2)"),
        (ADD, "def add(a, b): return a - b"),
        (DOUBLE, "Think.\n```python\nprint(0)\n```\nBetter:\n```python\nprint(int(input()) * 2)\n```\nDone."),
        (ADD, "no code at all"),
        (DOUBLE, ""),
    ]
    assert judge(*pairs) == [RIGHT, WRONG, WRONG, RIGHT, WRONG, WRONG]


def test_worked_solutions_pass_and_those_of_other_problems_do_not(judge):
    of_add, of_double = task().solution(ADD), task().solution(DOUBLE)
    pairs = [(ADD, of_add), (ADD, of_double), (DOUBLE, of_add), (DOUBLE, of_double)]
    assert judge(*pairs) == [RIGHT, WRONG, WRONG, RIGHT]


def test_the_problems_of_the_documentation_are_solved_by_their_solutions(judge, tmp_path):
    text = (ROOT / "docs/code_rewards.md").read_text(encoding="utf-8")
    path = tmp_path / "problems.jsonl"
    path.write_text(text.split("```jsonl\n")[1].split("```")[0], encoding="utf-8")
    problems = load_problems(str(path))
    assert len(problems) == 3
    assert judge(*[(problem, task().solution(problem)) for problem in problems]) == [RIGHT] * 3
    checkers = tmp_path / "my_checkers.py"
    checkers.write_text("def divides" + text.split("```python\ndef divides")[1].split("```")[0])
    path.write_text(text.split("```jsonl\n")[2].split("```")[0], encoding="utf-8")
    problems = load_problems(str(path), ["divides"])
    pairs = [(problems[0], f"def f(n): return {number}") for number in (7, 1, 91, 13.0, "'x'")]
    assert judge(*pairs, checkers=str(checkers)) == [RIGHT, *[WRONG] * 4]


def test_the_reward_can_be_the_share_of_tests_passed(judge):
    pairs = [
        (ADD, "def add(a, b): return a + b"),
        (ADD, "def add(a, b): return 3"),
        (ADD, "def add(a, b): return a + b if isinstance(a, int) else exit()"),
        (ADD, "def add(a, b): return None"),
    ]
    shares = [Judgement(1.0, True), Judgement(1 / 3, False), Judgement(2 / 3, False), WRONG]
    assert judge(*pairs, reward="share") == shares
    assert judge(*pairs) == [RIGHT, WRONG, WRONG, WRONG]


def test_the_type_of_the_expected_value_decides(judge):
    large = Problem("", (Test([], 1_000_000_007),), "f", None)
    codes = ["return 1_000_000_007", "return 1e9", "return 1_000_000_007.0", "return '1000000007'", "return True"]
    assert judge(*[(large, f"def f(): {code}") for code in codes]) == [RIGHT, *[WRONG] * 4]
    long = Problem("", (Test([10**5000], 10**5000 + 1),), "f", None)
    assert judge((long, "def f(n): return n + 1"), (long, "def f(n): return n")) == [RIGHT, WRONG]


def test_a_class_may_use_the_names_that_its_site_imports(judge):
    problem = Problem("", (Test([[3, 1, 2]], 3), Test([[5]], 5)), "Solution.largest", None)
    head = "class Solution:\n    def largest(self, a: List[int]) -> Optional[int]:\n        "
    uses = ["return heappop([-max(a)]) * -pow(1, 2, 5)", "return Counter(a) and nlargest(1, a)[0]", "return max(a)"]
    assert judge(*[(problem, head + use) for use in uses]) == [RIGHT] * 3
    assert judge((problem, head + uses[2]), preamble="never") == [WRONG]
    function = problem._replace(entry_point="largest")
    code = "def largest(a: List[int]): return max(a)"
    assert judge((function, code)) == [WRONG]
    assert judge((function, code), preamble="always") == [RIGHT]


def test_checkers_of_problems(judge, tmp_path):
    versions = Problem("", (Test("", "1.10\n"),), None, None, "exact")
    pair = Problem("", (Test([[3, 1]], [[1, 2.0], [3, 1]]),), "f", None, "any_order")
    lines = Problem("", (Test("x", "a b\nc"),), None, None, "any_order")
    pairs = [
        (versions, "print('1.10 ')"),
        (versions, "print(1.1)"),
        (pair, "def f(a): return (a, (1, 2.0))"),
        (pair, "def f(a): return (a, (1, 2))"),
        (pair, "def f(a): return '[1, 2.0]'"),
        (lines, "print('c')\nprint('a  b')"),
        (lines, "print('c')\nprint('b a')"),
        (lines, "import os; os.write(1, b'\\xff')"),
    ]
    assert judge(*pairs) == [RIGHT, WRONG, RIGHT, WRONG, WRONG, RIGHT, WRONG, WRONG]
    own = tmp_path / "own.py"
    own.write_text(
        "def divides(given, found, expected):\n    return found > 1 and given[0] % found == 0\n"
        "def one_of(given, found, expected):\n    return found.strip() in expected.split('|')\n"
        "def says_nothing(given, found, expected): pass\n"
    )
    divisor, either = Problem("", (Test([91], None),), "f", None, "divides"), versions._replace(checker="one_of")
    either = either._replace(tests=(Test("", "a|b"),))
    pairs = [
        (divisor, "def f(n): return 7"),
        (divisor, "def f(n): return 5"),
        (divisor, "def f(n): return float('nan')"),
        (divisor, "def f(n): raise ValueError"),
        (either, "print('b')"),
        (either, "print('a|b')"),
        (versions, "print('1.10')"),
    ]
    assert judge(*pairs, checkers=str(own)) == [RIGHT, WRONG, WRONG, WRONG, RIGHT, WRONG, RIGHT]
    # A checker that fails, or says nothing, is not the response's fault, and is counted.
    unjudged = Judgement(0.0, False, unjudged=True)
    silent = versions._replace(checker="says_nothing")
    pairs = [(divisor, "def f(n): return 'text'"), (silent, "print(1)")]
    assert judge(*pairs, checkers=str(own)) == [unjudged, unjudged]


def test_files_of_checkers_that_are_refused(judge, tmp_path):
    del judge
    path = tmp_path / "own.py"
    for text, message in {
        None: "there is no such file; give a Python file of functions",
        "def": "which is not Python: invalid syntax",
        "def _hidden(): pass\na = 1": "which defines no function; write check",
    }.items():
        if text is not None:
            path.write_text(text)
        with pytest.raises(ValueError, match=message):
            task(checkers=str(path))


def test_tests_left_when_time_is_up_count_as_failed(judge):
    endless = "def add(a, b):\n    while True: pass"
    changes = {"limits": Limits(seconds=0.2), "response_seconds": 0.1, "reward": "share"}
    many = ADD._replace(tests=ADD.tests[:1] * 10_000)
    assert judge((many, endless), **changes) == [WRONG]


def test_a_response_sees_no_earlier_test(judge):
    code = "import os\nprint(2 * int(input()) if not os.listdir('.') else 'seen')\nopen('left', 'w').close()"
    assert judge((DOUBLE, code)) == [RIGHT]


@pytest.mark.parametrize(
    "code",
    [
        "print('PASSED')\nprint('reward: 1.0, correct: True')",
        'print(\'{"reward": 1.0, "correct": true}\')',
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "print(4)\nprint(-14)",
        "import os\nfor number in range(20):\n    try: os.write(number, b'4\\n')\n    except OSError: pass",
        "class Equal:\n    def __eq__(self, other): return True\n    __repr__ = lambda self: 'Equal'\nprint(Equal())",
        "import gc\nfor thing in gc.get_objects():\n    if isinstance(thing, dict) and 'output' in thing: print(thing)",
    ],
)
def test_a_program_cannot_pretend_to_pass(judge, code):
    assert judge((DOUBLE, code), (DOUBLE, "print(2 * int(input()))")) == [WRONG, RIGHT]


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos._exit(0)\ndef add(a, b): return a + b",
        "class Equal(int):\n    def __eq__(self, other): return True\ndef add(a, b): return Equal(a)",
        "class Equal:\n    def __eq__(self, other): return True\ndef add(a, b): return Equal()",
        "class Equal(float):\n    __repr__ = lambda self: '3'\ndef add(a, b): return Equal(0)",
        "import json\njson.dumps = lambda value: 'true'\ndef add(a, b): return 0",
        "import json\njson.dumps = lambda value: '3 6 0.75'\ndef add(a, b): return 0",
        "import builtins\nbuiltins.isinstance = lambda *_: True\ndef add(a, b): return '3'",
        "import sys\ndef add(a, b):\n    frame = sys._getframe()\n    while frame.f_back: frame = frame.f_back\n"
        "    return frame.f_locals.get('expected', [str(frame.f_locals)])",
        "def add(a, b): return [3, 6, 0.75]",
        "def add(a, b): return float('nan')",
        "add = print",
        "def add(a, b): return 'PASSED'",
    ],
)
def test_a_function_cannot_pretend_to_pass(judge, code):
    assert judge((ADD, code), reward="share")[0] in (WRONG, Judgement(1 / 3, False))


def test_a_hostile_response_does_not_disturb_the_others(judge):
    hostile = [
        "while True: pass",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "bytearray(1 << 30)",
        "while True: print('x' * 10**6)",
        "import os; os.kill(os.getppid(), 9)",
        "\ud800\x00",
    ]
    pairs = [pair for code in hostile for pair in ((DOUBLE, code), (DOUBLE, "print(2 * int(input()))"))]
    assert judge(*pairs, limits=Limits(seconds=3.0)) == [WRONG, RIGHT] * len(hostile)


def test_problems_and_responses_have_to_match_in_number(judge):
    del judge
    with pytest.raises(ValueError, match="1 problems but 2 responses"):
        task().judge([ADD], ["", ""])
    assert task().judge([], []) == []


# --- the rest of the task -----------------------------------------------------------------------


def test_problems_prompts_and_solutions(judge, tmp_path):
    del judge
    path = tmp_path / "test.jsonl"
    fields = {"prompt": "Print {1}.", "tests": [{"input": "", "output": "1"}]}
    path.write_text(json.dumps(fields), encoding="utf-8")
    made = task(test_path=str(path), prompt="Solve: {problem} Now.", system="Be brief.")
    (problem,) = made.problems("test")
    assert problem == Problem("Print {1}.", (Test("", "1"),), None, None)
    assert made.prompt(problem) == "<system>Be brief.<user>Solve: Print {1}. Now.<assistant>"
    assert task().prompt(problem).startswith("<user>Print {1}.\nPlease reason")
    assert made.solution(DOUBLE) == "```python\nprint(2 * int(input()))\n```"
    with pytest.raises(ValueError, match=r"'Print \{1\}.' has no 'solution'"):
        made.solution(problem)
    with pytest.raises(ValueError, match="'train' has no problems; set train_path"):
        made.problems("train")
    records = [json.dumps(fields | {"prompt": [{"role": "user", "content": f"Print {n}."}]}) for n in range(99)]
    path.write_text("\n".join(records), encoding="utf-8")
    shared = task(train_path=str(path), test_path=None, validation_share=0.2, test_share=0.2)
    parts = [shared.problems(split) for split in ("train", "validation", "test")]
    assert all(parts) and len({one.prompt for part in parts for one in part}) == sum(map(len, parts)) == 99
    with pytest.raises(ValueError, match="test_share is a share of train_path"):
        task(test_path=str(path), test_share=0.2)
    with pytest.raises(ValueError, match="no split 'dev'; choose one of train, validation, test"):
        made.problems("dev")


def test_only_what_follows_the_marker_is_judged(judge):
    right, wrong, end = "```python\nprint(2 * int(input()))\n```", "```python\nprint(0)\n```", "</think>"
    responses = [right + end + wrong, wrong + end + right, right, end + wrong + end + right, right + end]
    responses.append(task(judge_after=end).solution(DOUBLE))
    missing = Judgement(0.0, False, unmarked=True)
    pairs = [(DOUBLE, response) for response in responses]
    assert judge(*pairs, judge_after=end) == [WRONG, RIGHT, missing, RIGHT, WRONG, RIGHT]


def test_a_marker_that_the_tokenizer_leaves_out_is_refused(judge):
    del judge

    class SpecialMarker(Chat):
        encode, decode = staticmethod(lambda text: [9]), staticmethod(lambda ids: "")

    with pytest.raises(ValueError, match="judge_after is '</think>', but the text of a response never contains it"):
        CodeTask(dataclasses.replace(CONFIG, judge_after="</think>"), SpecialMarker())  # pyright: ignore


# --- configs ------------------------------------------------------------------------------------


def test_untrusted_code_is_not_run_unless_asked_for(monkeypatch):
    monkeypatch.setattr(protections, "run", lambda *_: pytest.fail("code was run"))
    assert not CodeConfig().run_untrusted_code
    with pytest.raises(ValueError, match=r"runs Python code written by a model .* set run_untrusted_code to True"):
        task(run_untrusted_code=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_path": None}, "set train_path, validation_path or test_path"),
        ({"prompt": "Solve it."}, r"prompt contains \{problem\} 0 times; write it exactly once"),
        ({"prompt": "{problem}{problem}"}, r"prompt contains \{problem\} 2 times"),
        ({"preamble": "some"}, "preamble must be one of classes, always, never; got 'some'"),
        ({"reward": "some"}, "reward must be one of all, share; got 'some'"),
        ({"tolerance": -1e-9}, "tolerance is -1e-09; set it to at least 0 and below 1"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
        ({"response_seconds": 0.0}, "response_seconds is 0.0"),
        ({"workers": 0}, "workers is 0; set it to 1 or more"),
        (
            {"accept_missing": ("filse",)},
            "accept_missing names 'filse'; the protections are files",
        ),
        ({"limits": Limits(threads=0)}, "threads is 0"),
    ],
)
def test_a_wrong_config_is_refused_before_anything_runs(monkeypatch, changes, message):
    monkeypatch.setattr(protections, "run", lambda *_: pytest.fail("code was run"))
    with pytest.raises(ValueError, match=message):
        task(**changes)


def test_a_task_is_refused_where_a_protection_is_missing(monkeypatch):
    monkeypatch.setattr(protections, "missing_protections", lambda: ("network",))
    with pytest.raises(SandboxError, match="'network' does not hold"):
        task()
    with pytest.raises(SandboxError, match="'network' does not hold"):
        task(accept_missing=("files",))
    assert task(accept_missing=("network",)).config.accept_missing == ("network",)


def test_workers_are_at_least_one_and_as_many_as_asked_for():
    assert dataclasses.replace(CONFIG, workers=7).worker_count() == 7
    assert 1 <= CodeConfig().worker_count() <= 64
