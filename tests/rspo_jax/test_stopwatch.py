"""The seconds of a step by stage: each counts once, for the stage that ends."""

import pytest

from rspo_jax.stopwatch import STAGES, Stopwatch, unmeasured


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Pending:
    def __init__(self, ready):
        self.is_ready = lambda: ready


@pytest.fixture
def clock():
    return Clock()


def passing(clock, watch, *laps):
    """Let seconds pass before each lap: (seconds, stage, what the device does beside it)."""
    for seconds, *lap in laps:
        clock.now += seconds
        watch.lap(*lap)


def test_the_stages_and_the_rest_add_up_to_the_step(clock):
    watch = Stopwatch(clock)
    passing(clock, watch, (0.5, "draw"), (8.0, "judge"), (0.25, "draw"), (2.0, "score"), (4.0, "update"))
    clock.now += 0.125
    metrics = watch.take(tokens=119)
    stages = {"draw": 0.75, "judge": 8.0, "score": 2.0, "update": 4.0, "other": 0.125}
    assert {name: metrics[f"seconds_{name}"] for name in STAGES} == dict.fromkeys(STAGES, 0.0) | stages
    assert metrics["step_seconds"] == 14.875 and metrics["tokens_per_second"] == 8.0
    assert metrics["compile_seconds"] == metrics["overlapped_seconds"] == 0


def test_each_row_has_the_seconds_since_the_one_before(clock):
    watch = Stopwatch(clock)
    clock.now += 100
    watch.restart()  # what came before a phase is no step's
    passing(clock, watch, (1.0, "update"))
    assert watch.take(1)["step_seconds"] == 1
    passing(clock, watch, (2.0, "write"), (4.0, "evaluate"))
    row = watch.take()
    assert (row["seconds_update"], row["seconds_write"], row["seconds_evaluate"]) == (0, 2, 4)
    assert "step_seconds" not in row and "tokens_per_second" not in row  # it was no step


def test_overlapped_are_the_seconds_after_which_the_device_was_still_busy(clock):
    watch = Stopwatch(clock)
    busy, ready = Pending(False), Pending(True)
    passing(clock, watch, (1.0, "write", busy), (2.0, "judge", busy), (4.0, "judge", ready), (8.0, "judge"))
    metrics = watch.take(1)
    assert metrics["overlapped_seconds"] == 3
    assert metrics["step_seconds"] == 15  # they are part of their stages, and not added
    assert watch.take()["overlapped_seconds"] == 0


def test_compiling_counts_beside_the_stages(clock):
    compiled = [5.0]
    watch = Stopwatch(clock, lambda: compiled[0])
    for more in (3.0, 0.0):
        compiled[0] += more
        passing(clock, watch, (4.0, "score"))
        metrics = watch.take(1)
        assert (metrics["compile_seconds"], metrics["seconds_score"], metrics["step_seconds"]) == (more, 4, 4)


def test_a_function_that_is_not_measured_may_lap_all_the_same():
    assert unmeasured("draw") is unmeasured("judge", Pending(False)) is None
