"""The command that tries the judge of mathematics on references."""

import json

from experiments.check_references import main
from experiments.tasks.mathematics.references import raised_by_one


def test_the_command_counts_what_is_earned_and_lists_what_is_not(tmp_path, capsys):
    answers = ["5", r"\frac{1}{2}", "x \\to 2", "5."]
    path = tmp_path / "math500-part.jsonl"
    path.write_text("\n".join(json.dumps({"problem": "Q", "answer": a, "solution": "S"}) for a in answers))
    assert main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "3 of 4 references are earned by themselves" in printed
    assert "5 of 5 answers with one number raised by one are wrong" in printed
    assert "  cannot be read, so that only its own text earns: x \\to 2\n" in printed


def test_a_file_of_no_known_set_is_refused(tmp_path, capsys):
    assert main([str(tmp_path / "mine.jsonl")]) == 2
    assert "name its layout with --set" in capsys.readouterr().err


def test_numbers_are_raised_one_at_a_time_with_the_reason_why_that_may_mean_the_same():
    assert list(raised_by_one("1.09x^2")) == [("2.09x^2", ""), ("1.10x^2", ""), ("1.09x^3", "")]
    assert list(raised_by_one("52_8"))[1] == ("52_9", "the base of a numeral")
    assert list(raised_by_one(r"15\mbox{ cm}^2"))[1] == (r"15\mbox{ cm}^3", "the exponent of a unit")
