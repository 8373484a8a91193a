"""The benchmark of refilled slots on a small case: its table, its refusals, and that slots do not change responses."""

import dataclasses

import numpy as np
import pytest

from experiments.bench import refill as bench_refill


@pytest.mark.slow
def test_a_small_case(capsys, monkeypatch):
    """The responses are those of the calls that were timed."""
    monkeypatch.setattr(bench_refill, "MODEL", dataclasses.replace(bench_refill.MODEL, num_layers=1, expert_size=8))
    timed, contenders = [], bench_refill.contenders
    monkeypatch.setattr(bench_refill, "contenders", lambda *case: timed.append(contenders(*case)) or timed[-1])
    sizes = ["--requests", "4", "--slots", "2", "--prompt-tokens", "3", "--max-new-tokens", "6"]
    assert bench_refill.main([*sizes, "--stop-tokens", "8", "--repeats", "2"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("refilled", "batch after", "all at once"))
    refilled, in_batches, at_once = (call() for call in timed[0].values())
    for samples in (refilled, in_batches):
        np.testing.assert_array_equal(samples.tokens, at_once.tokens)
        np.testing.assert_array_equal(samples.mask, at_once.mask)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"requests": 10, "slots": 4}, "10 requests do not divide into batches of 4 slots"),
        ({"stop_tokens": (0,)}, "stop_tokens must lie between 1 and 31"),
        ({"stop_tokens": (32,)}, "stop_tokens must lie between 1 and 31"),
        ({"repeats": 1}, "repeats must be at least 2, got 1"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        bench_refill.RefillBenchmark(**changes)
