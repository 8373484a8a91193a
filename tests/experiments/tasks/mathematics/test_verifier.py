"""The verifier of mathematics: answers that are the same, and answers that are not."""

import pytest

from experiments.tasks.mathematics.verifier import LONGEST_ANSWER, is_readable, judge


def verdict(answer: str, response: str, must_be_boxed: bool = True) -> str:
    found = judge((answer, response, must_be_boxed))
    assert found["answered"] or not found["correct"]
    return "right" if found["correct"] else "wrong" if found["answered"] else "unanswered"


@pytest.mark.parametrize(
    ("answer", "given"),
    [
        ("18", "18"),
        ("18", "18.0"),
        ("18", "18."),
        ("18", "+18"),
        ("18", r"\$18"),
        ("18", "$18"),
        ("18", r"18 \text{ dollars}"),
        ("18", r"\text{18}"),
        ("18", r"\mathbf{18}"),
        ("18", r"x = 18"),
        ("18", r"36/2"),
        ("073", r"\textbf{(073)}"),
        ("25", "025"),
        ("1200", "1,200"),
        ("1200", "1{,}200"),
        (r"10,\!080", "10080"),
        (r"\frac{1}{2}", "0.5"),
        (r"\frac{1}{2}", r"\dfrac12"),
        (r"\frac{1}{2}", "1/2"),
        (r"\frac{1}{3}", "0.333333"),
        ("-1/3", "-1./3"),
        ("p - q", "-q + p"),
        ("x=5", "5"),
        ("1,-2", "-2, 1"),
        ("3, 5, 7", r"\{7, 5, 3\}"),
        (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}"),
        (r"90^\circ", "90"),
        (r"\text{(C)}", "C"),
        (r"\text{Evelyn}", "Evelyn"),
        ("62.5%", "0.625"),
        (r"8 \%", "8"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
        (r"(-\infty, 2) \cup (3, \infty)", r"(-\infty,2)\cup(3,\infty)"),
        (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"\begin{pmatrix} -\frac13 \\ \frac23 \end{pmatrix}"),
        (r"4.5 \times 10^{33}", "4.5e33"),
        (r"4.5 \times 10^{33}", r"45 \cdot 10^{32} \text{ ergs}"),
        (r"4.6 \times 10^{-24}", r"4.6 \times 10^{-24}"),
        (r"4.6 \times 10^{-24}", "4.6e-24"),
        (r"1 \times 10^{-8}", "10^{-8}"),
        (".0000672", r"6.72 \times 10^{-5}"),
        (r"\frac{1}{6084}", "1/6084"),
        (r"\arcsin(10/13)", r"\sin^{-1}(10/13)"),
    ],
)
def test_answers_that_are_the_same(answer, given):
    assert verdict(answer, f"So it is $\\boxed{{{given}}}$.") == "right"


@pytest.mark.parametrize(
    ("answer", "given"),
    [
        ("18", "19"),
        ("18", "-18"),
        ("18", "18,000"),
        ("18", "18, 19"),
        ("18", "17 or 18"),
        ("18", "18x"),
        ("18", r"\infty"),
        ("18", "١٨"),
        ("5", "５"),
        (r"\frac{1}{3}", "0.333"),
        ("(2,4)", "(4,2)"),
        ("[2,4]", "(2,4)"),
        ("52_8", "42_8"),
        (r"\text{even}", "odd"),
        ("x=5", "x=6"),
        ("p - q", "q - p"),
        (r"4.6 \times 10^{-24}", r"4.7 \times 10^{-24}"),
        (r"4.6 \times 10^{-24}", "4.7e-24"),
        (r"4.6 \times 10^{-24}", "0"),
        (r"4.6 \times 10^{-24}", "x"),
        (".0000672", "0.0000668"),
        (r"\frac{1}{6084}", r"\frac{1}{6085}"),
        ("0", "10^{-30}"),
    ],
)
def test_answers_that_are_not_the_same(answer, given):
    assert verdict(answer, f"So it is $\\boxed{{{given}}}$.") == "wrong"


@pytest.mark.parametrize(
    ("response", "boxed", "free"),
    [
        (r"\boxed{7} or \boxed{18}", "right", "right"),
        (r"\boxed{18} or \boxed{7}", "wrong", "wrong"),
        (r"18, so \boxed{7}", "wrong", "wrong"),
        (r"\boxed{18} or \boxed{", "unanswered", "unanswered"),
        (r"It is 18, \boxed{1", "unanswered", "unanswered"),
        (r"\boxed{}", "unanswered", "unanswered"),
        (r"\boxed{ }", "unanswered", "unanswered"),
        ("The answer is 18.", "unanswered", "right"),
        ("The answer is $18$.", "unanswered", "right"),
        ("5 + 13 = 18", "unanswered", "right"),
        ("7 children share 18 days * 1 answer 5\n#### 18", "unanswered", "right"),
        ("It is 18.\n#### 7", "unanswered", "wrong"),
        ("18" + 3_000 * " so", "unanswered", "unanswered"),
        ("I do not know.", "unanswered", "unanswered"),
        ("", "unanswered", "unanswered"),
    ],
)
def test_where_an_answer_is_looked_for(response, boxed, free):
    assert verdict("18", response, must_be_boxed=True) == boxed
    assert verdict("18", response, must_be_boxed=False) == free


def test_long_answers_are_not_read():
    longest = "1" + "+1" * ((LONGEST_ANSWER - 1) // 2)
    assert verdict("1", f"\\boxed{{{'0' * LONGEST_ANSWER}1}}") == "unanswered"
    assert len(longest) <= LONGEST_ANSWER
    assert verdict("1", f"\\boxed{{{longest}}}") == "wrong"


def test_answers_that_only_their_own_text_equals_are_known():
    assert is_readable(r"\frac{1}{2}")
    assert not is_readable("t(0,4]")
    assert verdict("t(0,4]", r"\boxed{t(0,4]}") == "right"
    assert verdict("t(0,4]", r"\boxed{(0,4]}") == "wrong"


@pytest.mark.parametrize(
    ("answer", "given", "name"),
    [
        ("18", "18.0", "18"),  # right answers have the name of the answer
        (r"\frac{1}{2}", "0.5", r"\frac{1}{2}"),
        ("18", r"\frac{1}{2}", judge(("18", r"\boxed{0.5}", True))["answer"]),
        ("18", "x + 1", judge(("18", r"\boxed{1+x}", True))["answer"]),
        ("18", "7", "7"),
        ("18", r"\sqrt{8}", judge(("18", r"\boxed{2\sqrt2}", True))["answer"]),
        ("18", "x = 1, 2", judge(("18", r"\boxed{\{2,1\}}", True))["answer"]),
    ],
)
def test_answers_that_mean_the_same_have_one_name(answer, given, name):
    assert judge((answer, f"\\boxed{{{given}}}", True))["answer"] == name


def test_what_is_no_answer_has_no_name():
    assert judge(("18", "18", True))["answer"] is None
    assert judge(("18", r"\boxed{}", True))["answer"] is None
    assert judge(("18", r"\boxed{7}", True))["answer"] != judge(("18", r"\boxed{8}", True))["answer"]
