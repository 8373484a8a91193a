"""The record of a run on disk: rows, arrays, resumption, JSON files, and the intervals of a success rate and of
a mean."""

import datetime
import itertools
import json
import logging
import math
import os
import pathlib
import re
import shutil
import statistics

import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

from rspo_jax.records import metrics
from rspo_jax.records.lock import LockLost
from rspo_jax.records.rows import DamagedRows

FULL_RUN = [("warm_start", step) for step in range(1, 5)] + [("rl", step) for step in range(8)]


def metrics_of(phase, step):
    return {"loss": 1.0 / (step + 1), "reward": 0.125 * step if phase == "rl" else -1.0}


def record(run_dir, positions, resume_after=None):
    with metrics.MetricsLog(run_dir, resume_after) as log:
        for phase, step in positions:
            log.write(phase, step, metrics_of(phase, step))


def positions_of(rows):
    return [(row["phase"], row["step"]) for row in rows]


def scalars(run_dir, phase, name):
    events = event_accumulator.EventAccumulator(str(pathlib.Path(run_dir) / "tensorboard" / phase)).Reload()
    tag = f"{phase}/{name}"
    return [(event.step, event.value) for event in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []


# The log


def test_rows_are_written_in_order_and_read_back(tmp_path):
    run_dir = tmp_path / "runs" / "one"
    record(run_dir, FULL_RUN, None)
    rows = metrics.read_metrics(run_dir)
    assert positions_of(rows) == FULL_RUN
    assert all(
        row == {"phase": row["phase"], "step": row["step"]} | metrics_of(row["phase"], row["step"]) for row in rows
    )
    assert [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()] == rows


def test_a_row_is_on_disk_once_written(tmp_path):
    with metrics.MetricsLog(tmp_path, None) as log:
        log.write("rl", 1, {"reward": 0.5})
        assert metrics.read_metrics(tmp_path) == [{"phase": "rl", "step": 1, "reward": 0.5}]


def test_array_scalars_and_integers_are_numbers(tmp_path):
    with metrics.MetricsLog(tmp_path, None) as log:
        log.write("rl", 1, {"a": np.float32(0.5), "b": np.array(0.25), "c": 3, "d": np.int64(4)})
    assert metrics.read_metrics(tmp_path) == [{"phase": "rl", "step": 1, "a": 0.5, "b": 0.25, "c": 3.0, "d": 4.0}]


def test_non_finite_numbers_become_null_and_then_nan(tmp_path):
    with metrics.MetricsLog(tmp_path, None) as log:
        log.write("rl", 1, {"loss": math.nan, "ratio_max": math.inf, "reward": -math.inf, "entropy": 0.5})
        log.write("rl", 2, {"loss": 2.0})
    text = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    expected = {"phase": "rl", "step": 1, "loss": None, "ratio_max": None, "reward": None, "entropy": 0.5}
    assert json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON")) == expected
    row = metrics.read_metrics(tmp_path)[0]
    assert all(math.isnan(row[name]) for name in ("loss", "ratio_max", "reward"))
    assert row["entropy"] == 0.5
    assert scalars(tmp_path, "rl", "loss") == [(2, 2.0)]


@pytest.mark.parametrize("phase", ["warm_start", "rl"])
def test_tensorboard_has_the_same_points(tmp_path, phase):
    record(tmp_path, FULL_RUN)
    expected = [(step, np.float32(metrics_of(phase, step)["loss"])) for name, step in FULL_RUN if name == phase]
    assert scalars(tmp_path, phase, "loss") == expected


def test_a_phase_that_did_not_happen_leaves_no_folder(tmp_path):
    record(tmp_path, [("rl", 1)])
    assert [path.name for path in (tmp_path / "tensorboard").iterdir()] == ["rl"]


def test_a_finished_run_is_not_overwritten(tmp_path):
    record(tmp_path, FULL_RUN)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="already holds a run"):
        metrics.MetricsLog(tmp_path, None)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_an_empty_file_holds_no_run(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    record(tmp_path, [("rl", 1)])
    assert positions_of(metrics.read_metrics(tmp_path)) == [("rl", 1)]


@pytest.mark.parametrize(
    ("phase", "step"),
    [("warm_start", 4), ("warm_start", 5), ("rl", 3), ("rl", 2)],
)
def test_steps_must_increase(tmp_path, phase, step):
    with metrics.MetricsLog(tmp_path, None) as log:
        log.write("warm_start", 4, {})
        log.write("rl", 3, {})
        with pytest.raises(ValueError, match=f"{phase} step {step} came after rl step 3"):
            log.write(phase, step, {})
        log.write("rl", 4, {})
    assert positions_of(metrics.read_metrics(tmp_path)) == [("warm_start", 4), ("rl", 3), ("rl", 4)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("pretraining", 1, {}), ValueError, "phase must be one of warm_start, rl"),
        (("rl", -1, {}), ValueError, "int from 0, got -1"),
        (("rl", 1.0, {}), ValueError, "Python int"),
        (("rl", True, {}), ValueError, "Python int"),
        (("rl", 1, {"step": 2.0}), ValueError, "'step'"),
        (("rl", 1, {"phase": 2.0}), ValueError, "'phase'"),
        (("rl", 1, {"reward": "0.5"}), TypeError, "'reward' is not a number"),
        (("rl", 1, {"reward": None}), TypeError, "'reward' is not a number"),
        (("rl", 1, {"reward": np.ones(3)}), TypeError, "'reward' is not a number"),
    ],
)
def test_bad_rows_are_refused_and_leave_nothing(tmp_path, arguments, error, message):
    with metrics.MetricsLog(tmp_path, None) as log:
        with pytest.raises(error, match=message):
            log.write(*arguments)
        log.write("rl", 1, {"reward": 1.0})
    assert metrics.read_metrics(tmp_path) == [{"phase": "rl", "step": 1, "reward": 1.0}]


def test_closing_twice_is_fine_and_writing_afterwards_is_not(tmp_path):
    log = metrics.MetricsLog(tmp_path, None)
    log.write("rl", 1, {})
    log.close()
    log.close()
    with pytest.raises(ValueError, match="closed"):
        log.write("rl", 2, {})


# Resuming


ORDER = [("warm_start", 0), *FULL_RUN]


@pytest.mark.parametrize(
    ("interrupted_after", "resume_after"),
    [(("rl", 5), resume) for resume in [*ORDER[:6:2], ("rl", 0), ("rl", 3), ("rl", 5)]]
    + [(("warm_start", 4), resume) for resume in [("warm_start", 1), ("warm_start", 4)]],
    ids=lambda position: f"{position[0]}-{position[1]}",
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, interrupted_after, resume_after):
    record(tmp_path / "whole", FULL_RUN)
    record(tmp_path / "resumed", FULL_RUN[: FULL_RUN.index(interrupted_after) + 1])
    rest = [position for position in FULL_RUN if ORDER.index(position) > ORDER.index(resume_after)]
    record(tmp_path / "resumed", rest, resume_after)
    whole, resumed = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "resumed"))
    assert resumed == whole
    for phase in ("warm_start", "rl"):
        points = scalars(tmp_path / "resumed", phase, "loss")
        assert len(points) > 3
        assert points == scalars(tmp_path / "whole", phase, "loss")


def test_rolled_back_points_are_hidden_before_new_ones_come(tmp_path):
    record(tmp_path, FULL_RUN)
    record(tmp_path, [], ("warm_start", 2))
    assert [step for step, _ in scalars(tmp_path, "warm_start", "loss")] == [1, 2]
    assert scalars(tmp_path, "rl", "loss") == []


def test_a_run_can_be_resumed_many_times(tmp_path):
    record(tmp_path, FULL_RUN[:7])
    for _ in range(3):
        record(tmp_path, FULL_RUN[6:], ("rl", 1))
    assert positions_of(metrics.read_metrics(tmp_path)) == FULL_RUN
    assert [step for step, _ in scalars(tmp_path, "rl", "loss")] == [0, 1, 2, 3, 4, 5, 6, 7]


def test_rolling_back_is_atomic(tmp_path, monkeypatch):
    record(tmp_path, FULL_RUN)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    calls = []

    def refuse(source, target):
        calls.append((os.path.dirname(source), str(target)))
        raise OSError("disk gone")

    monkeypatch.setattr(os, "fsync", lambda _: calls.append("fsync"))
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk gone"):
        metrics.MetricsLog(tmp_path, ("rl", 2))
    assert calls == ["fsync", (str(tmp_path), str(tmp_path / "metrics.jsonl"))]
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


@pytest.mark.parametrize("cut", [1, 12, -2])
def test_a_last_line_cut_while_written_is_dropped_with_a_warning(tmp_path, caplog, cut):
    record(tmp_path, FULL_RUN)
    path = tmp_path / "metrics.jsonl"
    *lines, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines) + last[:cut])
    with caplog.at_level(logging.WARNING):
        assert positions_of(metrics.read_metrics(tmp_path)) == FULL_RUN[:-1]
    assert "dropped the last line" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        record(tmp_path, FULL_RUN[-1:], FULL_RUN[-2])
    assert [record.message for record in caplog.records] == [
        f"{path}: dropped the last line, which was cut while it was written."
    ]
    assert path.read_bytes() == b"".join([*lines, last])


def test_a_last_line_that_lacks_only_its_newline_is_whole(tmp_path, caplog):
    record(tmp_path, FULL_RUN)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    record(tmp_path, [], FULL_RUN[-1])
    assert path.read_bytes() == whole
    assert caplog.text == ""


@pytest.mark.parametrize(
    "line",
    [
        b'{"phase": "rl", "st',
        b"",
        b"[1, 2]",
        b"12",
        b"null",
        b"\xff\xfe",
        b'{"step": 5}',
        b'{"phase": "rl"}',
        b'{"phase": "test", "step": 5}',
        b'{"phase": "rl", "step": 1.5}',
        b'{"phase": "rl", "step": null}',
        b'{"phase": "rl", "step": 5, "reward": "high"}',
    ],
)
@pytest.mark.parametrize("number", [2, len(FULL_RUN)], ids=["middle", "last"])
def test_any_other_malformed_line_is_an_error(tmp_path, line, number):
    record(tmp_path, FULL_RUN)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    lines[number - 1] = line
    path.write_bytes(b"\n".join([*lines, b""]))
    before = path.read_bytes()
    message = re.escape(f"{path}, line {number} is not a row of metrics")
    with pytest.raises(ValueError, match=message):
        metrics.read_metrics(tmp_path)
    with pytest.raises(ValueError, match=message):
        metrics.MetricsLog(tmp_path, ("rl", 3))
    assert path.read_bytes() == before


WARM_START = [("warm_start", step) for step in range(1, 4)]


@pytest.mark.parametrize(
    ("rows", "resume_after", "missing"),
    [
        ([], ("rl", 3), "rl 0 to 3"),
        ([], ("warm_start", 1), "warm_start 1"),
        ([*WARM_START, ("rl", 0), ("rl", 1)], ("rl", 3), "rl 2 to 3"),
        ([("warm_start", 2), ("rl", 7)], ("rl", 9), "warm_start 1, rl 0 to 6, rl 8 to 9"),
        ([*WARM_START, ("rl", 1), ("rl", 2)], ("rl", 2), "rl 0"),
        ([*WARM_START, ("rl", 0), ("rl", 2), ("rl", 4)], ("rl", 4), "rl 1, rl 3"),
        (WARM_START[1:], ("warm_start", 3), "warm_start 1"),
        ([*WARM_START, ("rl", 0)], ("rl", 0), None),
        ([*WARM_START, ("rl", 0)], ("warm_start", 3), None),
        ([], ("warm_start", 0), None),
    ],
    ids=str,
)
def test_lost_rows_are_told(tmp_path, caplog, rows, resume_after, missing):
    record(tmp_path, rows)
    with caplog.at_level(logging.WARNING):
        record(tmp_path, [], resume_after)
    if missing is None:
        assert caplog.text == ""
    else:
        where = f"{tmp_path / 'metrics.jsonl'} is not as it was at {resume_after[0]} step {resume_after[1]}"
        assert [line.message for line in caplog.records] == [
            f"{where}, after which the run goes on: it lacks the rows of {missing}."
        ]


def changed_line(lines):
    return [lines[0], lines[1].replace(b"0.", b"1.", 1), *lines[2:]]


DAMAGES = {
    "doubled": lambda lines: [lines[0], *lines],
    "doubled later": lambda lines: [*lines, lines[1]],
    "exchanged": lambda lines: [lines[1], lines[0], *lines[2:]],
    "of another file": lambda lines: [*lines, *lines],
    "lost": lambda lines: [lines[0], *lines[2:]],
    "lost at the end": lambda lines: lines[:-1],
    "lost at the start": lambda lines: lines[1:],
    "all lost": lambda lines: [],
    "changed": changed_line,
}


@pytest.mark.parametrize("name", ["metrics.jsonl", "diagnostics.jsonl"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_rows_is_noticed_in_every_file(tmp_path, caplog, name, damage):
    with metrics.MetricsLog(tmp_path, None) as log:
        for phase, step in FULL_RUN:
            log.write(phase, step, metrics_of(phase, step), {"load": np.ones(2) * 0.5} if step else None)
        digests = log.flush()
    path = tmp_path / name
    whole = path.read_bytes()
    lines = DAMAGES[damage](whole.splitlines(keepends=True))
    path.write_bytes(b"".join(lines))
    assert path.read_bytes() != whole
    if damage in ("doubled", "doubled later", "exchanged", "of another file"):
        for read in (lambda: metrics.check_record(tmp_path), lambda: metrics.MetricsLog(tmp_path, FULL_RUN[-1])):
            with pytest.raises(DamagedRows, match=rf"{path}, line \d+: the row of \w+ step \d .*remove wrong ones"):
                read()
        return
    metrics.check_record(tmp_path)
    with caplog.at_level(logging.WARNING), metrics.MetricsLog(tmp_path, FULL_RUN[-1], digests):
        pass
    (told,) = caplog.messages
    assert told.startswith(f"{path} is not as it was at rl step 7, after which the run goes on: ")
    assert told.endswith("rows were removed or changed.") == (damage == "changed")


def test_digests_are_of_the_rows_of_a_checkpoint_and_say_nothing_where_all_is_well(tmp_path, caplog):
    with metrics.MetricsLog(tmp_path, None) as log:
        for phase, step in FULL_RUN[:6]:
            log.write(phase, step, metrics_of(phase, step), {"load": np.ones(2)} if phase == "rl" and step else None)
        digests = log.flush()
        for phase, step in FULL_RUN[6:]:
            log.write(phase, step, metrics_of(phase, step), {"load": np.ones(2)})
    with caplog.at_level(logging.WARNING), metrics.MetricsLog(tmp_path, FULL_RUN[5], digests) as log:
        assert log.flush() == digests
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["metrics.jsonl", "diagnostics.jsonl"])
@pytest.mark.parametrize(
    "change",
    [
        pathlib.Path.unlink,
        lambda path: path.rename(path.with_name("elsewhere")),
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        lambda path: os.replace(shutil.copy(path, path.with_name("copy")), path),
    ],
    ids=["deleted", "moved", "cut", "grown", "replaced"],
)
@pytest.mark.parametrize("resumed", [False, True])
def test_a_file_that_is_changed_by_something_else_is_noticed_at_the_next_row(tmp_path, name, change, resumed):
    if resumed:
        record_arrays(tmp_path, FULL_RUN[:6])
    with metrics.MetricsLog(tmp_path, FULL_RUN[5] if resumed else None) as log:
        for step in (2, 3):
            log.write("rl", step, {"reward": 1.0}, {"load": np.ones(2)})
        change(tmp_path / name)
        with pytest.raises(DamagedRows, match=rf"{name} was deleted, replaced or changed by something else"):
            log.write("rl", 4, {"reward": 1.0}, {"load": np.ones(2)})


def test_a_run_that_must_not_write_does_not(tmp_path):
    def refuse():
        raise LockLost("another run's")

    record(tmp_path, FULL_RUN[:5])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(LockLost):
        metrics.MetricsLog(tmp_path, FULL_RUN[2], check=refuse)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_resumed_run_goes_on_after_its_position(tmp_path):
    record(tmp_path, FULL_RUN)
    with metrics.MetricsLog(tmp_path, ("rl", 2)) as log:
        with pytest.raises(ValueError, match="rl step 2 came after rl step 2"):
            log.write("rl", 2, {})
        with pytest.raises(ValueError, match="warm_start step 9 came after rl step 2"):
            log.write("warm_start", 9, {})


@pytest.mark.parametrize("resume_after", [("pretraining", 1), ("rl", -1), ("rl", 2.0)])
def test_a_bad_position_removes_nothing(tmp_path, resume_after):
    record(tmp_path, FULL_RUN)
    with pytest.raises(ValueError, match="must be"):
        metrics.MetricsLog(tmp_path, resume_after)
    assert positions_of(metrics.read_metrics(tmp_path)) == FULL_RUN


def test_reading_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder of a run"):
        metrics.read_metrics(tmp_path)


# Arrays of a step

ARRAYS = {"load": np.array([[0.25, 0.75], [1 / 3, np.nan]], np.float32), "counts": np.array([3, 0, 2], np.int32)}


def record_arrays(run_dir, positions, resume_after=None):
    """Record arrays at every second step of the second phase."""
    with metrics.MetricsLog(run_dir, resume_after) as log:
        for phase, step in positions:
            arrays = {name: array * step for name, array in ARRAYS.items()} if phase == "rl" and step % 2 else None
            log.write(phase, step, metrics_of(phase, step), arrays)


def test_arrays_are_written_and_read_back(tmp_path):
    record_arrays(tmp_path, FULL_RUN)
    lines = (tmp_path / "diagnostics.jsonl").read_text().splitlines()
    assert lines[0] == '{"phase": "rl", "step": 1, "load": [[0.25, 0.75], [0.333333, null]], "counts": [3, 0, 2]}'
    rows = metrics.read_diagnostics(tmp_path)
    assert positions_of(rows) == [("rl", 1), ("rl", 3), ("rl", 5), ("rl", 7)]
    for row in rows:
        for name, array in ARRAYS.items():
            assert row[name].dtype == np.float64
            np.testing.assert_allclose(row[name], row["step"] * array.astype(np.float64), rtol=5e-6)
    assert positions_of(metrics.read_metrics(tmp_path)) == FULL_RUN


def test_six_digits_and_every_rank_survive(tmp_path):
    values = np.array([1234567.0, -1.2345678e-30, np.inf, -np.inf, 0.0])
    with metrics.MetricsLog(tmp_path, None) as log:
        log.write("rl", 1, {}, {"values": values, "one": np.float32(0.1), "none": np.nan, "deep": np.ones((1, 2, 1))})
    (row,) = metrics.read_diagnostics(tmp_path)
    np.testing.assert_array_equal(row["values"], [1234570.0, -1.23457e-30, np.nan, np.nan, 0.0])
    assert row["one"] == 0.1 and np.isnan(row["none"]) and row["deep"].shape == (1, 2, 1)


def test_a_run_without_arrays_has_no_file_of_them(tmp_path):
    record(tmp_path, FULL_RUN)
    assert not (tmp_path / "diagnostics.jsonl").exists()
    assert metrics.read_diagnostics(tmp_path) == []


@pytest.mark.parametrize("resume_after", [("warm_start", 2), ("rl", 0), ("rl", 3), ("rl", 4)])
def test_arrays_of_a_resumed_run_equal_those_of_an_uninterrupted_one(tmp_path, resume_after):
    record_arrays(tmp_path / "whole", FULL_RUN)
    record_arrays(tmp_path / "resumed", FULL_RUN[:-1])
    rest = [position for position in FULL_RUN if ORDER.index(position) > ORDER.index(resume_after)]
    record_arrays(tmp_path / "resumed", rest, resume_after)
    for name in ("metrics.jsonl", "diagnostics.jsonl"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_arrays_alone_are_a_run_already_and_a_cut_line_of_them_is_dropped(tmp_path, caplog):
    record_arrays(tmp_path, FULL_RUN)
    path = tmp_path / "diagnostics.jsonl"
    path.write_bytes(path.read_bytes()[:-3])
    with caplog.at_level(logging.WARNING):
        assert positions_of(metrics.read_diagnostics(tmp_path)) == [("rl", 1), ("rl", 3), ("rl", 5)]
    assert f"{path}: dropped the last line" in caplog.text
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(FileExistsError, match=r"diagnostics\.jsonl already holds a run"):
        metrics.MetricsLog(tmp_path, None)


@pytest.mark.parametrize("value", ['"high"', '["0.5"]', "[[1], [2, 3]]", "[true]", '{"a": 1}'])
def test_a_malformed_line_of_arrays_is_an_error(tmp_path, value):
    record(tmp_path, FULL_RUN)
    path = tmp_path / "diagnostics.jsonl"
    path.write_text(f'{{"phase": "rl", "step": 1, "load": {value}}}\n')
    message = re.escape(f"{path}, line 1 is not a row of diagnostics")
    with pytest.raises(ValueError, match=message):
        metrics.read_diagnostics(tmp_path)
    with pytest.raises(ValueError, match=message):
        metrics.MetricsLog(tmp_path, ("rl", 7))


@pytest.mark.parametrize(
    ("arrays", "error"),
    [({"step": np.ones(2)}, ValueError), ({"load": np.array(["a"])}, TypeError), ({"load": [True]}, TypeError)],
)
def test_bad_arrays_are_refused_and_leave_nothing(tmp_path, arrays, error):
    with metrics.MetricsLog(tmp_path, None) as log:
        with pytest.raises(error):
            log.write("rl", 1, {"reward": 1.0}, arrays)
        log.write("rl", 1, {"reward": 2.0}, {"load": np.ones(2)})
    assert metrics.read_metrics(tmp_path) == [{"phase": "rl", "step": 1, "reward": 2.0}]
    assert len(metrics.read_diagnostics(tmp_path)) == 1


# JSON files


def test_json_is_pretty_and_strict(tmp_path):
    path = tmp_path / "summary.json"
    metrics.write_json(
        path, {"name": "γ", "best": [0.5, math.nan, (math.inf, 2)], "nested": {"x": -math.inf, "y": None}}
    )
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == {"name": "γ", "best": [0.5, None, [None, 2]], "nested": {"x": None, "y": None}}
    assert text.startswith('{\n  "name": "γ"') and text.endswith("}\n")


@pytest.mark.parametrize("failure", ["content", "disk"])
def test_failing_to_write_json_keeps_the_old_file(tmp_path, monkeypatch, failure):
    path = tmp_path / "summary.json"
    metrics.write_json(path, {"old": 1})
    if failure == "disk":
        monkeypatch.setattr(os, "fsync", lambda _: os.stat(tmp_path / "nowhere"))
    with pytest.raises(TypeError if failure == "content" else FileNotFoundError):
        metrics.write_json(path, {"new": datetime.date(2020, 1, 1) if failure == "content" else 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


# The interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_has_published_values(successes, trials, low, high):
    np.testing.assert_allclose(metrics.wilson_interval(successes, trials), (low, high), rtol=0, atol=5e-5)


def bisect(function, low, high):
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return low


@pytest.mark.parametrize(
    ("successes", "trials"),
    [(0, 1), (1, 1), (3, 7), (1, 1000), (512, 1024), (999, 1000), (20, 20), (2.5, 7.25), (0.01, 1.5), (0, 0.5)],
)
def test_wilson_interval_inverts_the_score_test(successes, trials):
    # The bounds are the rates p at which the observed rate is exactly z standard deviations of p away.
    rate, z = successes / trials, statistics.NormalDist().inv_cdf(0.975)

    def inside(p):
        return z**2 * p * (1 - p) / trials - (rate - p) ** 2

    expected_low = bisect(lambda p: -inside(p), 0, rate)
    expected_high = bisect(inside, rate, 1)
    low, high = metrics.wilson_interval(successes, trials)
    np.testing.assert_allclose((low, high), (expected_low, expected_high), rtol=0, atol=1e-12)
    assert 0 <= low <= rate <= high <= 1


def test_wilson_interval_is_exact_at_the_ends_and_symmetric():
    assert all(
        metrics.wilson_interval(0, n)[0] == 0.0 and metrics.wilson_interval(n, n)[1] == 1.0 for n in range(1, 300)
    )
    for successes in range(18):
        low, high = metrics.wilson_interval(successes, 17)
        mirrored_low, mirrored_high = metrics.wilson_interval(17 - successes, 17)
        np.testing.assert_allclose((low, high), (1 - mirrored_high, 1 - mirrored_low), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "arguments",
    [(1, 0), (0, 0), (-1, 5), (6, 5), (math.nan, 5), (1, math.nan), (1, math.inf)],
)
def test_wilson_interval_refuses_bad_input(arguments):
    with pytest.raises(ValueError, match="successes must be from 0 to trials, and trials above 0"):
        metrics.wilson_interval(*arguments)


def test_the_interval_of_a_mean_holds_what_all_resamples_say():
    """The bounds are the exact quantiles of all 5^5 equally likely resamples, whose neighbours are well away."""
    values = np.array([0.0, 0.25, 0.5, 1.0, 1.0])
    means = np.sort([np.mean(values[list(rows)]) for rows in itertools.product(range(5), repeat=5)])
    interval = metrics.mean_interval(values, seed=1)
    for level, bound in zip((0.025, 0.975), interval, strict=True):
        below, at = np.mean(means < bound - 1e-12), np.mean(means <= bound + 1e-12)
        # The standard error of the quantile's level with 10,000 resamples is 0.0016.
        assert below < level + 0.008
        assert at > level - 0.008
    np.testing.assert_allclose(metrics.mean_interval(2 * values, seed=1), [2 * bound for bound in interval])


def test_the_interval_of_a_mean_shrinks_as_theory_says_and_depends_on_the_seed_alone():
    values = (np.arange(800) % 2).astype(np.float64)
    interval = metrics.mean_interval(values, seed=4)
    # A coin of 800 throws: the normal interval is ±1.96 · 0.5 / √800.
    np.testing.assert_allclose(interval, [0.5 - 0.03465, 0.5 + 0.03465], atol=0.002)
    assert metrics.mean_interval(values, seed=4) == interval
    assert metrics.mean_interval(values[:200], seed=5)[0] < interval[0]


def test_values_without_spread_have_no_interval():
    assert metrics.mean_interval(np.ones(7)) is None
    assert metrics.mean_interval(np.array([3.5])) is None


def test_nothing_to_resample():
    with pytest.raises(ValueError, match="at least 1 problem"):
        metrics.mean_interval(np.ones(0))
