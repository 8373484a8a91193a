"""`python -m experiments.evaluate`: the table and the solutions of a model that knows all answers by heart, and what is
refused. The run that it is given is made here from a config and a checkpoint, without training one."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from experiments import evaluate
from experiments.config import CountdownRun, save_config
from experiments.tasks.countdown import CharacterTokenizer, CountdownConfig
from rspo_jax.checkpoint import Checkpoints
from rspo_jax.rollout import Packing, ResponseLengths, encode_solutions, pack, prompt_width
from rspo_jax.run_state import RunState
from rspo_jax.sampler import SamplerConfig
from rspo_jax.train_step import OptimizerConfig, init_train_state, supervised_update
from rspo_jax.trainer_config import EvaluationConfig, TrainerConfig

RESPONSE = 6
OPTIMIZER = OptimizerConfig(learning_rate=0.03, warmup_updates=1)


def make_run(data_dir):
    """Four test problems of two numbers each, whose solutions are at most five characters long."""
    return CountdownRun(
        task=CountdownConfig(numbers_min=2, numbers_max=2, low=1, high=9, train=20, validation=4, test=4),
        model=models.TransformerConfig(
            vocab_size=CharacterTokenizer.vocabulary_size,
            hidden_size=32,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            num_experts=2,
            num_experts_per_token=1,
            expert_size=32,
        ),
        trainer=TrainerConfig(
            steps=9,
            prompts=4,
            group_size=2,
            sampler=SamplerConfig(max_new_tokens=RESPONSE),
            optimizer=OPTIMIZER,
            evaluation=EvaluationConfig(problems=4),
        ),
        data_dir=str(data_dir),
    )


def memorise(run, problems):
    """Parameters that answer each problem with its own solution."""
    task = run.build_task()
    width = prompt_width(task, problems)
    solutions = encode_solutions(task, problems, width, RESPONSE)
    batch, _ = pack(solutions, RESPONSE, np.arange(len(problems)), Packing())
    state = init_train_state(models.init_params(run.model, jax.random.key(0)), OPTIMIZER)
    with jax.numpy_dtype_promotion("standard"):  # Optax needs it
        for _ in range(150):
            state, _ = supervised_update(models.Transformer(run.model), OPTIMIZER, state, batch)
    return state


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A run folder, and the four problems that its model knows."""
    folder = tmp_path_factory.mktemp("taught")
    run = make_run(folder / "data")
    problems = run.build_task().problems("test")
    train_state = memorise(run, problems)
    run_dir = folder / "run"
    run_dir.mkdir()
    save_config(run_dir / "config.json", "countdown", run)
    with Checkpoints(run_dir / "checkpoints") as checkpoints:
        key, zero = jax.random.key_data(jax.random.key(0)), jnp.int32(0)
        checkpoints.save(
            7,
            RunState(train_state, key, zero, zero, jnp.int32(7), ResponseLengths(jnp.float32(0), jnp.float32(0))),
            {"elapsed_seconds": 1.0},
        )
    return run_dir, problems


def call(capsys, *arguments):
    try:
        code = evaluate.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = exit.code
    return code, capsys.readouterr()


def cells(output, start):
    """The numbers in the line of the table that starts with these words."""
    (line,) = (line for line in output.splitlines() if re.match(rf"\W*{start}", line))
    return [float(number) for number in re.findall(r"\d+\.\d+", line)]


@pytest.fixture(autouse=True)
def a_wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def test_the_table_and_the_solutions(taught, capsys):
    run_dir, problems = taught
    code, captured = call(capsys, run_dir, "--samples", 2, "--show", 3)
    assert (code, captured.err) == (0, "")
    assert "step 7: 4 test problems" in captured.out
    # The Wilson interval of 4 of 4 is [51.0 %, 100 %].
    assert cells(captured.out, "greedy") == [100.0, 51.0, 100.0, 0.0, 1.0]
    solved, low, high, cut_off, reward = cells(captured.out, "sampled at temperature 1, mean of 2")
    assert 80 < solved == 100 * reward
    assert low < solved <= high
    assert cut_off < 20
    assert cells(captured.out, "solved by any of 2 samples")[:1] == [100.0]
    shown = [line for line in captured.out.splitlines() if line.endswith(("right", "wrong"))]
    prompts = [f"{','.join(map(str, problem.numbers))}={problem.target}:" for problem in problems]
    assert shown == [
        f"{prompt} {problem.solution}   right" for prompt, problem in zip(prompts[:3], problems, strict=False)
    ]


def test_another_split_seed_and_temperature(taught, capsys):
    run_dir, _ = taught
    arguments = [run_dir, "--split", "validation", "--samples", 1, "--temperature", 30, "--show", 0]
    code, captured = call(capsys, *arguments)
    assert (code, captured.err) == (0, "")
    assert "4 validation problems" in captured.out
    assert not captured.out.rstrip().endswith(("right", "wrong"))
    # Nearly every token is as likely as any other.
    assert cells(captured.out, "sampled at temperature 30, mean of 1")[0] < 50
    again = call(capsys, *arguments)
    assert again[1].out == captured.out


def test_a_folder_that_is_no_run(tmp_path, capsys):
    code, captured = call(capsys, tmp_path / "nothing")
    assert (code, captured.out) == (2, "")
    assert captured.err == f"error: {tmp_path / 'nothing'} is not the folder of a run: it has no config.json\n"
    assert not (tmp_path / "nothing").exists()


def test_a_run_without_a_checkpoint(tmp_path, capsys):
    save_config(tmp_path / "config.json", "countdown", make_run(tmp_path / "data"))
    code, captured = call(capsys, tmp_path)
    assert code == 2
    assert captured.err == f"error: {tmp_path} has no checkpoint yet\n"


def test_a_run_of_which_every_checkpoint_is_damaged(tmp_path, capsys):
    save_config(tmp_path / "config.json", "countdown", make_run(tmp_path / "data"))
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    code, captured = call(capsys, tmp_path)
    assert code == 2
    assert captured.err.startswith("error: all checkpoints in ")
    assert captured.err.count("\n") == 1


def test_a_checkpoint_of_another_shape(taught, tmp_path, capsys):
    run_dir, _ = taught
    run = make_run(tmp_path / "data")
    wider = dataclasses.replace(run, model=dataclasses.replace(run.model, hidden_size=48))
    save_config(tmp_path / "config.json", "countdown", wider)
    (tmp_path / "checkpoints").symlink_to(run_dir / "checkpoints")
    code, captured = call(capsys, tmp_path)
    assert code == 2
    assert re.match(r"error: .*checkpoints/7 does not fit this run: .*\n$", captured.err)


@pytest.mark.parametrize("text", ["", "[]", '{"task_name": "chess"}'])
def test_a_config_that_cannot_be_read_is_named(tmp_path, capsys, text):
    (tmp_path / "config.json").write_text(text)
    code, captured = call(capsys, tmp_path)
    assert code == 2
    assert captured.err.startswith("error: ") and str(tmp_path) in captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samples", 0], "samples must be at least 1 and show 0 or more, got 0 and 6"),
        (["--show", -1], "samples must be at least 1 and show 0 or more, got 4 and -1"),
        (["--temperature", 0], "temperature must be positive, got 0.0; greedy decoding is always evaluated"),
        (["--split", "exam"], "exam"),
        (["--speed", 3], "--speed"),
    ],
    ids=str,
)
def test_wrong_flags(taught, capsys, arguments, words):
    code, captured = call(capsys, taught[0], *arguments)
    assert code == 2
    assert words in " ".join(captured.err.split())
    assert "Traceback" not in captured.err


def test_help_and_no_arguments(capsys):
    code, captured = call(capsys, "--help")
    assert code == 0
    for flag in ("PATH", "--split", "--samples", "--temperature", "--show", "--seed"):
        assert flag in captured.out
    assert call(capsys)[0] == 2
