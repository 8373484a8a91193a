"""`python -m experiments.train` where several processes work on a run, where a run is in a bucket, and where a script
starts it again and again. The processes share this machine and find each other by flags; the bucket is a dictionary.
"""

import importlib
import json
import os
import signal

import fsspec
import jax
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from support.commands import QUICK, SMALL, flags, has_row, refusal, start_training, wait_until
from support.processes import finish, free_port

from experiments import train
from experiments.config import CountdownRun, load_config, save_config
from experiments.errors import MISTAKE, STOPPED
from rspo_jax.hosts import ClusterConfig
from rspo_jax.hosts import cluster as distributed
from rspo_jax.records import read_metrics

WARM_START_STEPS, STEPS = 2, 4
FLAGS = flags(SMALL, steps=STEPS, warm_start__steps=WARM_START_STEPS, evaluation__every=4, checkpoint__every=2)

ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in distributed.SIGNS}
ENVIRONMENT |= {"XLA_FLAGS": QUICK}


def parse(*arguments):
    return train.parse(["countdown", *map(str, arguments)])


def sentence(*arguments):
    """Return what the command says of a mistake, which must be one sentence and not a box of the parser."""
    error = refusal(train.main, "countdown", *arguments)
    assert error.startswith("error: ")
    return error


# --- flags ---


@pytest.fixture
def run_dir(tmp_path):
    """A folder in which a run was started."""
    folder = tmp_path / "run"
    folder.mkdir()
    _, run, _ = parse(*FLAGS)
    save_config(folder / "config.json", "countdown", run)
    return folder


def test_the_flags_of_a_cluster_are_no_part_of_the_run(tmp_path):
    flags = ("--cluster.coordinator", "host:1234", "--cluster.num-processes", 4, "--cluster.process-id", 3)
    name, run, folder = parse("--run-dir", tmp_path / "run", *flags, "--cluster.heartbeat-timeout-seconds", 20)
    assert folder.cluster == ClusterConfig("host:1234", 4, 3, heartbeat_timeout_seconds=20)
    assert run == CountdownRun()
    train.prepare_folder(name, run, folder)
    assert "host:1234" not in (tmp_path / "run" / "config.json").read_text()


def test_half_a_cluster_is_refused(capsys):
    with pytest.raises(SystemExit) as exit:  # by the parser, which draws a box around its errors
        parse("--cluster.coordinator", "host:1234")
    assert exit.value.code == MISTAKE
    assert "cluster.num_processes is missing" in " ".join(capsys.readouterr().err.split())


def test_resume_or_start_starts_where_there_is_nothing(tmp_path):
    _, run, folder = parse("--run-dir", tmp_path / "run", "--resume-or-start", *FLAGS)
    assert (folder.run_dir, folder.resume) == (tmp_path / "run", False)
    assert train.prepare_folder("countdown", run, folder) == tmp_path / "run"
    assert load_config(tmp_path / "run" / "config.json") == ("countdown", run)


def test_resume_or_start_goes_on_where_there_is_a_run(run_dir, capsys):
    name, run, folder = parse("--run-dir", run_dir, "--resume-or-start", "--steps", 20)
    assert (folder.run_dir, folder.resume) == (run_dir, True)
    assert (run.trainer.steps, run.trainer.prompts) == (20, 4)  # the rest is as it was started
    train.prepare_folder(name, run, folder)
    assert f"trainer.steps: {STEPS} -> 20" in capsys.readouterr().out


def test_resume_or_start_does_not_mix_with_something_else(tmp_path):
    (tmp_path / "notes").touch()
    assert f"{tmp_path} is not empty" in sentence("--run-dir", tmp_path, "--resume-or-start", *FLAGS)


def test_resume_or_start_needs_a_folder():
    error = sentence("--resume-or-start")
    assert "--resume-or-start needs the folder of the run: name it with --run-dir" in error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--mesh.tensor", 3), "needs a multiple of 3 devices"),
        (("--mesh.fsdp", 5), "needs 5 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, flags, words):
    data = ("--data-dir", tmp_path / "data")
    assert words in sentence("--run-dir", tmp_path / "run", *FLAGS, *data, *flags)
    assert not (tmp_path / "run").exists()


# --- what was compiled ---


@pytest.fixture
def cache_place(monkeypatch):
    """A function that returns the folder of compiled programs that a platform uses with some arguments."""
    before = jax.config.jax_compilation_cache_dir

    def place(platform, *arguments):
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        _, _, folder = parse(*arguments)
        train.keep_compiled_programs(folder)
        return jax.config.jax_compilation_cache_dir

    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    yield place
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_accelerators_keep_programs_beside_the_run(cache_place, platform):
    assert cache_place(platform, "--run-dir", "there/run") == "there/compiled"
    assert cache_place(platform) == "runs/compiled"
    assert cache_place(platform, "--run-dir", "there/run", "--compilation-cache", "here") == "here"


def test_cpus_keep_programs_only_where_they_are_told(cache_place):
    assert cache_place("cpu", "--run-dir", "there/run") is None
    assert cache_place("cpu", "--compilation-cache", "here") == "here"


def test_the_environment_has_said_already_where_programs_are_kept(cache_place, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    assert cache_place("tpu", "--run-dir", "there/run") is None  # which JAX reads itself, when it is imported
    assert cache_place("tpu", "--run-dir", "there/run", "--compilation-cache", "here") == "here"


# --- buckets ---


class Bucket(MemoryFileSystem):
    """Google Cloud Storage as fsspec would show it, for the few calls here."""

    protocol = ("gs", "gcs")
    store: dict = {}  # noqa: RUF012

    def __init__(self, *arguments, finalize_on_close=None, **options):
        super().__init__(*arguments, **options)


@pytest.fixture
def bucket():
    for name in Bucket.protocol:
        fsspec.register_implementation(name, Bucket, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield epath.Path("gs://bucket")
    Bucket.store.clear()
    for name in Bucket.protocol:
        importlib.import_module("fsspec.registry")._registry.pop(name)
    backend.fsspec_backend._get_filesystem.cache_clear()


def test_a_run_in_a_bucket_is_started_and_resumed(bucket):
    place = "gs://bucket/runs/mine"
    name, run, folder = parse("--run-dir", place, "--resume-or-start", *FLAGS)
    assert folder.resume is False
    run_dir = train.prepare_folder(name, run, folder)
    assert os.fspath(run_dir) == place
    assert json.loads((bucket / "runs/mine/config.json").read_text())["trainer"]["steps"] == STEPS
    _, resumed, folder = parse("--run-dir", place, "--resume-or-start")
    assert (resumed, folder.resume, os.fspath(folder.run_dir)) == (run, True, place)
    _, resumed, folder = parse(f"--run-dir={place}", "--resume")
    assert (resumed, folder.resume, os.fspath(folder.run_dir)) == (run, True, place)


def test_a_run_in_a_bucket_is_not_mixed_with_another(bucket):
    (bucket / "runs/mine/config.json").write_text("{}")
    error = sentence("--run-dir", "gs://bucket/runs/mine", *FLAGS)
    assert "gs://bucket/runs/mine is not empty: add --resume" in error


def test_programs_are_kept_beside_a_run_in_a_bucket(bucket, cache_place):
    assert cache_place("tpu", "--run-dir", "gs://bucket/runs/mine") == "gs://bucket/runs/compiled"


# --- several processes ---


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The folder of the data set and of the compiled programs of all runs."""
    return tmp_path_factory.mktemp("shared")


class Cluster:
    """Two processes with the same flags, and those of each."""

    def __init__(self, shared, logs, flags, differing=((), ()), folders=(None, None)):
        port, self.processes = free_port(), []
        for process in range(2):
            cluster = ("--cluster.coordinator", f"localhost:{port}", "--cluster.num-processes", 2)
            places = ("--compilation-cache", shared / "compiled", "--data-dir", shared / "data")
            arguments = (*flags, *places, *differing[process], *cluster, "--cluster.process-id", process)
            log = logs / f"{port}-{process}"
            self.processes.append(start_training(log, *arguments, environment=ENVIRONMENT, folder=folders[process]))

    def end(self):
        """Wait for both; return their exit codes, and what each has printed and written as errors."""
        try:
            codes = [process.wait() for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return codes, [process.printed for process in self.processes], [process.errors for process in self.processes]

    def send(self, process, number, moment):
        """Send a signal to one of them at a moment."""
        wait_until(moment, lambda: all(process.code is None for process in self.processes))
        os.kill(self.processes[process].pid, number)


def sentences(errors):
    return [line for line in errors.splitlines() if line.startswith("error: ")]


def test_mistakes_of_several_processes(shared, tmp_path):
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        folder.mkdir()
    flags = ["--run-dir", tmp_path / "run", *FLAGS]
    clusters = {
        "no folder": Cluster(shared, tmp_path, FLAGS),
        "other flags": Cluster(shared, tmp_path, flags, (("--seed", 1), ("--seed", 2))),
        "not one folder": Cluster(shared, tmp_path, ["--run-dir", "run", *FLAGS], folders=folders),
    }
    ends = {name: cluster.end() for name, cluster in clusters.items()}
    words = {
        "no folder": "several processes need a folder that all of them see: name it with --run-dir, as gs://BUCKET/RUN",
        "other flags": "process 1 has other flags than process 0 (trainer.seed: 1 -> 2): give all the same flags",
        "not one folder": "run is not one folder for all hosts: choose a --run-dir as gs://BUCKET/RUN",
    }
    for name, (codes, _, errors) in ends.items():
        assert codes == [MISTAKE] * 2, (name, errors)
        for error in errors:
            assert any(words[name] in line for line in sentences(error)), (name, error)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_are_stopped_killed_and_resumed_also_by_one(shared, tmp_path):
    run_dir = tmp_path / "run"
    flags = ["--run-dir", run_dir, "--resume-or-start", *FLAGS]

    cluster = Cluster(shared, tmp_path, flags)
    cluster.send(1, signal.SIGTERM, lambda: has_row(run_dir, "warm_start", 1))
    codes, printed, errors = cluster.end()
    assert codes == [STOPPED] * 2, errors
    assert "SIGTERM: state saved. To go on:" in printed[0]
    assert "# on every host, as before" in printed[0]
    assert "state saved" not in printed[1] and "run folder" not in printed[1]  # only process 0 speaks

    cluster = Cluster(shared, tmp_path, flags)
    cluster.send(1, signal.SIGKILL, lambda: has_row(run_dir, "rl", 1))
    codes, printed, errors = cluster.end()
    assert codes == [1, -signal.SIGKILL], errors
    assert "going on after" in printed[0]
    assert any("process 1 of 2" in line and "with --resume" in line for line in sentences(errors[0]))

    cluster = Cluster(shared, tmp_path, flags)
    cluster.send(1, signal.SIGINT, lambda: has_row(run_dir, "rl", 2))
    codes, _, errors = cluster.end()
    assert codes == [STOPPED] * 2, errors
    assert not (run_dir / "summary.json").exists()

    cache = ("--compilation-cache", shared / "compiled")
    alone = start_training(tmp_path / "alone", "--run-dir", run_dir, "--resume", *cache, environment=ENVIRONMENT)
    finish([alone])
    steps = [(row["phase"], row["step"]) for row in read_metrics(run_dir)]
    expected = [("warm_start", step + 1) for step in range(WARM_START_STEPS)]
    assert steps == expected + [("rl", step) for step in range(STEPS + 1)]
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == STEPS
