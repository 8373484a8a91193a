"""Programming problems in JSONL files: what is read, and the message for each kind of wrong line."""

import json

import pytest
from support.data_sets import save_to_disk

from experiments.tasks.chats import Message
from experiments.tasks.code.problems import Problem, Test, load_problems

PROGRAM = {"prompt": "Double it.", "tests": [{"input": "2\n", "output": "4\n"}]}
FUNCTION = {
    "prompt": "Write add.",
    "entry_point": "add",
    "tests": [{"arguments": [1, [2]], "result": {"a": None}}, {"arguments": [], "result": 1.5}],
    "solution": "def add(): pass",
}


def written(tmp_path, *lines: object) -> str:
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return str(path)


def test_both_kinds_of_problems_are_read_and_empty_lines_passed_over(tmp_path):
    method = {**FUNCTION, "entry_point": "Solution.add"}
    problems = load_problems(written(tmp_path, PROGRAM, "", FUNCTION, "  ", method, ""))
    calls = (Test([1, [2]], {"a": None}), Test([], 1.5))
    assert problems == [
        Problem("Double it.", (Test("2\n", "4\n"),), None, None),
        Problem("Write add.", calls, "add", "def add(): pass"),
        Problem("Write add.", calls, "Solution.add", "def add(): pass"),
    ]


def test_integers_of_any_length_and_checkers_that_there_are(tmp_path):
    digits = "7" * 5000
    text = f'{{"prompt": "p", "entry_point": "f", "tests": [{{"arguments": [{digits}], "result": -{digits}}}]}}'
    sevens = 7 * (10**5000 - 1) // 9
    path = written(tmp_path, text, {**PROGRAM, "checker": "exact"})
    first, second = load_problems(path, {"exact": ""})
    assert (first.tests, first.checker) == ((Test([sevens], -sevens),), None)
    assert second.checker == "exact"


def test_a_separator_of_lines_inside_a_text_does_not_end_the_line(tmp_path):
    line = json.dumps({**PROGRAM, "prompt": "one\u2028two\x85three"}, ensure_ascii=False)
    assert load_problems(written(tmp_path, line))[0].prompt == "one\u2028two\x85three"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", "it is a list, not an object with fields"),
        ("[" * 100_000, ""),  # the message depends on the version of Python
        ({"prompt": "p"}, "'tests' is missing or null; the record has 'prompt'"),
        ({"tests": []}, "'prompt' is missing or null; the record has 'tests'"),
        ({**PROGRAM, "solutions": "x"}, "the record has the unknown 'solutions'; its fields are 'checker'"),
        ({**PROGRAM, "prompt": ""}, "'prompt' is empty"),
        ({**PROGRAM, "prompt": None}, "'prompt' is missing or null"),
        ({**PROGRAM, "solution": 3}, "'solution' is 3, but it must be text"),
        ({**PROGRAM, "entry_point": 3}, "'entry_point' is 3, but it must be text"),
        ({**FUNCTION, "entry_point": "a.b.c"}, "must name a function, or a method as 'Class.method'"),
        ({**FUNCTION, "entry_point": "f()"}, "must name a function"),
        ({**FUNCTION, "entry_point": "class"}, "must name a function"),
        ({**PROGRAM, "tests": []}, r"'tests' is \[\], but it must be a list of one or more tests"),
        ({**PROGRAM, "tests": {"input": "", "output": "1"}}, "must be a list of one or more tests"),
        ({**PROGRAM, "tests": ["assert add(1) == 2"]}, "an assert would run in the same process as the response"),
        ({**PROGRAM, "tests": [None]}, "test 1 is None, but it must be an object with 'input', 'output'"),
        ({**PROGRAM, "tests": [*PROGRAM["tests"], {"input": ""}]}, "test 2 has no 'output'"),
        ({**PROGRAM, "tests": [{"input": [1], "output": "1"}]}, r"'input' of test 1 is \[1\], but it must be text"),
        ({**PROGRAM, "tests": [{"input": "1", "output": " \n"}]}, "a program that does nothing would pass"),
        ({**PROGRAM, "tests": FUNCTION["tests"]}, "test 1 has no 'input', 'output'"),
        ({**FUNCTION, "tests": PROGRAM["tests"]}, "test 1 has no 'arguments', 'result'"),
        ({**FUNCTION, "tests": [{"arguments": 1, "result": 1}]}, "'arguments' of test 1 is 1, but it must be a list"),
        ({**FUNCTION, "tests": [{"arguments": [], "result": 1, "tolerance": 1}]}, "test 1 has the unknown 'tolerance'"),
        ({**PROGRAM, "checker": 3}, "'checker' is 3, but it must be text"),
        (
            {**PROGRAM, "checker": "exct"},
            "there is no checker 'exct'; there are none. Put others into a file of functions",
        ),
        (
            '{"prompt": "p", "entry_point": "f", "tests": [{"arguments": [], "result": 1e999}]}',
            "beyond the largest float",
        ),
        (
            '{"prompt": "p", "entry_point": "f", "tests": [{"arguments": [], "result": NaN}]}',
            "'tests.0..result' is NaN",
        ),
        ({**PROGRAM, "tests": "print(1)"}, "'tests' is a text, but not of JSON: Expecting value at column 1"),
        ({**PROGRAM, "tests": '[{"input": NaN}]'}, "'tests' is a text, but not of JSON: NaN, which JSON does not have"),
        ({**PROGRAM, "tests": "[] []"}, "'tests' is a text, but not of JSON: something follows after it: ' \\[\\]'"),
        ({**PROGRAM, "tests": "{}"}, "'tests' is {}, but it must be a list of one or more tests"),
        ({**PROGRAM, "prompt": [{"role": "tool", "content": "p"}]}, "prompt.0. has the role 'tool'"),
    ],
)
def test_a_wrong_line_is_named_with_its_file_and_number(tmp_path, line, message):
    path = written(tmp_path, PROGRAM, "", line)
    with pytest.raises(ValueError, match=rf"problems\.jsonl, line 3: .*{message}"):
        load_problems(path)


def test_a_line_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"line 1: .*UTF-8"):
        load_problems(str(path))


def test_a_missing_or_empty_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no file or folder .*absent\.jsonl"):
        load_problems(str(tmp_path / "absent.jsonl"))
    with pytest.raises(ValueError, match="holds no record"):
        load_problems(written(tmp_path, "", ""))


def test_tables_and_chats_are_read_and_fields_that_are_not_used_left_alone(tmp_path):
    chat = [{"role": "user", "content": "Double it."}]
    rows = [
        {"question": chat, "tests": json.dumps(PROGRAM["tests"]), "entry_point": None, "source": "mine"},
        {"question": chat, "tests": json.dumps(FUNCTION["tests"]), "entry_point": "add", "source": None},
    ]
    folder = save_to_disk(tmp_path / "all", {"train": rows, "test": rows[:1]})
    asked = (Message("user", "Double it."),)
    first = Problem(asked, (Test("2\n", "4\n"),), None, None)
    second = Problem(asked, (Test([1, [2]], {"a": None}), Test([], 1.5)), "add", None)
    assert load_problems(folder, (), "train", "question") == [first, second]
    assert load_problems(folder, (), "test", "question") == [first]
    with pytest.raises(ValueError, match=r"row 0 \(from 0\): 'prompt' is missing or null; the record has 'question'"):
        load_problems(folder, (), "train")
    # A column of objects gives each of them the fields of all others.
    objects = save_to_disk(tmp_path / "objects", [PROGRAM | {"tests": [{**PROGRAM["tests"][0], "note": None}]}] * 2)
    assert load_problems(objects)[0].tests == (Test("2\n", "4\n"),)
