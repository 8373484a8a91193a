"""The real packages, offline, in an environment of their own (`make trackers-test`): what they have written is read
back."""

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys

import pytest

from rspo_jax.records.samples import Sample
from rspo_jax.records.trackers import SAMPLE_COLUMNS, TRACKERS

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(kind.module) for kind in TRACKERS.values()), reason="needs the packages"
)
SAMPLE = Sample("1+1=", "2", 1.0, True, False, 0.5, [4], ["2"], [-0.5], [-0.25], [0.75])
PROGRAM = """
import signal, sys
from rspo_jax.records import MetricsLog
from rspo_jax.records.samples import Sample
run_dir, first, last, resume_after = sys.argv[1], *map(int, sys.argv[2:5])
sample = Sample("1+1=", "2", 1.0, True, False, 0.5, [4], ["2"], [-0.5], [-0.25], [0.75])
with MetricsLog(run_dir, ("rl", resume_after) if resume_after else None, trackers=["wandb", "trackio"]) as log:
    if not resume_after:
        log.write("warm_start", 1, {"loss": 2.0})
    for step in range(first, last + 1):
        log.write("rl", step, {"reward": 0.5 * step}, samples=[sample] if step == 2 else [])
    if "interrupt" in sys.argv:
        signal.raise_signal(signal.SIGINT)
print("written")
"""


def run(folder, *arguments):
    """Write steps in a process of its own, which has to end by itself."""
    places = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio"), "WANDB_SILENT": "true"}
    command = [sys.executable, "-c", PROGRAM, str(folder / "run"), *map(str, arguments)]
    done = subprocess.run(
        command, env={**os.environ, **places}, capture_output=True, text=True, timeout=400, cwd=os.getcwd()
    )
    assert "has failed" not in done.stdout, done.stdout
    return done


def records_of(path):
    """The records of a `.wandb` file: protocol buffers in the log format of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, part, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # the rest of a block holds no header
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        part += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(part))
            part = b""
    return found


def wandb_history(folder):
    """Step -> the numbers and tables that all files of the run hold."""
    rows = []
    for path in sorted((folder / "run" / "wandb").glob("offline-run-*/*.wandb")):
        for record in records_of(path):
            if record.HasField("history"):
                items = {"/".join(one.nested_key) or one.key: one.value_json for one in record.history.item}
                rows.append({name: json.loads(value) for name, value in items.items()})
    return rows


def trackio_rows(folder):
    (path,) = (folder / "trackio").glob("*.db")
    with sqlite3.connect(path) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics order by id").fetchall()
    return [(name, step, json.loads(metrics)) for name, step, metrics in rows]


def test_both_hold_every_step_once_after_a_rollback(tmp_path):
    assert "written" in run(tmp_path, 1, 4, 0).stdout
    interrupted = run(tmp_path, 3, 5, 2, "interrupt")  # goes on from step 2, and ends with Ctrl-C
    assert interrupted.returncode != 0 and "KeyboardInterrupt" in interrupted.stderr
    run(tmp_path, 5, 6, 4)
    history = wandb_history(tmp_path)
    shown = [(row["rl/step"], row["rl/reward"]) for row in history if "rl/reward" in row]
    assert shown == [(step, 0.5 * step) for step in range(1, 7)]
    assert [row["warm_start/step"] for row in history if "warm_start/loss" in row] == [1]
    (table,) = (tmp_path / "run" / "wandb").glob("offline-run-*/files/media/table/**/*.json")
    content = json.loads(table.read_text())
    assert content["data"] == [["1+1=", "2", 1.0, "", True, 0.5, 1, 0.75, 0.75]]
    assert tuple(content["columns"]) == SAMPLE_COLUMNS
    assert [row["rl/step"] for row in history if "rl/samples/_type" in row] == [2]
    ids = {path.stem for path in (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")}
    assert len(ids) == 1
    rows = trackio_rows(tmp_path)
    assert {name for name, _, _ in rows} == {"run"}
    numbers = [(step, metrics["rl/reward"]) for _, step, metrics in rows if "rl/reward" in metrics]
    assert numbers == [(step, 0.5 * step) for step in range(1, 7)]
    (samples,) = [metrics["rl/samples"] for _, _, metrics in rows if "rl/samples" in metrics]
    assert samples["_value"][0]["response"] == SAMPLE.response and samples["_value"][0]["gamma_min"] == 0.75
