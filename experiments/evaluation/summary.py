"""The summary of an evaluation's responses: estimates with intervals, as JSON and as a table."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import rich.table

from experiments.evaluation.estimates import avg_at_k, majority_at_k, pass_at_k, rate_interval
from experiments.evaluation.responses import Response
from rspo_jax.records import mean_interval

_LONGEST_SHOWN = 400  # characters of a prompt, and of a response


def summarize_responses(
    responses: Mapping[tuple[int, int], Response], problems: int, samples: int, votes: bool
) -> dict[str, Any]:
    """Return estimates with their 95 % intervals over problems, and lengths of responses.

    Rates have the interval of `rate_interval`, means of rewards and lengths that of `mean_interval`. There are no rates
    of right responses where the task does not tell which ones are. Responses that no reward applies to are not in the
    mean reward.

    Args:
      responses: responses by problem and sample, at least `samples` to each problem.
      problems: number of problems.
      samples: number of responses to each problem that count; the first ones do.
      votes: if true, the answers can be put to a vote.

    Returns:
      A dict for JSON, which depends on the responses alone. "low" and "high" of a mean are None where all problems have
      the same value.
    """
    table = [[responses[problem, sample] for sample in range(samples)] for problem in range(problems)]
    told = all(response.correct is not None for row in table for response in row)
    correct = np.array([[bool(response.correct) for response in row] for row in table])
    tokens = np.array([[response.tokens for response in row] for row in table], np.float64)
    values: dict[str, np.ndarray] = {}
    # Estimates of k samples are made for the powers of two up to their number, and for that number.
    counts = sorted({2**power for power in range(1, samples.bit_length())} | ({samples} - {1}))
    if told:
        values |= {"pass@1": avg_at_k(correct), f"avg@{samples}": avg_at_k(correct)}
        values |= {f"pass@{k}": pass_at_k(correct, k) for k in counts}
    if votes:
        answers = [[response.answer for response in row] for row in table]
        values |= {f"maj@{k}": majority_at_k(answers, correct, k) for k in counts}
        values["answered"] = _mean(table, lambda response: response.answer is not None)
    if any(response.unmarked for row in table for response in row):
        values["unmarked"] = _mean(table, lambda response: response.unmarked)
    if any(response.left_out for row in table for response in row):
        values["left_out"] = _mean(table, lambda response: response.left_out)
    values["truncated"] = _mean(table, lambda response: response.truncated)
    rewards = [[response.reward for response in row if not response.left_out] for row in table]
    means = {
        "reward": np.array([np.mean(of_problem) for of_problem in rewards if of_problem], np.float64),
        "response_tokens": tokens.mean(axis=1),
    }
    means = {name: of_problems for name, of_problems in means.items() if of_problems.size}
    intervals = {name: rate_interval(of_problems, samples) for name, of_problems in values.items()}
    intervals |= {name: mean_interval(of_problems) or (None, None) for name, of_problems in means.items()}
    estimates = {
        name: {"value": float(of_problems.mean()), "low": intervals[name][0], "high": intervals[name][1]}
        for name, of_problems in (values | means).items()
    }
    return {
        "problems": problems,
        "samples": samples,
        "estimates": estimates,
        "lengths": {
            "median": float(np.median(tokens)),
            "longest": float(tokens.max()),
            "mean_if_right": float(tokens[correct].mean()) if correct.any() else None,
            "mean_if_wrong": float(tokens[~correct].mean()) if told and not correct.all() else None,
        },
    }


def summarize_kinds(
    responses: Mapping[tuple[int, int], Response], kinds: Sequence[str], samples: int
) -> dict[str, dict[str, Any]]:
    """Return for each kind of problems their number and the estimates of the mean reward and of pass@1.

    Args:
      responses: as `summarize_responses` takes them.
      kinds: that of each problem.
      samples: number of responses to each problem that count.
    """
    found = {}
    for kind in sorted(set(kinds)):
        rows = [row for row, other in enumerate(kinds) if other == kind]
        own = {(place, sample): responses[row, sample] for place, row in enumerate(rows) for sample in range(samples)}
        estimates = summarize_responses(own, len(rows), samples, votes=False)["estimates"]
        shown = {name: estimates[name] for name in ("pass@1", "reward") if name in estimates}
        found[kind] = {"problems": len(rows), "estimates": shown}
    return found


def make_kinds_table(kinds: Mapping[str, Mapping[str, Any]]) -> rich.table.Table:
    """Return the estimates of `summarize_kinds` as a table, one line a kind."""
    table = rich.table.Table()
    for column in ("", "problems", "pass@1", "95 % interval", "reward"):
        table.add_column(column, justify="left" if column == "" else "right")
    for kind, found in kinds.items():
        rate, reward = found["estimates"].get("pass@1"), found["estimates"].get("reward")
        solved = ["", ""]
        if rate is not None:
            solved = [f"{100 * rate['value']:.1f} %", f"{100 * rate['low']:.1f} to {100 * rate['high']:.1f} %"]
        table.add_row(kind, str(found["problems"]), *solved, "" if reward is None else f"{reward['value']:.3f}")
    return table


def _mean(table: list[list[Response]], value: Callable[[Response], float]) -> np.ndarray:
    """Return the mean of a value over the responses to each problem, float64 [problems]."""
    return np.array([[value(response) for response in row] for row in table], np.float64).mean(axis=1)


def make_table(summary: Mapping[str, Any]) -> rich.table.Table:
    """Return the estimates of `summarize_responses` as a table, one line each."""
    table = rich.table.Table()
    for column in ("", "estimate", "95 % interval"):
        table.add_column(column, justify="left" if column == "" else "right")
    shown = dict(summary["estimates"])
    avg = f"avg@{summary['samples']}"
    if "pass@1" in shown:
        shown[f"pass@1 = {avg}"] = shown.pop("pass@1")
        del shown[avg]
    for name in sorted(shown, key=lambda name: name != f"pass@1 = {avg}"):
        value, low, high = (shown[name][entry] for entry in ("value", "low", "high"))
        if name in ("reward", "response_tokens"):
            words, digits = ("reward", ".3f") if name == "reward" else ("tokens of a response", ",.1f")
            interval = "" if low is None else f"{low:{digits}} to {high:{digits}}"
            table.add_row(words, f"{value:{digits}}", interval)
        else:
            words = {"truncated": "cut off", "unmarked": "without marker", "left_out": "left out"}.get(name, name)
            table.add_row(words, f"{100 * value:.1f} %", f"{100 * low:.1f} to {100 * high:.1f} %")
    return table


def describe_lengths(lengths: Mapping[str, Any]) -> str:
    """Return the line about lengths of responses under the table."""
    parts = [f"median {lengths['median']:,.0f}", f"longest {lengths['longest']:,.0f}"]
    for name in ("right", "wrong"):
        mean = lengths[f"mean_if_{name}"]
        parts += [] if mean is None else [f"mean of {name} ones {mean:,.1f}"]
    return f"tokens of a response: {', '.join(parts)}"


def show_response(prompt: str, response: Response) -> str:
    """Return a prompt with a response and the verdict; long prompts lose their end, long responses their beginning."""
    begin = prompt if len(prompt) <= _LONGEST_SHOWN else f"{prompt[:_LONGEST_SHOWN]} [...]"
    text = response.text or "(nothing)"
    end = text if len(text) <= _LONGEST_SHOWN else f"[...] {text[-_LONGEST_SHOWN:]}"
    if response.left_out or response.truncated:
        verdict = "left out" if response.left_out else "cut off"
    elif response.correct is None:
        verdict = f"reward {response.reward:.3g}"
    else:
        verdict = "right" if response.correct else "wrong"
    return f"{begin} {end}   {verdict}"
