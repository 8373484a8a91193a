"""`python -m experiments.train` as its user meets it: what a run leaves, what is refused and how, and that a run ends
the same whether it was left alone, asked to stop or killed.

Only processes that get a signal are processes of their own; they share what this one compiles.
"""

import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from support.commands import (
    SMALL,
    compiled_programs,
    flags,
    has_row,
    refusal,
    rows_of,
    run_training,
    start_training,
    wait_until,
)
from support.processes import SECONDS

import models
from experiments import train
from experiments.config import CountdownRun, load_config, save_config
from experiments.errors import INTERRUPTED, MISTAKE, STOPPED
from rspo_jax.records import MetricsLog, lock, read_metrics
from rspo_jax.training.restore import restore_params

ROOT = Path(__file__).resolve().parents[2]
WARM_START_STEPS, STEPS = 6, 8
FLAGS = SMALL | {
    "--steps": STEPS,
    "--warm-start.steps": WARM_START_STEPS,
    "--evaluation.every": 4,
    "--checkpoint.every": 2,
    "--checkpoint.keep": 3,
}
COMMAND = [sys.executable, "-m", "experiments.train", "countdown"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The folder of the data set and of the compiled programs of all runs."""
    folder = tmp_path_factory.mktemp("shared")
    with compiled_programs(folder / "compiled"):
        yield folder


@pytest.fixture(scope="module")
def finished_run(shared, tmp_path_factory):
    """A run that nothing interrupted: its folder, and what it said."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    return run_dir, run_training("--run-dir", run_dir, "--data-dir", shared / "data", *flags(FLAGS))


@pytest.fixture(scope="module")
def finished(finished_run):
    run_dir, said = finished_run
    assert said.code == 0, said
    return run_dir


def checkpoint_complete(index):
    return lambda run_dir: (run_dir / "checkpoints" / str(index)).exists()


def checkpoint_begun(index):
    return lambda run_dir: any((run_dir / "checkpoints").glob(f"{index}*"))


def row_written(phase, step):
    return lambda run_dir: has_row(run_dir, phase, step)


def folder_made(run_dir):
    return (run_dir / "config.json").exists()


def kill(shared, run_dir, moment):
    """Start a run in a process of its own, and kill that at a moment."""
    cache, data = ("--compilation-cache", shared / "compiled"), ("--data-dir", shared / "data")
    process = start_training(run_dir.with_name("killed"), "--run-dir", run_dir, *cache, *data, *flags(FLAGS))
    try:
        wait_until(lambda: moment(run_dir), lambda: process.code is None)
    finally:
        process.kill()
    assert process.code == -signal.SIGKILL, process.errors
    assert not (run_dir / "summary.json").exists(), "the run was over before it was killed"


def stop(shared, run_dir, moment, number, *arguments):
    """Start or resume a run by the command itself, and ask it to stop at a moment."""
    log = run_dir.with_name("stopped.log")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(shared / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONUNBUFFERED": "1",
    }
    command = [*COMMAND, "--run-dir", str(run_dir), *map(str, arguments)]
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: moment(run_dir), lambda: process.poll() is None)
        process.send_signal(number)
        code = process.wait(SECONDS)
    finally:
        process.kill()
        process.wait()
    output = log.read_text()
    assert code == STOPPED, output
    assert f"{number.name}: state saved" in output and "Traceback" not in output
    assert not (run_dir / "summary.json").exists(), "the run was over before it was asked to stop"
    assert output.rstrip().rsplit("\n", 1)[1].strip() == " ".join([*COMMAND, "--run-dir", str(run_dir), "--resume"])


def final_params(run_dir):
    """The bits of the parameters in the newest checkpoint, which must be that of the last step."""
    _, run = load_config(run_dir / "config.json")
    with jax.numpy_dtype_promotion("standard"):
        model = run.architecture()
        restored = restore_params(
            models.Transformer(model), functools.partial(models.init_params, model), run.trainer, run_dir
        )
    assert restored.step == run.trainer.steps
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(restored.params)]


def summary_of(run_dir):
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary.pop("wall_seconds") > 0
    return summary


def resume_to_the_same_end(run_dir, finished):
    resumed = run_training("--run-dir", run_dir, "--resume")
    assert resumed.code == 0, resumed
    assert rows_of(run_dir) == rows_of(finished)
    assert final_params(run_dir) == final_params(finished)
    assert summary_of(run_dir) == summary_of(finished)
    return resumed.out


# --- a run left alone ---


def test_what_a_run_leaves(finished):
    assert {path.name for path in finished.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "curves.png",
        "checkpoints",
        "diagnostics.jsonl",
        "samples.jsonl",
        "tensorboard",
    }
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (finished / "tensorboard").iterdir()} == {"warm_start", "rl"}
    # 6 steps of warm start and 8 of RL, saved every second step; the newest three are kept.
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"10", "12", "14"}
    name, run = load_config(finished / "config.json")
    assert (name, run.trainer.steps, run.model.hidden_size, run.task.test) == ("countdown", STEPS, 8, 8)
    rows = [(row["phase"], row["step"]) for row in read_metrics(finished)]
    assert rows == [("warm_start", step) for step in range(1, 7)] + [("rl", step) for step in range(9)]


def test_the_run_learns_from_rewards_that_differ(finished):
    assert any(row.get("grad_norm") for row in read_metrics(finished) if row["phase"] == "rl")


def test_the_summary(finished):
    summary = json.loads((finished / "summary.json").read_text())
    rows = read_metrics(finished)
    first, last = rows[WARM_START_STEPS], rows[-1]
    assert (summary["objective"], summary["seed"], summary["steps"], summary["test_problems"]) == ("rspo", 0, STEPS, 8)
    for suffix, mode in (("", "sampled"), ("_greedy", "greedy")):
        for name, row in (("warm_start", first), ("final", last)):
            assert summary[f"{name}_solve_rate{suffix}"] == row[f"test_{mode}"]
            assert summary[f"{name}_interval{suffix}"] == [row[f"test_{mode}_low"], row[f"test_{mode}_high"]]
        points = 100 * (last[f"test_{mode}"] - first[f"test_{mode}"])
        assert summary[f"improvement_points{suffix}"] == pytest.approx(points)
    assert summary["skipped_updates"] == 0
    assert summary["wall_seconds"] > sum(row.get("step_seconds", 0) for row in rows[7:]) / 2


def test_the_summary_of_a_task_that_does_not_tell_what_is_correct(tmp_path):
    found = {f"test_{mode}_reward{bound}": 0.25 for mode in ("sampled", "greedy") for bound in ("", "_low", "_high")}
    later = {name: -0.5 for name in found} | {"test_greedy_reward_low": math.nan}
    with MetricsLog(tmp_path, None) as log:
        log.write("rl", 0, found)
        log.write("rl", 1, later)
    run = CountdownRun(trainer=dataclasses.replace(CountdownRun().trainer, steps=1))
    summary = train.summarize(tmp_path, run, 8, 12.0)
    assert not [name for name in summary if "solve_rate" in name or "points" in name]
    assert (summary["warm_start_reward"], summary["final_reward_greedy"]) == (0.25, -0.5)
    assert train.report(summary).splitlines() == [
        "rspo, seed 0, 8 held-out problems:",
        "  sampled, reward 0.250 [0.250, 0.250]  ->  -0.500 [-0.500, -0.500]  (-0.750)",
        "  greedy, reward 0.250 [0.250, 0.250]  ->  -0.500  (-0.750)",
        "  12 s of training, 0 updates skipped",
    ]


def test_what_a_run_says(finished_run):
    run_dir, said = finished_run
    assert said.code == 0
    for text in (
        f"run folder: {run_dir}",
        f"RL {STEPS}/{STEPS}",
        "8 held-out problems",
        str(run_dir / "curves.png"),
        str(run_dir / "summary.json"),
        f"-m experiments.evaluate {run_dir}",
    ):
        assert text in said.out
    assert "Traceback" not in said.err
    assert "Error" not in said.err


def test_resuming_a_finished_run_changes_nothing(finished, tmp_path):
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    resume_to_the_same_end(run_dir, finished)
    before, after = ((folder / "config.json").read_bytes() for folder in (finished, run_dir))
    assert before == after


# --- stopped and killed ---


def test_a_run_killed_and_then_asked_to_stop_ends_the_same(shared, finished, tmp_path):
    run_dir = tmp_path / "run"
    kill(shared, run_dir, row_written("warm_start", 5))
    stop(shared, run_dir, row_written("rl", 1), signal.SIGTERM, "--resume")
    assert len(rows_of(run_dir)) < len(rows_of(finished))
    assert "going on after 6 warm-start steps" in resume_to_the_same_end(run_dir, finished)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "number"),
    [(row_written("warm_start", 1), signal.SIGTERM), (row_written("rl", 2), signal.SIGINT)],
    ids=["SIGTERM in the warm start", "SIGINT in RL"],
)
def test_stops_at_other_moments(shared, finished, tmp_path, moment, number):
    stop(shared, tmp_path / "run", moment, number, "--data-dir", shared / "data", *flags(FLAGS))
    resume_to_the_same_end(tmp_path / "run", finished)


MOMENTS = {
    "before anything": folder_made,
    "in the warm start": row_written("warm_start", 3),
    "while the first checkpoint is written": checkpoint_begun(2),
    "right after a checkpoint": checkpoint_complete(4),
    "at the hand-over": checkpoint_begun(WARM_START_STEPS),
    "in the first evaluation": checkpoint_complete(WARM_START_STEPS),
    "in the first step": row_written("rl", 0),
    "while a checkpoint is written": checkpoint_begun(10),
    "in the last step": row_written("rl", STEPS - 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_kills_at_other_moments(shared, finished, tmp_path, moment):
    kill(shared, tmp_path / "run", MOMENTS[moment])
    resume_to_the_same_end(tmp_path / "run", finished)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(finished, tmp_path):
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    newest = run_dir / "checkpoints" / "14"
    arrays = list((newest / "state").rglob("d/*"))
    assert arrays
    for path in arrays:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    output = resume_to_the_same_end(run_dir, finished)
    assert f"{newest} is damaged or incomplete" in output
    assert f"{newest.with_name('12')} is used instead" in output
    assert "going on after 6 warm-start steps and 6 steps" in output


# --- refused ---


def sentence(*arguments):
    error = refusal(train.main, *arguments)
    assert error.startswith("error: ")
    return error


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"group_size": 1, "mini_batches": 1}, "raise group_size to 2 or more, or choose advantages batch"),
        ({"advantages": "mean"}, "unknown advantages 'mean'; choose one of group, group_centred, leave_one_out, batch"),
        ({"overlong_buffer": 99}, "overlong_buffer must lie between 0 and sampler.max_new_tokens"),
        ({"routing": "replay"}, "invalid choice 'replay' for argument '--routing'"),
        ({"regularizers__kl_coefficient": -1}, "kl_coefficient must be 0 or more, got -1.0"),
        ({"correction__kind": "clip"}, "invalid choice 'clip' for argument '--correction.kind'"),
        ({"mini_batches": 3}, "8 responses to learn from do not divide into 3 mini_batches"),
        ({"rollout_chunks": 3}, "8 responses does not divide into 3 rollout_chunks"),
        ({"micro_batches": 3}, "a mini-batch of 4 responses does not divide into 3 micro_batches"),
        ({"learned_groups": 6}, "learned_groups must lie between 1 and prompts, 4; got 6"),
        ({"model__num_experts_per_token": 5}, "num_experts_per_token is 5, but a layer has only 4 experts"),
        ({"model__num_kv_heads": 3}, "num_heads (2) must be a multiple of num_kv_heads (3)"),
        ({"model__head_dim": 7}, "head_dim must be even"),
        ({"model__dtype": "float16"}, "invalid choice 'float16' for argument '--model.dtype'"),
        ({"model__vocab_size": 32}, "model.vocab_size is 32, but Countdown's tokenizer has 22 tokens"),
        (
            {"objective": "ppo"},
            "invalid choice 'ppo' for argument '--objective'. Expected one of ('rspo', 'gmpo', 'gspo'",
        ),
        ({"objective": "gmpo", "gamma_min": 0.8}, "gmpo has no option gamma_min; it has clip_high, clip_low"),
        ({"objective": "rspo", "aggregation": "token_mean"}, "rspo has no option aggregation"),
        ({"gamma_min": 2}, "gamma_min must lie in (0, 1], got 2.0; 1 switches the router shift off"),
        ({"position": "before"}, "invalid choice 'before' for argument '--position'"),
        ({"layer_aggregation": "max"}, "invalid choice 'max' for argument '--layer-aggregation'"),
        ({"sampler__temperature": 0}, "sampler.temperature must be positive to train"),
        ({"sampler__top_p": 0}, "top_p must lie in (0, 1], got 0.0"),
        ({"optimizer__learning_rate": -1}, "learning_rate must be positive, got -1.0"),
        ({"warm_start__optimizer__learning_rate": 0}, "learning_rate must be positive, got 0.0"),
        ({"warm_start__steps": -1}, "a warm start needs 0 or more steps"),
        ({"evaluation__problems": 9}, "evaluation.problems is 9, but the validation split has only 8"),
        ({"checkpoint__every": 0}, "checkpoints need every ≥ 1 and keep ≥ 1, got 0 and 3"),
        ({"task__low": 30}, "low (30) is above high (9); exchange them"),
        ({"task__test": 0}, "test"),
        ({"reward__format_reward": 1}, "format_reward is 1.0"),
        ({"steps": -1}, "steps must be 0 or more, got -1"),
    ],
    ids=str,
)
def test_mistakes_are_explained_and_leave_no_folder(tmp_path, changes, words):
    error = refusal(train.main, "countdown", "--run-dir", tmp_path / "run", *flags(FLAGS, **changes))
    assert words in error
    assert "Error parsing" in error or "Invalid choice" in error or error.startswith("error: ")
    assert error.count("\n") <= 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        # Two numbers from 1 to 3 give too few different problems.
        ({"task__high": 3}, "problems asked for in 'train' were found"),
        ({"sampler__max_new_tokens": 3}, "max_new_tokens is 3: raise it to"),
    ],
    ids=str,
)
def test_mistakes_that_only_the_data_show(tmp_path, changes, words):
    arguments = flags(FLAGS, **changes)
    error = sentence("countdown", "--run-dir", tmp_path / "run", "--data-dir", tmp_path / "data", *arguments)
    assert words in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["poker"], "there is no task 'poker'; the tasks are countdown, "),
        (["countdwn", "--steps", "3"], "there is no task 'countdwn' (did you mean countdown?)"),
        (["countdown", "--learing-rate", "3"], "no flag --learing-rate (did you mean --optimizer.learning-rate?)"),
        (["countdown", "--help", "chess"], "no group and no flag is called 'chess'; the groups are "),
        (["countdown", "--speed", "3"], "--speed"),
        (["countdown", "--steps", "many"], "many"),
        (["countdown", "--steps"], "--steps"),
        (["countdown", "stray"], "stray"),
    ],
)
def test_flags_that_there_are_not(arguments, words):
    assert words in refusal(train.main, *arguments)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["countdown", "--help"]])
def test_help(capsys, arguments):
    with pytest.raises(SystemExit) as exit:
        train.main(arguments)
    assert exit.value.code == 0
    assert "countdown" in capsys.readouterr().out


# --- folders ---


@pytest.fixture
def small_run(shared):
    name, run, _ = train.parse(["countdown", "--data-dir", str(shared / "data"), *flags(FLAGS)])
    assert name == "countdown"
    return run


@pytest.fixture
def run_dir(tmp_path, small_run):
    """A folder in which a run was started, and killed before its first checkpoint."""
    folder = tmp_path / "run"
    folder.mkdir()
    save_config(folder / "config.json", "countdown", small_run)
    return folder


def test_a_folder_with_something_in_it_is_refused(shared, run_dir):
    before = (run_dir / "config.json").read_bytes()
    given = ("--data-dir", shared / "data", *flags(FLAGS, steps=9))
    error = sentence("countdown", "--run-dir", run_dir, *given)
    assert f"{run_dir} is not empty: add --resume to continue the run in it, or choose another --run-dir" in error
    assert (run_dir / "config.json").read_bytes() == before


def test_resuming_where_there_is_no_run(tmp_path, monkeypatch):
    error = sentence("countdown", "--run-dir", tmp_path / "run", "--resume")
    assert f"there is no run to resume in {tmp_path / 'run'}; leave --resume out to start one there" in error
    error = sentence("countdown", f"--run-dir={tmp_path}", "--resume")
    assert f"there is no run to resume in {tmp_path};" in error
    monkeypatch.chdir(tmp_path)
    error = sentence("countdown", "--resume")
    assert "there is no run of countdown in runs/ to resume; name its folder with --run-dir" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "value", "change"),
    [
        ("--model.hidden-size", 24, "hidden_size: 8 -> 24"),
        ("--model.num-layers", 2, "num_layers: 1 -> 2"),
        ("--model.num-experts", 8, "num_experts: 4 -> 8"),
        ("--model.tie-embeddings", None, "tie_embeddings: False -> True"),
    ],
)
def test_resuming_with_another_shape_is_refused(run_dir, flag, value, change):
    before = (run_dir / "config.json").read_bytes()
    given = [flag] if value is None else [flag, value]
    error = sentence("countdown", "--run-dir", run_dir, "--resume", *given)
    assert "change the shape of parameter" in error
    assert change in error
    assert "leave them out, or start a new run folder" in error
    assert (run_dir / "config.json").read_bytes() == before


def test_resuming_with_an_impossible_change_is_refused(run_dir):
    before = (run_dir / "config.json").read_bytes()
    error = sentence("countdown", "--run-dir", run_dir, "--resume", "--mini-batches", 3)
    assert "8 responses to learn from do not divide into 3 mini_batches" in error
    assert (run_dir / "config.json").read_bytes() == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"task_name": "chess"}', '{"task_name": "countdown", "speed": 1}'])
def test_resuming_with_a_broken_config_names_the_file(run_dir, text):
    (run_dir / "config.json").write_text(text)
    assert str(run_dir / "config.json") in sentence("countdown", "--run-dir", run_dir, "--resume")


def test_a_resumed_run_keeps_its_configuration_but_for_the_flags_given(run_dir, small_run, capsys):
    name, run, folder = train.parse(["countdown", "--run-dir", str(run_dir), "--resume"])
    assert (name, run, folder) == ("countdown", small_run, train.Folder(run_dir, True))
    _, run, folder = train.parse(["countdown", "--resume", "--steps", "20", f"--run-dir={run_dir}"])
    assert (run.trainer.steps, run.trainer.prompts, folder.run_dir) == (20, 4, run_dir)
    assert train.prepare_folder("countdown", run, folder) == run_dir
    assert f"changed since the run was started: trainer.steps: {STEPS} -> 20\n" == capsys.readouterr().out
    assert load_config(run_dir / "config.json") == ("countdown", run)


@pytest.mark.parametrize("moment", ["parse", "joined", "check_data"])
def test_ctrl_c_before_the_loop_is_one_word(moment, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, moment, interrupted)
    said = run_training("--run-dir", tmp_path / "run")
    assert said == (INTERRUPTED, "", "interrupted\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.5])
def test_ctrl_c_while_the_command_is_imported_ends_it(seconds, tmp_path):
    command = [sys.executable, "-m", "experiments.train", "countdown", "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and b"Error" not in said, said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_resuming_without_a_folder_takes_the_newest(tmp_path, monkeypatch, small_run):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(["countdown-b", "countdown-c", "countdown-a", "chess-d"]):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        save_config(folder / "config.json", "countdown", small_run)
        os.utime(folder / "config.json", (1e9 + age, 1e9 + age))
    _, _, folder = train.parse(["countdown", "--resume"])
    assert folder == train.Folder(Path("runs/countdown-a"), True)


def test_a_new_run_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CountdownRun()
    run_dir = train.prepare_folder("countdown", run, train.agree_on_flags("countdown", run, train.Folder()))
    assert run_dir.parent == Path("runs")
    assert run_dir.name.startswith("countdown-2")
    assert load_config(run_dir / "config.json") == ("countdown", run)


@pytest.mark.parametrize(
    "left", [[], [".config.json.7.tmp"], [".config.json.7.tmp", ".summary.json.123456.tmp"]], ids=str
)
def test_what_an_interrupted_start_left_does_not_count(tmp_path, small_run, left):
    for name in left:
        (tmp_path / name).write_text("{")
    error = sentence("countdown", "--run-dir", tmp_path, "--resume")
    assert "there is no run to resume" in error and "leave --resume out to start one there" in error
    _, _, folder = train.parse(["countdown", "--run-dir", str(tmp_path), "--resume-or-start"])
    assert not folder.resume
    train.prepare_folder("countdown", small_run, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("flag", ["--resume", "--resume-or-start", None])
def test_a_run_without_its_config_is_not_told_to_go_in_a_circle(shared, tmp_path, flag):
    (tmp_path / "checkpoints").mkdir()
    given = [] if flag is None else [flag]
    error = sentence("countdown", "--run-dir", tmp_path, *given, "--data-dir", shared / "data", *flags(FLAGS))
    assert "holds no config.json, so there is no run to continue in it either: put the run's config.json back" in error


def lost(name, *numbers):
    def change(run_dir):
        lines = (run_dir / name).read_bytes().splitlines(keepends=True)
        (run_dir / name).write_bytes(b"".join(line for number, line in enumerate(lines) if number not in numbers))

    return change


def doubled(name, number):
    def change(run_dir):
        lines = (run_dir / name).read_bytes().splitlines(keepends=True)
        (run_dir / name).write_bytes(b"".join([*lines, lines[number]]))

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lost("metrics.jsonl", WARM_START_STEPS),
            "metrics.jsonl lacks the evaluation of step 0, so there is no summary",
        ),
        (
            lost("metrics.jsonl", WARM_START_STEPS + STEPS),
            "lacks the evaluation of the last step, so there is no summary",
        ),
        (doubled("metrics.jsonl", 8), "metrics.jsonl, line 16: the row of rl step 2 is there twice"),
        (doubled("diagnostics.jsonl", 1), "diagnostics.jsonl, line 9: the row of rl step 2 is there twice"),
        (lambda run_dir: (run_dir / "run.lock").write_bytes(another_process()), "a run is going on in"),
    ],
    ids=["step 0 lost", "last step lost", "doubled", "doubled arrays", "held"],
)
def test_a_run_that_is_not_as_it_was_is_refused(finished, tmp_path, change, words):
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    change(run_dir)
    said = run_training("--run-dir", run_dir, "--resume")
    assert said.code == MISTAKE and "Traceback" not in said.err, said
    assert words in said.err.splitlines()[-1]


def another_process():
    """The lock of a process that lives: this one's parent."""
    content = json.loads(lock._content(0))
    process = os.getppid()
    return json.dumps(content | {"token": "other", "process": process, "started": lock._start_of(process)}).encode()
