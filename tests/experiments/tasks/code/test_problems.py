"""Programming problems in JSONL files: what is read, and the message for each kind of wrong line."""

import json

import pytest

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
        ("[1]", r"the line is \[1\], but it must be an object with 'prompt', 'tests'"),
        ("[" * 100_000, ""),  # the message depends on the version of Python
        ({"prompt": "p"}, "the line has no 'tests'"),
        ({"tests": []}, "the line has no 'prompt'"),
        ({**PROGRAM, "solutions": "x"}, "the line has the unknown 'solutions'; its fields are 'checker'"),
        ({**PROGRAM, "prompt": ""}, "'prompt' is '', but it must be text"),
        ({**PROGRAM, "prompt": None}, "'prompt' is None, but it must be text"),
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
        ('{"prompt": "p", "entry_point": "f", "tests": [{"arguments": [], "result": NaN}]}', "NaN is not a JSON value"),
    ],
)
def test_a_wrong_line_is_named_with_its_file_and_number(tmp_path, line, message):
    path = written(tmp_path, PROGRAM, "", line)
    with pytest.raises(ValueError, match=rf"problems\.jsonl, line 3: .*{message}"):
        load_problems(path)


def test_a_line_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"line 1: .*utf-8"):
        load_problems(str(path))


def test_a_missing_or_empty_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.jsonl"):
        load_problems(str(tmp_path / "absent.jsonl"))
    with pytest.raises(ValueError, match="holds no problem"):
        load_problems(written(tmp_path, "", ""))
