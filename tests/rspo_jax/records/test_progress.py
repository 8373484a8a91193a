"""The display of a run, on a terminal and in a log."""

import io
import math
import re

import pytest
import rich.console

from rspo_jax.records import PhaseProgress

RL_METRICS = {
    "reward": 0.4123,
    "solve_rate": 0.384,
    "gamma_mean": 0.98765,
    "clip_fraction": 0.0123,
    "entropy": 0.8321,
    "tokens_per_second": 1204.4,
}


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def run_plainly(phase, total, updates, completed=0, seconds=lambda step: 60.0):
    """Return the lines that the updates print without a terminal."""
    clock, output = Clock(), io.StringIO()
    console = rich.console.Console(file=output, force_terminal=False, width=60)
    with PhaseProgress(phase, total, completed, console, clock) as progress:
        for step, values in updates:
            clock.now += seconds(step)
            progress.update(step, values)
    text = output.getvalue()
    assert all(character.isprintable() or character == "\n" for character in text)
    return text.splitlines()


def test_plain_report_names_everything():
    assert run_plainly("rl", 1, [(1, RL_METRICS)]) == [
        "RL 1/1: reward 0.412, solve rate 38.4%, γ 0.9877, clipped 1.23%, entropy 0.832, 1,204 tokens/s, 0:00:00 left"
    ]
    assert run_plainly("warm_start", 1, [(1, {"loss": 1.23456, "tokens_per_second": 99.0})]) == [
        "warm start 1/1: loss 1.235, 99 tokens/s, 0:00:00 left"
    ]


def test_missing_metrics_show_as_a_dash_and_nan_as_nan():
    assert run_plainly("rl", 1, [(1, {"reward": math.nan, "grad_norm": 2.0})]) == [
        "RL 1/1: reward nan, solve rate –, γ –, clipped –, entropy –, – tokens/s, 0:00:00 left"
    ]


@pytest.mark.parametrize(
    ("total", "completed", "reported"),
    [
        (400, 0, [1, *range(20, 401, 20)]),
        (30, 0, [1, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18, 20, 21, 23, 24, 26, 27, 29, 30]),
        (7, 0, [1, 2, 3, 4, 5, 6, 7]),
        (400, 290, [291, *range(300, 401, 20)]),
    ],
)
def test_plain_reports_come_at_about_every_twentieth(total, completed, reported):
    lines = run_plainly("rl", total, [(step, {}) for step in range(completed + 1, total + 1)], completed)
    assert [line.split("/")[0] for line in lines] == [f"RL {step}" for step in reported]


def test_rewards_by_name_take_the_place_of_a_solve_rate_that_is_not_told():
    of_rewards = {"reward": 0.5, "rewards/correct/mean": 0.25, "rewards/correct/std": 0.1, "rewards/brief/mean": -1.0}
    held_out = {"eval_greedy_reward": 1.5, "eval_greedy_reward_low": math.nan, "eval_greedy_reward_high": math.nan}
    held_out |= {"eval_sampled_reward": -0.25, "eval_sampled_reward_low": -0.5, "eval_sampled_reward_high": 0.0}
    line = run_plainly("rl", 40, [(1, of_rewards | held_out | {"left_out": 3.0, "unjudged": 2.0})])[0]
    assert line.startswith("RL 1/40: reward 0.500, correct 0.250, brief -1.000, γ –")
    assert "solve rate" not in line and "3 left out, 2 not judged" in line
    assert "held-out reward greedy 1.500, sampled -0.250 [-0.500, 0.000]" in line
    (line,) = run_plainly("rl", 40, [(1, of_rewards | {"rewards/brief/mean": math.nan})])
    assert line.startswith("RL 1/40: reward 0.500, correct 0.250, brief –, γ –")
    rates = {"solve_rate": 0.5, "eval_greedy": 0.25, "eval_greedy_reward": 1.0}
    told = run_plainly("rl", 40, [(1, of_rewards | rates)])[0]
    assert "solve rate 50.0%" in told and "held-out greedy 25.0%" in told and "left out" not in told


def test_evaluations_are_always_reported():
    evaluation = {"eval_greedy": 0.412, "eval_greedy_low": 0.38, "eval_greedy_high": 0.445, "eval_sampled": 0.35}
    lines = run_plainly("rl", 1000, [(1, {}), (2, {}), (3, evaluation), (4, {}), (5, {"eval_sampled": 0.5})])
    assert [line.split(":")[0] for line in lines] == ["RL 1/1000", "RL 3/1000", "RL 5/1000"]
    assert ", held-out greedy 41.2% [38.0%, 44.5%], sampled 35.0%, " in lines[1]
    assert ", held-out sampled 50.0%, " in lines[2]


def test_skipped_updates_get_a_line_of_their_own():
    skipped = [0.0, 1.0, 0.0, 2.0]
    lines = run_plainly("rl", 1000, [(step, {"skipped_updates": count}) for step, count in enumerate(skipped, 1)])
    assert lines[1:] == ["RL step 2: 1 update skipped", "RL step 4: 2 updates skipped"]
    assert run_plainly("warm_start", 1000, [(1, {"skipped_updates": 1.0})])[0] == "warm start step 1: 1 update skipped"


def test_a_step_that_learned_from_nothing_is_reported_with_its_reason():
    reasons = [
        ({"informative_groups": 0.0, "clip_fraction": 0.0}, "the rewards of each group are all equal"),
        ({"clip_fraction": 1.0, "informative_groups": 0.5}, "the clip cut every token"),
        ({"correction_dropped_fraction": 1.0}, "the correction dropped every response"),
        ({"masked_truncated": 8.0, "truncated_fraction": 1.0}, "every response was cut off and left out"),
        ({"truncated_fraction": 1.0, "informative_groups": 0.0}, "the rewards of each group are all equal"),
        ({"grad_norm": 0.0}, "no response has a gradient"),
    ]
    steps = [(step, {"learned_updates": 0.0} | metrics) for step, (metrics, _) in enumerate(reasons, 2)]
    lines = run_plainly("rl", 1000, [(1, {"learned_updates": 1.0}), *steps])
    assert lines[1:] == [f"RL step {at}: learned from nothing: {why}" for at, (_, why) in enumerate(reasons, 2)]
    skipped = {"skipped_updates": 2.0, "learned_updates": 0.0}
    assert run_plainly("warm_start", 1000, [(1, skipped)])[:2] == [
        "warm start step 1: 2 updates skipped",
        "warm start step 1: learned from nothing: updates were skipped, as loss or gradient were not finite",
    ]


def test_time_left_ignores_the_first_step_once_it_can():
    # 1,000 s for the first step, which compiles, and 60 s for each of the others.
    lines = run_plainly("rl", 20, [(step, {}) for step in range(1, 21)], seconds=lambda step: 1000 if step == 1 else 60)
    left = [line.rsplit(", ", 1)[1] for line in lines]
    assert left[0] == "5:16:40 left"  # 19 · 1,000 s
    assert left[1:] == [f"0:{20 - step:02d}:00 left" for step in range(2, 21)]


def test_time_left_of_a_resumed_run_counts_its_own_steps():
    lines = run_plainly("rl", 100, [(91, {}), (92, {})], completed=90, seconds=lambda step: 10.0)
    assert [line.rsplit(", ", 1)[1] for line in lines] == ["0:01:30 left"]


def test_time_left_follows_a_change_of_speed():
    lines = run_plainly("rl", 200, [(step, {}) for step in range(1, 191)], seconds=lambda step: 1 if step < 100 else 7)
    assert lines[-1].startswith("RL 190/200") and lines[-1].endswith("0:01:10 left")


def test_said_text_is_printed_as_it_is():
    output = io.StringIO()
    console = rich.console.Console(file=output, force_terminal=False, width=20)
    text = "saved [bold]runs/a[/bold] :smile: after a line that is longer than the console"
    with PhaseProgress("rl", 10, console=console) as progress:
        progress.say(text)
    assert output.getvalue() == text + "\n"


def test_an_output_that_cannot_show_greek_does_not_end_the_run():
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with PhaseProgress("rl", 1, console=rich.console.Console(file=output, force_terminal=False)) as progress:
        progress.update(1, {"gamma_mean": 0.5})
    assert b"? 0.5000" in output.buffer.getvalue()


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("TTY_INTERACTIVE", "TTY_COMPATIBLE", "NO_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    return rich.console.Console(file=io.StringIO(), force_terminal=True, width=110, height=20)


def seen(console):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def test_live_bar_on_a_terminal(terminal):
    clock = Clock()
    with PhaseProgress("rl", 40, 10, terminal, clock) as progress:
        assert "10/40" in seen(terminal) and "reward –" in seen(terminal)
        for step in (11, 12):
            clock.now += 60
            progress.update(step, RL_METRICS)
        last = seen(terminal)[seen(terminal).rindex("RL ") :]  # shown at once, not only at the end
    assert "━" in last and "12/40" in last and "0:28:00 left" in last
    assert "reward 0.412  solve rate 38.4%  γ 0.9877  clipped 1.23%  entropy 0.832  1,204 tokens/s" in last
    assert "\x1b[" in terminal.file.getvalue()


def test_live_warm_start_shows_the_loss(terminal):
    with PhaseProgress("warm_start", 40, console=terminal) as progress:
        progress.update(1, {"loss": 0.75})
    assert "warm start" in seen(terminal) and "loss 0.75" in seen(terminal)
    assert "reward" not in seen(terminal)


def test_lines_stay_above_the_live_bar(terminal):
    with PhaseProgress("rl", 40, console=terminal) as progress:
        progress.update(1, RL_METRICS)
        progress.say("checkpoint saved")
        progress.update(2, {"skipped_updates": 1.0, "eval_greedy": 0.25})
    assert "checkpoint saved\n" in seen(terminal)
    assert "RL step 2: 1 update skipped\n" in seen(terminal)
    assert "RL step 2: held-out greedy 25.0%\n" in seen(terminal)


def test_the_terminal_is_given_back_after_an_error(terminal):
    with pytest.raises(RuntimeError, match="out of memory"), PhaseProgress("rl", 40, console=terminal):
        raise RuntimeError("out of memory")
    assert terminal.file.getvalue().rstrip("\n").endswith("\x1b[?25h")  # the cursor is visible again


def test_metrics_changed_later_do_not_change_the_display(terminal):
    values = dict(RL_METRICS)
    with PhaseProgress("rl", 40, console=terminal) as progress:
        progress.update(1, values)
        values["reward"] = 7.0
    assert "reward 7" not in seen(terminal)


def test_no_bar_is_drawn_into_a_file_even_where_colours_are_forced(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with PhaseProgress("rl", 40) as progress:
        progress.update(1, RL_METRICS)
    output = capsys.readouterr().out
    assert output.startswith("RL 1/40: reward 0.412") and output.count("\n") == 1 and "\x1b" not in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pretraining", 10), "phase"),
        (("rl", 0), "1 step or more"),
        (("rl", 10, 11), "11 of 10"),
        (("rl", 10, -1), "-1 of 10"),
    ],
)
def test_a_display_of_nothing_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PhaseProgress(*arguments)


def test_a_program_that_is_compiled_has_a_line_that_ends_with_its_seconds():
    output = io.StringIO()
    console = rich.console.Console(file=output, force_terminal=False, width=60)
    with PhaseProgress("rl", 2, console=console) as progress:
        progress.begin_compiling("the update")
        assert output.getvalue() == "compiling the update …"  # seen while it lasts
        progress.end_compiling("the update", 9.04)
        progress.begin_compiling("the sampler")
        progress.say("something else")  # does not land in the line that waits
        progress.end_compiling("the sampler", 12.4)
        progress.begin_compiling("the scoring pass")
    assert output.getvalue().splitlines() == [
        "compiling the update … 9.0 s",
        "compiling the sampler …",
        "something else",
        "compiling the sampler … 12 s",
        "compiling the scoring pass …",
    ]


def test_the_live_bar_counts_the_seconds_of_compiling(terminal):
    clock = Clock()
    with PhaseProgress("rl", 40, console=terminal, clock=clock) as progress:
        progress.begin_compiling("the update")
        clock.now += 7
        progress._bar.refresh()
        assert seen(terminal).rstrip().endswith("compiling the update … 7 s")
        progress.end_compiling("the update", 9.04)
        assert "compiling the update … 9.0 s\n" in seen(terminal)
        progress.update(1, RL_METRICS)
    assert "reward 0.412" in seen(terminal)[seen(terminal).rindex("RL ") :]
