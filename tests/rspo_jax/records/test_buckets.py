"""Runs kept in a bucket, gs://: checkpoints and metrics against a stand-in for Google Cloud Storage on this machine."""

import importlib
import inspect
import json
import logging
import math
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils.epath import backend
from support.buckets import Client, Store, use_stand_in
from support.processes import Member
from tensorboard.backend.event_processing import event_accumulator

from rspo_jax.records import files, metrics
from rspo_jax.records.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with Store() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")
        use_stand_in()
        threading.Thread(target=server.serve_forever).start()
        yield server
        server.shutdown()
        for name in Client.protocol:
            importlib.import_module("fsspec.registry")._registry.pop(name)
        backend.fsspec_backend._get_filesystem.cache_clear()


@pytest.fixture
def run_dir(store: Store, request: pytest.FixtureRequest) -> str:
    """The address of a run, another one for each test."""
    return f"gs://bucket/{re.sub(r'[^a-z_0-9]', '-', request.node.name)}"


def in_bucket(address: str) -> str:
    return address.removeprefix("gs://bucket/")


# --- checkpoints ---


def make_state(seed: int) -> dict[str, Any]:
    bits = np.random.default_rng(seed)
    return {
        "weight": jnp.asarray(bits.random((300, 40), np.float32)),
        "half": jnp.asarray(bits.random(7), jnp.bfloat16),
        "seed": np.array(seed, np.int32),
        "none": jnp.zeros((0, 2)),
    }


def restore(address: str) -> tuple[int, list[str]]:
    """Return the index that is restored, and the sentences said."""
    said: list[str] = []
    with Checkpoints(address) as checkpoints:
        restored = checkpoints.restore_newest(jax.eval_shape(lambda: make_state(0)), say=said.append)
    assert restored is not None and restored.metadata == {"index": restored.index}
    for name, expected in make_state(restored.index).items():
        assert restored.state[name].dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(restored.state[name]), np.asarray(expected))
    return restored.index, said


def save_all(address: str, *indices: int, keep: int = 3) -> None:
    with Checkpoints(address, keep=keep) as checkpoints:
        for index in indices:
            checkpoints.save(index, make_state(index), {"index": index})


def test_a_bucket_keeps_checkpoints(store: Store, run_dir: str) -> None:
    save_all(run_dir, 1, 9, 10, keep=2)
    assert restore(run_dir) == (10, [])
    assert {name.split("/")[1] for name in store.names(in_bucket(run_dir))} == {"9", "10"}
    assert store.names(f"{in_bucket(run_dir)}/10/")[-1].endswith("/10/commit_success.txt")


def test_nothing_to_restore(run_dir: str) -> None:
    with Checkpoints(run_dir) as checkpoints:
        assert checkpoints.restore_newest(make_state(0)) is None


def test_what_is_not_complete_is_skipped_and_replaced(store: Store, run_dir: str) -> None:
    save_all(run_dir, 1, 2)
    del store.objects[f"{in_bucket(run_dir)}/2/commit_success.txt"]
    unfinished = f"{run_dir}/2 is unfinished, left by an interrupted run unless a run is writing it now: skipped."
    assert restore(run_dir) == (1, [unfinished])
    save_all(run_dir, 2)
    assert restore(run_dir) == (2, [])


def test_what_was_left_unfinished_goes_with_the_next(store: Store, run_dir: str) -> None:
    save_all(run_dir, 1, 2)
    del store.objects[f"{in_bucket(run_dir)}/2/commit_success.txt"]
    save_all(run_dir, 3)
    assert restore(run_dir) == (3, [])
    assert {name.split("/")[1] for name in store.names(in_bucket(run_dir))} == {"1", "3"}


def test_damage_is_found_and_moved_aside(store: Store, run_dir: str) -> None:
    save_all(run_dir, 1, 2)
    name = max(store.names(f"{in_bucket(run_dir)}/2/"), key=lambda name: len(store.content(name)))
    content = bytearray(store.content(name))
    content[len(content) // 2] ^= 0x10
    store.put(name, bytes(content))
    index, said = restore(run_dir)
    assert (index, len(said)) == (1, 2)
    assert said[1] == f"{run_dir}/2 was moved to {run_dir}-damaged/2, and {run_dir}/1 is used instead."
    assert store.names(f"{in_bucket(run_dir)}/2/") == []
    assert name.replace("/2/", "-damaged/2/") in store.names(in_bucket(run_dir))
    save_all(run_dir, 2)
    assert restore(run_dir) == (2, [])


@pytest.mark.parametrize(("agent", "error"), [("tensorstore", "PERMISSION_DENIED"), ("urllib", "PermissionError")])
def test_a_bucket_that_refuses_is_not_damage(store: Store, run_dir: str, agent: str, error: str) -> None:
    save_all(run_dir, 1, 2)
    before = store.names(in_bucket(run_dir))
    with Checkpoints(run_dir) as checkpoints:
        store.refused_agent = agent
        try:
            with pytest.raises((PermissionError, ValueError)) as raised:
                checkpoints.restore_newest(make_state(0))
            assert error in f"{type(raised.value).__name__} {raised.value}"
            if agent == "urllib":  # before the arrays are on their way
                with pytest.raises(PermissionError):
                    checkpoints.save(3, make_state(3), {})
        finally:
            store.refused_agent = "nobody"
    assert restore(run_dir) == (2, [])
    assert store.names(in_bucket(run_dir)) == before


WRITER = f"""
import itertools, sys
from typing import Any
import jax.numpy as jnp
import numpy as np
from rspo_jax.records.checkpoint import Checkpoints
from support.buckets import use_stand_in

{inspect.getsource(make_state)}
use_stand_in()
with Checkpoints(sys.argv[1], keep=1) as checkpoints:
    restored = checkpoints.restore_newest(make_state(0), say=lambda _: None)
    for index in itertools.count(0 if restored is None else restored.index + 1):
        checkpoints.save(index, make_state(index), dict(index=index))
        print(index)
"""


def test_a_killed_writer_leaves_the_old_or_the_new(run_dir: str, tmp_path: Path) -> None:
    moments, newest, unfinished = random.Random(0), -1, 0
    for attempt in range(3):
        member = Member(tmp_path / str(attempt), WRITER, run_dir)
        begun = member.lines(moments.randint(2, 4))
        time.sleep(moments.uniform(0, 0.05))
        member.kill()
        assert begun == [f"{newest + 1 + number}" for number in range(len(begun))], member.errors
        newest, said = restore(run_dir)
        assert newest >= int(begun[-2])
        assert all("is unfinished" in line for line in said), said
        unfinished += len(said)
    assert unfinished, "no kill hit a save"


# --- metrics ---


STEPS = [("warm_start", step) for step in range(1, 4)] + [("rl", step) for step in range(1, 5)]


def record(run_dir: str, positions: list[tuple[str, int]], resume_after: tuple[str, int] | None = None) -> None:
    with metrics.MetricsLog(run_dir, resume_after) as log:
        for phase, step in positions:
            log.write(phase, step, {"loss": 1 / step, "odd": math.nan})


def points(store: Store, run_dir: str, phase: str, folder: Path) -> list[int]:
    """Return the steps that TensorBoard shows."""
    for name in store.names(f"{in_bucket(run_dir)}/tensorboard/{phase}/"):
        (folder / phase).mkdir(parents=True, exist_ok=True)
        (folder / phase / name.rpartition("/")[2]).write_bytes(store.content(name))
    events = event_accumulator.EventAccumulator(str(folder / phase)).Reload()
    return [event.step for event in events.Scalars(f"{phase}/loss")]


def test_a_resumed_run_in_a_bucket_equals_an_uninterrupted_one(store: Store, run_dir: str, tmp_path: Path) -> None:
    record(str(tmp_path / "whole"), STEPS)
    record(run_dir, STEPS[:6])
    record(run_dir, STEPS[4:], ("rl", 1))
    assert store.content(f"{in_bucket(run_dir)}/metrics.jsonl") == (tmp_path / "whole/metrics.jsonl").read_bytes()
    rows = metrics.read_metrics(run_dir)
    assert [(row["phase"], row["step"]) for row in rows] == STEPS
    assert points(store, run_dir, "warm_start", tmp_path) == [1, 2, 3]
    assert points(store, run_dir, "rl", tmp_path) == [1, 2, 3, 4]
    with pytest.raises(FileExistsError, match="already holds a run"):
        metrics.MetricsLog(run_dir, None)


def test_what_is_flushed_outlives_the_machine(store: Store, run_dir: str) -> None:
    log = metrics.MetricsLog(run_dir, None)
    for phase, step in STEPS[:6]:
        log.write(phase, step, {"loss": 1.0})
    log.flush()
    log.write(*STEPS[6], {"loss": 1.0})
    rows = metrics.read_metrics(run_dir)  # as a machine finds it that takes over
    assert [(row["phase"], row["step"]) for row in rows] == STEPS[:6]
    log.close()
    assert len(metrics.read_metrics(run_dir)) == 7
    log.close()
    with pytest.raises(ValueError, match="closed"):
        log.write("rl", 9, {})


def test_copies_are_rare_and_repeated_after_a_failure(
    store: Store, run_dir: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    name = f"{in_bucket(run_dir)}/metrics.jsonl"

    def rows_after_write(step: int) -> int:
        log.write("rl", step, {"loss": 1.0})
        return store.content(name).count(b"\n")

    with metrics.MetricsLog(run_dir, None) as log:
        assert [rows_after_write(step) for step in (1, 2, 3)] == [1, 1, 1]
        now += 1.01
        assert [rows_after_write(step) for step in (4, 5)] == [4, 4]
        now += 1.01
        store.refused_agent = "urllib"
        with caplog.at_level(logging.WARNING):
            assert rows_after_write(6) == 4
        assert [record.levelname for record in caplog.records] == ["WARNING"] and run_dir in caplog.text
        with pytest.raises(PermissionError):  # nobody goes on from a checkpoint whose rows are missing
            log.flush()
        store.refused_agent = "nobody"
        assert rows_after_write(7) == 4
        now += 1.01
        assert rows_after_write(8) == 8


def test_json_goes_to_a_bucket(store: Store, run_dir: str) -> None:
    metrics.write_json(f"{run_dir}/summary.json", {"best": math.inf})
    assert json.loads(store.content(f"{in_bucket(run_dir)}/summary.json")) == {"best": None}


def test_the_temporary_folder_is_removed(run_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with metrics.MetricsLog(run_dir, None) as log:
        log.write("rl", 1, {"loss": 1.0})
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def test_rows_that_cannot_be_copied_are_kept(
    store: Store, run_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    log = metrics.MetricsLog(run_dir, None)
    store.refused_agent = "urllib"
    try:
        log.write("rl", 1, {"loss": 1.0})
        with pytest.raises(PermissionError) as raised:
            log.close()
    finally:
        store.refused_agent = "nobody"
    (folder,) = tmp_path.iterdir()
    assert raised.value.__notes__ == [f"The files that could not be copied are still in {folder}."]
    assert json.loads((folder / "metrics.jsonl").read_text())["step"] == 1


# --- addresses ---


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (Path("gs://bucket/run"), "gs:/bucket/run was an address until pathlib took a slash: pass it as text"),
        ("s3://bucket/run", "not under s3://bucket/run: mount that place as a folder"),
        ("http://host/run", "mount that place as a folder"),
    ],
)
def test_addresses_that_cannot_be_written_to(store: Store, place: Any, message: str) -> None:
    for use in (files.as_path, Checkpoints, metrics.read_metrics, lambda place: metrics.MetricsLog(place, None)):
        with pytest.raises(ValueError, match=message):
            use(place)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ValueError, match=r"gs://bucket/run is in a bucket, .*: install gcsfs"):
        files.as_path("gs://bucket/run")


@pytest.mark.parametrize("place", ["runs/a", "/runs/a", Path("/runs/a"), "C:/runs"])
def test_folders_are_not_addresses(place: Any) -> None:
    path = files.as_path(place)
    assert os.fspath(path) == str(place) and not files.is_bucket(path)
