"""The benchmark of refilled slots on a small case: what it prints and what it refuses."""

import numpy as np
import pytest

from experiments.bench import refill as bench_refill


@pytest.mark.slow
def test_a_small_case(capsys):
    sizes = ["--requests", "4", "--slots", "2", "--prompt-tokens", "3", "--max-new-tokens", "6"]
    assert bench_refill.main([*sizes, "--stop-tokens", "8", "--repeats", "2"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("refilled", "batch after", "all at once"))


@pytest.mark.slow
def test_slots_draw_what_is_drawn_all_at_once():
    benchmark = bench_refill.Benchmark(requests=4, slots=2, prompt_tokens=3, max_new_tokens=6, repeats=2)
    calls = bench_refill.contenders(benchmark, 8)
    refilled, at_once = calls["refilled slots"](), calls["all at once"]()
    np.testing.assert_array_equal(refilled.tokens, at_once.tokens)
    np.testing.assert_array_equal(refilled.mask, at_once.mask)


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
        bench_refill.Benchmark(**changes)
