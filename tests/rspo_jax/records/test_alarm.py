"""Alarm and collapse on made-up runs, by the rules as their docstrings state them."""

import math

import pytest

from rspo_jax.records import Alarm, AlarmRule, CollapseRule, alarm_record, judge_alarm
from rspo_jax.records.alarm import collapse_step, first_alarm

CALM = {
    "reward": 0.5,
    "ratio_max": 1.2,
    "approx_kl": 0.002,
    "clip_fraction": 0.004,
    "entropy": 0.5,
    "drift": 0.01,
}
RULE = AlarmRule(reference=6, window=3)


def run_of(changes, length=30):
    """Return the rows of steps 0 to `length`, calm except for metrics that `changes` sets from a step on."""
    rows = [
        {"phase": "warm_start", "step": 1, "loss": 2.0, "ratio_max": 1e9},
        {"phase": "rl", "step": 0, "reward": 9.0},
    ]
    for step in range(1, length + 1):
        values = dict(CALM)
        for metric, (first, value) in changes.items():
            if step >= first:
                values[metric] = value
        rows.append({"phase": "rl", "step": step} | values)
    return rows


def test_a_calm_run_rings_nothing():
    alarm = first_alarm(run_of({}), RULE)
    assert alarm.step is None and alarm.why == ""


# The means of three steps; what each must reach with two signs, one of which is there from step 12 on.
@pytest.mark.parametrize(
    ("metric", "calm", "loud"),
    [
        ("ratio_max", math.exp(0.99), math.exp(1.01)),  # least: 1 nat; three times log 1.2 is less
        ("clip_fraction", 0.0199, 0.0201),  # least: 2 %
        ("approx_kl", 0.0099, 0.0101),  # least: 0.01
        ("entropy", 0.151, 0.149),  # 0.3 of 0.5
        ("drift", 0.0299, 0.0301),  # three times 0.01
    ],
)
def test_each_sign_holds_from_its_threshold_on(metric, calm, loud):
    other = ("clip_fraction", 0.5) if metric != "clip_fraction" else ("ratio_max", 99.0)
    assert first_alarm(run_of({metric: (12, calm), other[0]: (12, other[1])}), RULE).step is None
    alarm = first_alarm(run_of({metric: (12, loud), other[0]: (12, other[1])}), RULE)
    assert alarm.step == 14 and len(alarm.why.split("), ")) == 2


def test_a_sign_is_a_mean_over_the_window():
    rows = run_of({"ratio_max": (12, math.exp(1.5)), "clip_fraction": (12, 0.03)})
    # Clip: (0.004 + 2 · 0.03) / 3 ≥ 0.02 from step 13; ratio: (0.18 + 2 · 1.5) / 3 ≥ 1 from step 13.
    assert first_alarm(rows, RULE).step == 13
    assert first_alarm(rows, AlarmRule(reference=6, window=1)).step == 12


def test_one_sign_alone_is_not_enough_unless_it_is_asked_for():
    rows = run_of({"entropy": (12, 0.01)})
    assert first_alarm(rows, RULE).step is None
    alarm = first_alarm(rows, AlarmRule(reference=6, window=3, signs=1))
    assert alarm.step == 14 and alarm.why == "entropy 0.01 (was 0.5)"


def test_many_times_the_reference_is_needed_where_that_is_much():
    noisy = {"clip_fraction": (1, 0.1), "ratio_max": (1, math.exp(2))}
    assert first_alarm(run_of(noisy), RULE).step is None
    rows = run_of(noisy)
    for row in rows[20:]:
        row |= {"clip_fraction": 0.31, "ratio_max": math.exp(6.1)}
    assert first_alarm(rows, RULE).step == rows[22]["step"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_a_sign(value):
    alarm = first_alarm(run_of({"ratio_max": (12, value), "clip_fraction": (9, 0.5)}), RULE)
    assert alarm.step == 12 and alarm.why.startswith("ratio_max is not finite, clipped 50.0% (was 0.4%)")


def test_steps_in_a_row_that_learn_from_nothing_ring_alone():
    alarm = first_alarm(run_of({"learned_updates": (3, 0.0)}), RULE)
    assert (alarm.step, alarm.why) == (7, "5 steps in a row learned from nothing")
    assert first_alarm(run_of({"learned_updates": (3, 0.0)}), AlarmRule(idle=2)).step == 4
    # One update that learned is enough, and a policy that is always right has nothing left to learn.
    assert first_alarm(run_of({"learned_updates": (3, 1.0)}), RULE).step is None
    assert first_alarm(run_of({"learned_updates": (3, 0.0), "solve_rate": (3, 1.0)}), RULE).step is None
    rows = run_of({"learned_updates": (3, 0.0)})
    for row in rows[5::4]:
        row["learned_updates"] = 2.0
    assert first_alarm(rows, RULE).step is None


def test_metrics_that_are_missing_are_no_signs():
    rows = run_of({"clip_fraction": (12, 0.5)})
    for row in rows:
        for metric in ("ratio_max", "entropy", "drift"):
            row.pop(metric, None)
    assert first_alarm(rows, RULE).step is None
    assert first_alarm(rows, AlarmRule(reference=6, window=3, signs=1)).step == 12


def test_it_says_why_once_and_only_then():
    alarm = Alarm(RULE)
    said = [alarm.update(row) for row in run_of({"ratio_max": (12, 50.0), "clip_fraction": (12, 0.5)})]
    assert [text for text in said if text] == [alarm.why]
    assert said.index(alarm.why) == alarm.step + 1  # rows 0 and 1 are no steps
    assert alarm.why.startswith("largest log-ratios")


@pytest.mark.parametrize(
    ("metric", "calm", "loud"),
    [("ratio_max", math.exp(2.99), math.exp(3.01)), ("approx_kl", 0.0499, 0.0501), ("drift", 0.0799, 0.0801)],
)
def test_what_is_much_for_any_run_needs_no_reference(metric, calm, loud):
    other = ("drift", 0.5) if metric != "drift" else ("approx_kl", 1.0)
    assert first_alarm(run_of({metric: (1, calm), other[0]: (1, other[1])}), RULE).step is None
    alarm = first_alarm(run_of({metric: (1, loud), other[0]: (1, other[1])}), RULE)
    assert alarm.step == 2 and "was" not in alarm.why


def test_nothing_is_compared_before_reference_and_window_are_full():
    rows = run_of({"clip_fraction": (3, 0.5), "entropy": (3, 0.01)})
    rule = AlarmRule(reference=2, window=3)
    assert first_alarm(rows[:6], rule).step is None  # steps 1 to 4
    assert first_alarm(rows, rule).step == 5


def fallen(from_step, to, length=40, back_at=None):
    rows = run_of({"reward": (from_step, to)}, length)
    for row in rows:
        if back_at is not None and row["step"] >= back_at:
            row["reward"] = 0.5
    return rows


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (fallen(11, 0.0), 13),  # means of 4: 0.375, 0.25 (not below half of 0.5), 0.125
        (fallen(11, 0.26), None),  # above half
        (fallen(11, 0.0, back_at=30), None),  # it comes back
        (fallen(31, 0.0), 33),  # stays for 8 steps
        (fallen(34, 0.0), None),  # for 5, too few to be sure
        (fallen(1, 0.0), None),  # never had anything
        (fallen(2, 0.0), 3),  # destroyed by the first update: means of what there is, 0.5, 0.25, 0.17
        (fallen(11, 0.0)[:20], 13),
        ([], None),
    ],
)
def test_collapse_is_below_half_of_the_best_for_good(rows, expected):
    assert collapse_step(rows, CollapseRule(window=4, stays=6)) == expected


def test_the_best_is_a_moving_mean_and_the_best_so_far():
    rows = run_of({}, 40)
    for row in rows[2:]:
        row["reward"] = 0.9 if row["step"] == 10 else 0.3 if row["step"] < 20 else 0.2
    assert collapse_step(rows, CollapseRule(window=4, stays=6)) == 23  # best mean 0.45: below 0.225 once all four are


def test_steps_without_a_reward_are_left_out():
    rows = fallen(11, 0.0)
    rows[10]["reward"] = math.nan
    del rows[20]["reward"]
    assert collapse_step(rows, CollapseRule(window=4, stays=6)) == 13


def test_lead_time_over_many_runs():
    burst = {"ratio_max": (12, 50.0), "clip_fraction": (12, 0.5)}
    runs = [
        run_of(burst | {"reward": (18, 0.0)}),  # rings at 12 or so, collapses at 20
        run_of({"reward": (18, 0.0)}),  # no sign
        run_of(burst),  # no collapse
        run_of({}),
        run_of({name: (22, value) for name, (_, value) in burst.items()} | {"reward": (10, 0.0)}),  # too late
    ]
    rule = CollapseRule(window=4, stays=6)
    first = judge_alarm(runs[0], RULE, rule)
    assert first.collapse == 20 and first.lead == 20 - first.alarm > 0
    assert judge_alarm(runs[4], RULE, rule).lead < 0
    assert alarm_record(runs, RULE, rule) == ([first.lead], 2, 1, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AlarmRule(window=0), "window"),
        (lambda: AlarmRule(reference=0), "reference"),
        (lambda: AlarmRule(signs=6), "signs"),
        (lambda: AlarmRule(idle=0), "idle must be at least 1, got 0"),
        (lambda: CollapseRule(share=1.0), "share"),
        (lambda: CollapseRule(stays=0), "stays"),
    ],
)
def test_impossible_rules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
