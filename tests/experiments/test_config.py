"""Configurations of runs: mistakes that are refused before anything is computed, and round trips of `config.json`."""

import dataclasses
import json
import re

import pytest

import models
from experiments.config import (
    RUNS,
    CodeRun,
    CountdownRun,
    MathRun,
    ObjectiveOptions,
    differences,
    load_config,
    save_config,
)
from experiments.tasks.code.config import CodeConfig
from experiments.tasks.code.sandbox import Limits
from experiments.tasks.countdown import CharacterTokenizer, CountdownConfig, CountdownReward
from experiments.tasks.mathematics.config import MathConfig
from experiments.text import ChatConfig
from rspo_jax.objectives import OBJECTIVES, GRPOConfig, GSPOConfig, RSPOConfig
from rspo_jax.rollouts import SamplerConfig
from rspo_jax.training import EvaluationConfig, OptimizerConfig, TrainerConfig, WarmStartConfig

OTHER_RUN = CountdownRun(
    task=CountdownConfig(numbers_min=2, numbers_max=4, seed=7, train=300, validation=30, test=40),
    reward=CountdownReward(format_reward=0.1),
    model=models.TransformerConfig(vocab_size=CharacterTokenizer.vocabulary_size, hidden_size=16, remat="dots"),
    objective=ObjectiveOptions("grpo", clip_low=0.125, aggregation="token_mean", micro_batches=2),
    trainer=TrainerConfig(
        steps=3,
        prompts=6,
        learned_groups=4,
        advantages="group_centred",
        dynamic_sampling=True,
        overlong_buffer=3,
        sampler=SamplerConfig(max_new_tokens=20, temperature=0.9, top_k=5, top_p=0.9),
        optimizer=OptimizerConfig(learning_rate=1e-4, decay_updates=100),
        warm_start=WarmStartConfig(steps=0),
        evaluation=EvaluationConfig(problems=30),
    ),
    data_dir="somewhere/else",
)


def test_the_default_run_is_possible():
    run = CountdownRun()
    learner = run.learner()
    assert (learner.objective, learner.objective_config) == ("rspo", RSPOConfig())
    run.check()
    assert run.architecture() == run.model and run.load_params() is None


def test_the_learner_follows_the_run():
    learner = OTHER_RUN.learner()
    assert (learner.objective, learner.temperature, learner.micro_batches) == ("grpo", 0.9, 2)
    assert learner.objective_config == GRPOConfig(clip_low=0.125, aggregation="token_mean")
    assert OTHER_RUN.build_task().config == OTHER_RUN.task
    assert OTHER_RUN.build_task().data_dir == "somewhere/else"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_its_defaults(name):
    assert ObjectiveOptions(name).config() == OBJECTIVES[name].config_type()


def test_options_reach_the_objective():
    options = ObjectiveOptions("gspo", gamma_min=0.5, clip_low=0.1, clip_high=0.0)
    assert options.config() == GSPOConfig(clip_low=0.1, clip_high=0.0, gamma_min=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "ppo"}, "unknown objective 'ppo'; choose one of rspo, gmpo, gspo, gspo_token, grpo, dr_grpo"),
        ({"objective": "gmpo", "gamma_min": 0.8}, "gmpo has no option gamma_min; it has clip_high, clip_low"),
        ({"objective": "grpo", "position": "pre_clip"}, "grpo has no option position; it has aggregation, clip_high"),
        ({"objective": "rspo", "aggregation": "token_mean"}, "rspo has no option aggregation; it has clip_high"),
        ({"gamma_min": 0.0}, r"gamma_min must lie in \(0, 1\], got 0.0; 1 switches the router shift off"),
        ({"gamma_min": 1.5}, r"gamma_min must lie in \(0, 1\], got 1.5"),
        ({"clip_low": -0.1}, "clip_low must be 0 or more, got -0.1"),
        ({"clip_high": -0.1}, "clip_high must be 0 or more, got -0.1"),
        ({"position": "before"}, "position must be one of pre_clip, post_clip, post_clip_literal; got 'before'"),
        ({"objective": "grpo", "aggregation": "sum"}, "aggregation must be one of .*; got 'sum'"),
    ],
)
def test_objective_options_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveOptions(**arguments)


def with_trainer(**changes):
    """Return a trainer's config. Defaults of experiments are tuned now and then, so no test here depends on them."""
    return {"trainer": TrainerConfig(**({"prompts": 4, "group_size": 8, "mini_batches": 2} | changes))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": models.TransformerConfig(vocab_size=32)}, "model.vocab_size is 32, but .* has 22 tokens"),
        (
            {"task": CountdownConfig(validation=400)} | with_trainer(evaluation=EvaluationConfig(problems=401)),
            r"evaluation.problems is 401, but .* has only 400 \(task.validation\)",
        ),
        ({"task": CountdownConfig(low=30)}, r"low \(30\) is above high \(20\)"),
        ({"task": CountdownConfig(train=-1)}, "train is -1, but a split cannot have a negative number"),
        ({"reward": CountdownReward(format_reward=1.0)}, "format_reward is 1.0"),
        (
            {"objective": ObjectiveOptions(micro_batches=3)} | with_trainer(),
            "a mini-batch of 16 responses does not divide into 3 micro_batches",
        ),
        ({"objective": ObjectiveOptions(micro_batches=0)}, "micro_batches must be at least 1, got 0"),
        ({"objective": ObjectiveOptions(layer_aggregation="max")}, "layer_aggregation must be one of"),
        (
            {"objective": ObjectiveOptions(micro_batches=2)} | with_trainer(learned_groups=1, mini_batches=8),
            "a mini-batch of 1 responses does not divide into 2 micro_batches",
        ),
    ],
)
def test_runs_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CountdownRun(**changes)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_run_needs_problems_of_every_split(split):
    sizes = {"train": 10, "validation": 10, "test": 10} | {split: 0}
    with pytest.raises(ValueError, match=split):
        CountdownRun(task=CountdownConfig(**sizes), **with_trainer(evaluation=EvaluationConfig(problems=1)))


# --- config.json ---


MATH_RUN = MathRun(
    model="some/folder",
    task=MathConfig(name="math500", test_path="test.jsonl", train_path="train.jsonl", must_be_boxed=False, workers=3),
    chat=ChatConfig(options=("enable_thinking=false",), date="2025-02-03"),
    dtype="bfloat16",
    remat="none",
)
CODE_RUN = CodeRun(
    model="some/folder",
    task=CodeConfig(True, train_path="train.jsonl", limits=Limits(seconds=2.0), accept_missing=("network",)),
    objective=ObjectiveOptions("gmpo"),
)


def test_every_task_has_a_run_with_defaults():
    assert {"countdown": CountdownRun, "mathematics": MathRun, "code": CodeRun} == RUNS
    assert all(run_type().learner().objective == "rspo" for run_type in RUNS.values())


@pytest.mark.parametrize("run_type", [MathRun, CodeRun])
def test_a_run_from_a_folder_needs_one(run_type, tmp_path):
    with pytest.raises(ValueError, match="name its Hugging Face folder with --model"):
        run_type().check()
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        run_type(model=str(tmp_path)).check()


@pytest.mark.parametrize(
    ("name", "run"),
    [("countdown", CountdownRun()), ("countdown", OTHER_RUN), ("mathematics", MATH_RUN), ("code", CODE_RUN)],
)
def test_there_and_back(tmp_path, name, run):
    path = tmp_path / "config.json"
    save_config(path, name, run)
    assert load_config(path) == (name, run)
    content = json.loads(path.read_text())
    assert content["task_name"] == name
    assert set(content) == {"task_name"} | {field.name for field in dataclasses.fields(run)}


@pytest.fixture
def saved(tmp_path):
    """The path of a saved run, and a function that changes what it holds."""
    path = tmp_path / "config.json"
    save_config(path, "countdown", OTHER_RUN)

    def edit(change):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return path, edit


def test_a_field_that_is_absent_has_its_default(saved):
    path, edit = saved
    edit(lambda content: content["trainer"].pop("learned_groups"))
    _, run = load_config(path)
    assert run == dataclasses.replace(OTHER_RUN, trainer=dataclasses.replace(OTHER_RUN.trainer, learned_groups=None))


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} is not the folder of a run: it has no config.json"):
        load_config(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("task_name"), "unknown task None; known: countdown"),
        (lambda content: content.update(task_name="chess"), "unknown task 'chess'; known: countdown"),
        (lambda content: content.update(speed=1), "unknown field 'speed'"),
        (lambda content: content["trainer"].update(speed=1), "config.json: trainer has the unknown field 'speed'"),
        (
            lambda content: content["trainer"]["optimizer"].update(momentum=1),
            "trainer: optimizer has the unknown field 'momentum'",
        ),
        (lambda content: content["trainer"].update(steps=-1), "steps must be 0 or more, got -1"),
    ],
)
def test_contents_that_are_refused(saved, change, message):
    path, edit = saved
    edit(change)
    with pytest.raises(ValueError, match=message):
        load_config(path)


@pytest.mark.parametrize("text", ["", '{"task_name": "countdown", "tra', "[1, 2]", "null", '"countdown"'])
def test_a_file_that_holds_no_run_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_config(path)


# --- differences ---


def test_no_differences():
    assert differences(CountdownRun(), CountdownRun()) == []


def test_differences_name_the_field_and_both_values():
    run = CountdownRun()
    trainer = dataclasses.replace(
        run.trainer, steps=7, optimizer=dataclasses.replace(run.trainer.optimizer, learning_rate=0.5)
    )
    changed = dataclasses.replace(run, data_dir="data", trainer=trainer)
    assert sorted(differences(run, changed)) == [
        "data_dir: None -> data",
        f"trainer.optimizer.learning_rate: {run.trainer.optimizer.learning_rate} -> 0.5",
        f"trainer.steps: {run.trainer.steps} -> 7",
    ]
