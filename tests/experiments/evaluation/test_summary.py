"""The summary of given responses, and the speed by a given clock."""

import dataclasses
import io

import pytest
import rich.console

from experiments.evaluation.progress import EvaluationProgress, Throughput, describe_throughput, print_plain
from experiments.evaluation.responses import Response
from experiments.evaluation.summary import describe_lengths, make_table, show_response, summarize_responses

RIGHT = [[1, 1, 0], [0, 0, 0], [1, 0, 1], [1, 0, 0]]
ANSWERS = [["4", "4", "5"], ["7", None, "7"], ["1", "2", "1"], ["3", "8", "8"]]
TOKENS = [[2, 4, 6], [9, 9, 9], [2, 2, 2], [1, 5, 9]]


def responses():
    return {
        (problem, sample): Response(
            problem,
            sample,
            reward=RIGHT[problem][sample] / 2,
            correct=bool(RIGHT[problem][sample]),
            truncated=ANSWERS[problem][sample] is None,
            tokens=TOKENS[problem][sample],
            answer=ANSWERS[problem][sample],
            text="",
        )
        for problem in range(4)
        for sample in range(3)
    }


def test_the_estimates():
    summary = summarize_responses(responses(), problems=4, samples=3, votes=True)
    values = {name: estimate["value"] for name, estimate in summary["estimates"].items()}
    expected = {
        "pass@1": 5 / 12,
        "avg@3": 5 / 12,
        "pass@2": (1 + 0 + 1 + 2 / 3) / 4,
        "pass@3": 3 / 4,
        "maj@2": (2 / 3 + 0 + 2 / 3 + 1 / 3) / 4,
        "maj@3": 2 / 4,
        "answered": 11 / 12,
        "truncated": 1 / 12,
        "reward": 5 / 24,
        "response_tokens": 60 / 12,
    }
    assert list(values) == list(expected)
    assert values == pytest.approx(expected)
    assert summary["lengths"] == pytest.approx(
        {"median": 4.5, "longest": 9.0, "mean_if_right": 11 / 5, "mean_if_wrong": 49 / 7}
    )
    for estimate in summary["estimates"].values():
        assert estimate["low"] < estimate["value"] < estimate["high"]
    assert summarize_responses(responses(), 4, 3, votes=True) == summary


def test_a_task_that_does_not_tell_what_is_correct_has_no_rates_of_right_ones():
    """Responses that no reward applies to are not in the mean, and a problem of which nothing is left is not either."""
    found = {
        pair: dataclasses.replace(response, correct=None, left_out=pair[0] == 1 or pair == (0, 0))
        for pair, response in responses().items()
    }
    summary = summarize_responses(found, problems=4, samples=3, votes=False)
    values = {name: estimate["value"] for name, estimate in summary["estimates"].items()}
    assert values == pytest.approx(
        {"left_out": 4 / 12, "truncated": 1 / 12, "reward": (1 / 4 + 1 / 3 + 1 / 6) / 3, "response_tokens": 60 / 12}
    )
    assert summary["lengths"]["mean_if_right"] is None and summary["lengths"]["mean_if_wrong"] is None
    table = make_table(summary)
    assert next(iter(table.columns[0].cells)) == "left out"
    shown = {pair: show_response("Q", response).split("   ")[-1] for pair, response in found.items()}
    assert (shown[0, 0], shown[0, 1], shown[3, 0]) == ("left out", "reward 0.5", "reward 0.5")
    console = rich.console.Console(file=io.StringIO(), force_terminal=False, width=80)
    with EvaluationProgress(12, [], console) as progress:
        progress.update(list(found.values()))
    assert "12/12 responses, reward 0.208" in console.file.getvalue()


def test_the_first_samples_only_and_no_votes():
    summary = summarize_responses(responses(), problems=4, samples=1, votes=False)
    assert list(summary["estimates"]) == ["pass@1", "avg@1", "truncated", "reward", "response_tokens"]
    assert summary["estimates"]["avg@1"]["value"] == 3 / 4


def test_responses_without_the_marker_are_counted():
    found = responses()
    found[1, 0] = dataclasses.replace(found[1, 0], unmarked=True)
    estimates = summarize_responses(found, problems=4, samples=3, votes=False)["estimates"]
    assert estimates["unmarked"]["value"] == pytest.approx(1 / 12)


def test_two_problems_that_are_not_solved_show_how_little_that_says():
    wrong = {(problem, 0): Response(problem, 0, 0.0, False, False, 9, None, "") for problem in range(2)}
    summary = summarize_responses(wrong, problems=2, samples=1, votes=False)
    assert summary["estimates"]["pass@1"] == pytest.approx({"value": 0.0, "low": 0.0, "high": 0.6576}, abs=5e-5)
    assert summary["estimates"]["reward"] == {"value": 0.0, "low": None, "high": None}
    console = printed()
    console.print(make_table(summary))
    rows = [line.split("│")[1:-1] for line in console.file.getvalue().splitlines() if line.startswith("│")]
    table = {name.strip(): (value.strip(), interval.strip()) for name, value, interval in rows}
    assert table["pass@1 = avg@1"] == ("0.0 %", "0.0 to 65.8 %")
    assert table["reward"] == ("0.000", "")
    assert table["tokens of a response"] == ("9.0", "")


def test_lengths_where_all_are_right():
    everything = {place: response for place, response in responses().items() if response.correct and place[0] == 0}
    lengths = summarize_responses(everything, problems=1, samples=2, votes=False)["lengths"]
    assert lengths == {"median": 3.0, "longest": 4.0, "mean_if_right": 3.0, "mean_if_wrong": None}
    assert describe_lengths(lengths) == "tokens of a response: median 3, longest 4, mean of right ones 3.0"


def printed(width=100, **options):
    return rich.console.Console(file=io.StringIO(), width=width, **options)


def test_the_table():
    console = printed()
    console.print(make_table(summarize_responses(responses(), 4, 3, votes=True)))
    rows = [line.split("│")[1:-1] for line in console.file.getvalue().splitlines() if line.startswith("│")]
    table = {name.strip(): (value.strip(), interval.strip()) for name, value, interval in rows}
    assert list(table) == [
        "pass@1 = avg@3",
        "pass@2",
        "pass@3",
        "maj@2",
        "maj@3",
        "answered",
        "cut off",
        "reward",
        "tokens of a response",
    ]
    assert table["pass@1 = avg@3"][0] == "41.7 %"
    assert table["reward"][0] == "0.208"
    assert table["tokens of a response"][0] == "5.0"
    low, high = (float(bound) for bound in table["maj@3"][1].removesuffix(" %").split(" to "))
    assert 0 <= low < 50 < high <= 100


def test_a_long_response_is_shown_by_its_end():
    response = Response(0, 0, 1.0, True, False, 9, None, "a" * 1000 + " so it is 7")
    line = show_response("b" * 1000, response)
    assert line.startswith("b" * 400 + " [...] [...] ")
    assert line.endswith("a so it is 7   right")
    assert len(line) < 850
    assert show_response("1+1=", Response(0, 0, 0.0, False, True, 9, None, "")) == "1+1= (nothing)   cut off"


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def batch(size, tokens, correct=True):
    return [Response(0, sample, 1.0, correct, False, tokens, None, "") for sample in range(size)]


def test_the_first_batch_is_compilation():
    clock, console = Clock(), printed(force_terminal=False)
    progress = EvaluationProgress(10, batch(2, 5, correct=False), console, clock)
    with progress:
        assert progress.throughput is None
        clock.now += 50
        progress.update(batch(4, 10))
        assert progress.throughput == Throughput(4 / 50, 40 / 50, compilation_included=True)
        clock.now += 2
        progress.update(batch(3, 100))
        assert progress.throughput == Throughput(1.5, 150.0, compilation_included=False)
        clock.now += 2
        progress.update(batch(1, 100))
        assert progress.throughput == Throughput(1.0, 100.0, compilation_included=False)
    assert console.file.getvalue().splitlines() == [
        "6/10 responses, 66.7% right, 1 tokens/s, 0.1 responses/s",
        "9/10 responses, 77.8% right, 150 tokens/s, 1.5 responses/s, 0:00:01 left",
        "10/10 responses, 80.0% right, 100 tokens/s, 1.0 responses/s, 0:00:00 left",
    ]
    assert describe_throughput(8, progress.throughput) == "8 responses drawn and judged: 100 tokens/s, 1.0 responses/s"
    assert describe_throughput(0, None) == "all responses were there already"


def test_a_log_gets_no_more_than_some_twenty_lines():
    console = printed(force_terminal=False)
    with EvaluationProgress(1000, (), console) as progress:
        for _ in range(1000):
            progress.update(batch(1, 1))
    assert 20 <= len(console.file.getvalue().splitlines()) <= 22


def test_a_terminal_gets_one_line_that_is_kept_up_to_date():
    console = printed(force_terminal=True)
    with EvaluationProgress(2, (), console, Clock()) as progress:
        progress.update(batch(2, 1))
    assert "2/2 responses, 100.0% right" in console.file.getvalue()


def test_what_an_output_cannot_show_does_not_end_the_command():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_plain(rich.console.Console(file=file, width=20), "x ≤ 3 [red]or[/red] " + "long " * 10)
    file.flush()
    shown = file.buffer.getvalue().decode()
    assert shown.startswith("x ? 3 [red]or[/red] ")
    assert shown.count("\n") == 1
