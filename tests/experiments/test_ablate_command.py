"""The command `python -m experiments.ablate`. Stand-ins for runs leave the files of a run; one slow test has real
runs, and kills everything half-way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.commands import QUICK

from experiments import ablate
from experiments.ablation import jobs
from experiments.ablation.study import plan_study
from experiments.config import load_config
from experiments.errors import MISTAKE, STOPPED
from rspo_jax.records import read_metrics

ROOT = Path(__file__).resolve().parents[2]

STUDY = """
from experiments.ablation.grid import choose, vary
from experiments.ablation.study import Study
from experiments.config import CountdownRun
from experiments.reporting.study_figures import FinalScores
STUDY = Study(
    name="a_study",
    base=CountdownRun(),
    grid=choose("method", {name: {"objective.objective": name} for name in ("gmpo", "rspo")})
    * vary("updates", "trainer.mini_batches", 4, 16),
    seeds=(0, 1),
    warm_starts=0,
    figures=(FinalScores("scores", panels="updates"),),
)
"""

# A run of a hundredth of a second, which fails if there is a file with its name.
STAND_IN = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
config = json.loads((folder / "config.json").read_text())
print("a line of its log")
if (pathlib.Path(sys.argv[2]) / folder.name).exists():
    sys.exit("it cannot be")
score = config["trainer"]["seed"] / 10 + config["trainer"]["mini_batches"] / 100
rows = [{"phase": "rl", "step": step, "reward": score, "eval_sampled": score, "test_sampled": score} for step in (0, 1)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(folder / "checkpoints").mkdir(exist_ok=True)
(folder / "summary.json").write_text(json.dumps({"wall_seconds": 1.0}))
"""


@pytest.fixture
def failing(tmp_path, monkeypatch):
    """Replace runs by stand-ins; return the folder in which a file with a run's name makes that run fail."""
    folder = tmp_path / "failing"
    folder.mkdir()
    command = [sys.executable, "-S", "-c", STAND_IN]
    monkeypatch.setattr(jobs, "worker_command", lambda job, _: [*command, str(job.folder), str(folder)])
    monkeypatch.setattr(jobs, "_POLL_SECONDS", 0.01)
    return folder


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "a_study.py"
    path.write_text(STUDY)
    return path


def call(capsys, *arguments):
    """Run the command; return its exit code and its output."""
    code = ablate.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return code, captured.out + captured.err


def run_rows(out):
    return [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]


def test_a_study_from_its_start_to_its_figures(capsys, tmp_path, study, failing):
    out = tmp_path / "out"
    code, said = call(capsys, study, "--out", out)
    assert code == 0, said
    assert {path.name for path in out.iterdir()} == {
        "study.json",
        "base.json",
        "runs.jsonl",
        "steps.jsonl.gz",
        "summary.json",
        "scores.png",
        "work",
    }
    names = [row["run"] for row in run_rows(out)]
    assert names[:2] == ["method=gmpo,updates=4,seed=0", "method=gmpo,updates=16,seed=0"]
    assert [row["test_sampled"] for row in run_rows(out)] == pytest.approx([0.04, 0.16] * 2 + [0.14, 0.26] * 2)
    assert "[8/8] method=" in said
    assert "about 0 s left" in said
    assert "method=rspo,updates=16    2/2    21.0 % [ 16.0,  26.0]" in said
    run_dir = out / "work" / "runs" / names[0]
    assert not (run_dir / "checkpoints").exists()
    assert load_config(run_dir / "config.json")[1] == plan_study(ablate.load_study(str(study))).runs[0].run
    # The second time nothing is run, and the files stay the same.
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    shutil.rmtree(out / "work")
    code, said = call(capsys, study, "--out", out)
    assert (code, "8 runs, 0 to go" in said) == (0, True)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_figures_are_drawn_from_the_tables_alone(capsys, tmp_path, study, failing):
    out = tmp_path / "out"
    call(capsys, study, "--out", out, "--only", "seed=0", "--workers", 3)
    assert len(run_rows(out)) == 4
    picture = (out / "scores.png").read_bytes()
    for name in ("work", "study.json", "base.json", "scores.png", "summary.json"):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    code, said = call(capsys, study, "--out", out, "--draw-only")
    assert code == 0, said
    assert (out / "scores.png").read_bytes() == picture
    code, said = call(capsys, study, "--out", tmp_path / "nothing", "--draw-only")
    assert (code, "there is no table in" in said) == (2, True)


@pytest.mark.parametrize("way_out", [["--retry"], ["--forget", "method=rspo,updates=4"]], ids=["retry", "forget"])
def test_a_failure_is_shown_counted_and_left_alone_until_told_otherwise(capsys, tmp_path, study, failing, way_out):
    out, name = tmp_path / "out", "method=rspo,updates=4,seed=0"
    (failing / name).touch()
    code, said = call(capsys, study, "--out", out, "--only", "seed=0", "--keep-checkpoints")
    assert code == ablate.FAILED
    assert said.count(f"{name} ended with exit code 1") == 3
    assert "    it cannot be" in said
    assert "1 runs failed" in said
    rows = {row["run"]: row for row in run_rows(out)}
    assert (rows[name]["state"], rows[name]["exit_codes"]) == ("failed", [1, 1, 1])
    assert sum(row["state"] == "done" for row in rows.values()) == 3
    assert (out / "work" / "runs" / "method=gmpo,updates=4,seed=0" / "checkpoints").exists()
    code, said = call(capsys, study, "--out", out, "--list")
    assert f"failed   {name}" in said
    assert "8 runs: 3 done, 1 failed, 4 waiting" in said
    code, said = call(capsys, study, "--out", out, "--only", "seed=0")
    assert (code, "failed before and is left out" in said) == (ablate.FAILED, True)
    (failing / name).unlink()
    code, said = call(capsys, study, "--out", out, "--only", "seed=0", *way_out)
    assert code == 0, said
    assert {row["state"] for row in run_rows(out)} == {"done"}


def test_a_name_means_one_configuration(capsys, tmp_path, study, failing):
    out = tmp_path / "out"
    call(capsys, study, "--out", out, "--only", "seed=0")
    study.write_text(STUDY.replace("CountdownRun()", "CountdownRun(data_dir='elsewhere')"))
    for keep_folders in (True, False):
        if not keep_folders:
            shutil.rmtree(out / "work")
        code, said = call(capsys, study, "--out", out)
        assert code == MISTAKE
        assert "4 runs in" in said
        assert "(data_dir: None -> elsewhere): choose another --out, or delete their results with --forget" in said
    code, said = call(capsys, study, "--out", out, "--forget", "seed=0", "--only", "updates=4,seed=0")
    assert code == 0, said
    assert "deleted the results of 4 runs" in said
    assert [row["run"] for row in run_rows(out)] == [f"method={name},updates=4,seed=0" for name in ("gmpo", "rspo")]
    # More cells and seeds do not change the configuration, and results outlive their cells.
    study.write_text(study.read_text().replace("seeds=(0, 1)", "seeds=(1,)").replace("4, 16", "4, 8"))
    code, said = call(capsys, study, "--out", out)
    assert code == 0, said
    assert "2 runs in the table are not part of the study any more" in said
    assert len(run_rows(out)) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_study"], "there is no study 'no_such_study': name a Python file with a STUDY, or one of "),
        (["STUDY", "--only", "ppo"], "no run of a_study has 'ppo' in its name"),
        (["STUDY", "--workers", "0"], "workers must be at least 1, got 0"),
        (["EMPTY"], "has no STUDY of type"),
    ],
)
def test_what_is_refused(capsys, tmp_path, study, arguments, message):
    (tmp_path / "empty.py").write_text("")
    places = {"STUDY": str(study), "EMPTY": str(tmp_path / "empty.py")}
    try:
        code, said = call(
            capsys, *[places.get(argument, argument) for argument in arguments], "--out", tmp_path / "out"
        )
    except SystemExit as error:  # from the parser, which prints a box
        code, said = error.code, " ".join(capsys.readouterr().err.replace("│", "").split())
    assert code == 2
    assert message in said
    assert not (tmp_path / "out").exists()


def test_an_impossible_cell_is_refused_before_anything_runs(capsys, tmp_path, study, failing):
    study.write_text(STUDY.replace("4, 16", "4, 5"))
    code, said = call(capsys, study, "--out", tmp_path / "out")
    assert code == MISTAKE
    assert "method=gmpo,updates=5,seed=0" in said
    assert "do not divide into 5 mini_batches" in said
    assert not (tmp_path / "out").exists()


def test_one_process_at_a_time_works_in_a_folder(capsys, tmp_path, study, failing):
    work = tmp_path / "out" / "work"
    work.mkdir(parents=True)
    script = "import sys, time; from experiments.ablation.worker import locked; "
    script += "lock = locked(sys.argv[1]); print(lock.__enter__(), flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", script, str(work)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"True\n"
        code, said = call(capsys, study, "--out", tmp_path / "out")
        assert (code, "another process runs a study in" in said) == (2, True)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("name", ["countdown", "countdown_gradients", "countdown_tuning", "countdown_smoke"])
def test_studies_that_come_with_the_library(name):
    study = ablate.load_study(name)
    assert study.name == name
    assert len(plan_study(study).runs) >= 6


# --- real runs ---


def start(out, environment, *more):
    command = [sys.executable, "-m", "experiments.ablate", "countdown_smoke", "--out", str(out), *more]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def finish(process):
    said, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, said
    return said


def begun(out, count):
    """Return whether all runs together have rows of at least `count` steps of reinforcement learning."""
    rows = [read_metrics(path.parent) for path in (out / "work" / "runs").glob("*/metrics.jsonl")]
    return sum(row["step"] > 0 for run in rows for row in run) >= count


@pytest.mark.slow
def test_a_study_that_is_killed_ends_as_one_that_is_left_alone(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK, "TFDS_DATA_DIR": str(tmp_path / "data")}
    alone, killed, two = tmp_path / "alone", tmp_path / "killed", ("--only", "updates=4,seed=0")
    finish(start(alone, environment, *two))
    (killed / "work").mkdir(parents=True)
    shutil.copytree(alone / "work" / "compiled", killed / "work" / "compiled")
    for count, end in ((2, signal.SIGKILL), (5, signal.SIGTERM)):  # of 8 steps of both runs together
        process = start(killed, environment, *two)
        deadline = time.monotonic() + 600
        while not begun(killed, count):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        if end == signal.SIGKILL:
            os.killpg(process.pid, end)
        else:
            process.send_signal(end)
        said, _ = process.communicate(timeout=600)
        assert process.returncode == (-end if end == signal.SIGKILL else STOPPED), said
    said = finish(start(killed, environment, *two))
    assert "warm_start=0 done" not in said
    assert (killed / "steps.jsonl.gz").read_bytes() == (alone / "steps.jsonl.gz").read_bytes()
    untimed = [
        [{name: value for name, value in row.items() if "seconds" not in name} for row in run_rows(out)]
        for out in (alone, killed)
    ]
    assert untimed[0] == untimed[1]
    assert len(untimed[0]) == 2
