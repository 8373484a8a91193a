"""Processes that are run, watched, stopped and killed. Small scripts stand in for runs."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from experiments.ablation import jobs as jobs_module
from experiments.ablation.jobs import Failures, Job, Jobs, JobsStopped, describe_seconds, remaining_seconds, share_cores
from experiments.ablation.worker import locked

ROOT = Path(__file__).resolve().parents[3]

# Counts its starts, and follows the job's own plan: an exit code for each start, "wait" or "die".
STAND_IN = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
starts = folder / "starts"
count = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (count + 1))
(folder / "metrics.jsonl").touch()
(folder / "seen.json").write_text(json.dumps({"cores": sys.argv[2], "cache": os.environ["JAX_COMPILATION_CACHE_DIR"]}))
print(f"start {count}", flush=True)
plan = json.loads((folder / "plan.json").read_text())
code = plan[min(count, len(plan) - 1)]
if code == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (folder / "waits").touch()
    time.sleep(60)
if code == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if code == 0:
    (folder / "summary.json").write_text("{}")
sys.exit(max(code, 0))
"""


def command(job, cores):
    return [sys.executable, "-S", "-c", STAND_IN, str(job.folder), ",".join(map(str, cores))]


def make(folder, plans, after=None):
    """Return jobs, each with its plan in its folder."""
    result = []
    for name, plan in plans.items():
        job = Job(name, folder / "runs" / name, (after or {}).get(name))
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / "plan.json").write_text(json.dumps(plan))
        result.append(job)
    return result


def work(folder, jobs, workers=2):
    """Work jobs off; return the queue, and names and exit codes in the order in which processes ended."""
    ended = []
    runner = Jobs(jobs, folder, workers, command)
    runner.work(lambda job, code, seconds: ended.append((job.name, code)))
    return runner, ended


def starts(job):
    path = job.folder / "starts"
    return len(path.read_text()) if path.exists() else 0


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(jobs_module, "_POLL_SECONDS", 0.01)


def test_all_jobs_are_done_once(tmp_path):
    jobs = make(tmp_path, {name: [0] for name in "abc"})
    runner, ended = work(tmp_path, jobs)
    assert sorted(ended) == [("a", 0), ("b", 0), ("c", 0)]
    assert [starts(job) for job in jobs] == [1, 1, 1]
    _, again = work(tmp_path, jobs)
    assert (again, [starts(job) for job in jobs]) == ([], [1, 1, 1])
    assert {runner.state(job) for job in jobs} == {"done"}


def test_a_job_waits_for_the_one_that_it_needs(tmp_path):
    jobs = make(tmp_path, {"b": [0], "c": [0], "a": [0]}, after={"b": "a", "c": "a"})
    _, ended = work(tmp_path, jobs)
    assert ended[0] == ("a", 0)
    assert len(ended) == 3


def test_a_failed_job_is_tried_again_a_few_times_and_stops_nobody(tmp_path):
    jobs = make(tmp_path, {"a": [1], "b": ["die", 0], "c": [2], "d": [0], "e": [0]}, after={"e": "c"})
    runner, ended = work(tmp_path, jobs)
    assert [starts(job) for job in jobs] == [3, 2, 1, 1, 0]
    assert [runner.state(job) for job in jobs] == ["failed", "done", "failed", "done", "blocked"]
    assert [code for name, code in ended if name == "b"] == [-signal.SIGKILL, 0]
    assert runner.tail_of(jobs[0]).splitlines() == ["start 0", "start 1", "start 2"]
    # Another process remembers, until it is told to forget.
    _, again = work(tmp_path, jobs)
    assert again == []
    Failures(tmp_path / "failures").forget("a")
    _, again = work(tmp_path, jobs)
    assert [name for name, _ in again] == ["a"] * 3


def test_a_process_that_leaves_nothing_behind_has_failed(tmp_path):
    jobs = make(tmp_path, {"a": [-1]})  # exits with 0 but writes no summary
    runner, ended = work(tmp_path, jobs)
    assert ended == [("a", 1)] * 3
    assert runner.failures.of(jobs[0]) == [1, 1, 1]


def when(condition, act):
    """Call `act` in another thread as soon as the condition holds."""

    def watch():
        deadline = time.monotonic() + 30
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_all_save_and_counts_as_nobodys_failure(tmp_path, number):
    jobs = make(tmp_path, {"a": ["wait", 0], "b": ["wait", 0], "c": [0]})
    before = signal.getsignal(number)
    thread = when(
        lambda: all((job.folder / "waits").exists() for job in jobs[:2]), lambda: os.kill(os.getpid(), number)
    )
    with pytest.raises(JobsStopped, match=signal.Signals(number).name):
        work(tmp_path, jobs)
    thread.join()
    assert signal.getsignal(number) is before
    runner, ended = work(tmp_path, jobs)
    assert sorted(ended) == [("a", 0), ("b", 0), ("c", 0)]
    assert not any(runner.failures.of(job) for job in jobs)


def test_each_worker_has_its_cores_and_all_share_compiled_programs(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs_module, "usable_cores", lambda: [2, 3, 6, 7])
    jobs = make(tmp_path, {"a": [0], "b": [0]})
    work(tmp_path, jobs)
    seen = [json.loads((job.folder / "seen.json").read_text()) for job in jobs]
    assert sorted(job["cores"] for job in seen) == ["2,3", "6,7"]
    (cache,) = {job["cache"] for job in seen}
    assert Path(cache).parent == tmp_path / "compiled"


@pytest.mark.parametrize(
    ("cores", "workers", "shares"),
    [
        ([0, 1], 1, [[0, 1]]),
        ([0, 1], 2, [[0], [1]]),
        ([0, 1], 3, [[0], [1], [0]]),
        ([4, 5, 6, 7, 9], 2, [[4, 5], [6, 7, 9]]),
    ],
)
def test_shares(cores, workers, shares):
    assert share_cores(cores, workers) == shares


def test_states_of_what_was_not_begun_and_what_was_left(tmp_path):
    jobs = make(tmp_path, {"a": [0], "b": [0]})
    (jobs[1].folder / "metrics.jsonl").touch()
    runner = Jobs(jobs, tmp_path, 1, command)
    assert [runner.state(job) for job in jobs] == ["waiting", "stopped"]


def test_what_is_left_is_estimated_from_what_was_done():
    assert remaining_seconds([], 3, 2) is None
    assert remaining_seconds([10.0, 20.0], 4, 2) == 30.0
    assert [describe_seconds(value) for value in (None, 3.4, 61, 3725)] == [
        "unknown",
        "3 s",
        "1 min 01 s",
        "1 h 02 min",
    ]


def test_a_lock_is_for_one_process_and_ends_with_it(tmp_path):
    script = "import sys, time; from experiments.ablation.worker import locked; "
    script += "lock = locked(sys.argv[1]); print(lock.__enter__(), flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"True\n"
        with locked(str(tmp_path), wait=False) as held:
            assert not held
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    with locked(str(tmp_path)) as held:
        assert held


WAITING_WORKER = textwrap.dedent("""
    import pathlib, sys, time, types
    train = types.ModuleType("experiments.train")
    def main(arguments):
        print("training", flush=True)
        time.sleep(60)
    train.main = main
    config = types.ModuleType("experiments.config")
    config.load_config = lambda path: ("countdown", None)
    records = types.ModuleType("rspo_jax.records")
    records.as_path = pathlib.Path
    sys.modules |= {"experiments.train": train, "experiments.config": config, "rspo_jax.records": records}
    sys.modules["rspo_jax"] = types.ModuleType("rspo_jax")
    import experiments
    experiments.train = train
    from experiments.ablation import worker
    sys.argv[1:] = [sys.argv[1], "--cores", sys.argv[2]]
    sys.exit(worker.main())
""")


def test_a_worker_leaves_when_whoever_started_it_is_gone(tmp_path):
    core = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING_WORKER, str(tmp_path), str(core)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"training\n"
        if hasattr(os, "sched_getaffinity"):
            assert os.sched_getaffinity(process.pid) == {core}
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(30) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
