"""Configurations of runs: mistakes that are refused before anything is computed, and round trips of `config.json`."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

import models
from experiments.config import (
    RUNS,
    CodeRun,
    CountdownRun,
    GuessRun,
    MathRun,
    ObjectiveOptions,
    PromptRun,
    differences,
    flatten,
    load_config,
    save_config,
)
from experiments.tasks.code.config import CodeConfig
from experiments.tasks.code.sandbox import Limits
from experiments.tasks.countdown import CharacterTokenizer, CountdownConfig, CountdownReward
from experiments.tasks.mathematics.config import MathConfig
from experiments.tasks.prompts.config import PromptsConfig
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
        mask_truncated=True,
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
    assert {
        "countdown": CountdownRun,
        "guess": GuessRun,
        "mathematics": MathRun,
        "code": CodeRun,
        "prompts": PromptRun,
    }.items() <= RUNS.items()
    assert all(run_type().learner().objective == "rspo" for run_type in RUNS.values())


def some_reward(completions, **_):
    return [1.0] * len(completions)


def test_a_run_of_prompts_in_python(tmp_path):
    """What is given in short is in the fields, also after a change of others and in `config.json`."""
    run = PromptRun(model="folder", data=Path("data.jsonl"), rewards=[some_reward, ("a.py:f", 0.2)], steps=7)
    assert (run.task.data, run.trainer.steps, run.task.rewards_in_process) == ("data.jsonl", 7, True)
    assert run.task.rewards == (f"{__name__}:some_reward", "a.py:f@0.2")
    changed = dataclasses.replace(run, dtype="bfloat16")
    assert changed.task == run.task and changed.task.rewards[0].function is some_reward
    assert [one["reward"] for one in PromptRun(rewards=some_reward).sources()] == ["some_reward"]
    save_config(tmp_path / "config.json", "prompts", run)
    assert load_config(tmp_path / "config.json") == ("prompts", run)
    named = PromptRun(model="folder", task=PromptsConfig(data="data.jsonl", rewards=("a.py:f",)))
    assert named == PromptRun(model="folder", data="data.jsonl", rewards="a.py:f") and not named.task.rewards_in_process
    with pytest.raises(ValueError, match="name its Hugging Face folder"):
        PromptRun(data="data.jsonl").check()


@pytest.mark.parametrize("run_type", [MathRun, CodeRun, PromptRun])
def test_a_run_from_a_folder_needs_one(run_type, tmp_path):
    with pytest.raises(ValueError, match="name its Hugging Face folder with --model"):
        run_type().check()
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        run_type(model=str(tmp_path)).check()


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("countdown", CountdownRun()),
        ("countdown", OTHER_RUN),
        ("guess", GuessRun()),
        ("mathematics", MATH_RUN),
        ("code", CODE_RUN),
    ],
)
def test_there_and_back(tmp_path, name, run):
    path = tmp_path / "config.json"
    save_config(path, name, run)
    assert load_config(path) == (name, run)
    content = json.loads(path.read_text())
    assert content["task_name"] == name
    assert set(content) == {"task_name", "number_of_fields"} | {field.name for field in dataclasses.fields(run)}


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


def test_a_field_of_a_later_version_gets_its_default_and_that_is_said(saved, capsys):
    path, edit = saved

    def as_written_before(content):
        del content["trainer"]["learned_groups"], content["number_of_fields"]

    edit(as_written_before)
    sentence = f"{path} was written before there were trainer.learned_groups: the run has their defaults\n"
    for _ in range(2):
        _, run = load_config(path)
        changes = dataclasses.replace(OTHER_RUN.trainer, learned_groups=None)
        assert run == dataclasses.replace(OTHER_RUN, trainer=changes)
    assert capsys.readouterr().out == sentence  # once
    # A file that has as many fields as were written has lost none.
    edit(lambda content: content.update(number_of_fields=len(flatten(content)) - len(["task_name"])))
    assert load_config(path)[1] == run


@pytest.mark.parametrize("field", ["trainer.seed", "trainer.optimizer", "trainer", "objective.objective", "data_dir"])
def test_a_field_that_was_lost_is_named(saved, field):
    path, edit = saved
    *outer, name = field.split(".")

    def lose(content):
        for key in outer:
            content = content[key]
        del content[name]

    edit(lose)
    with pytest.raises(ValueError, match=rf"{path} is damaged: {field} is missing$"):
        load_config(path)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("trainer.seed", "3", 'trainer.seed is "3", not int'),
        ("trainer.seed", True, "trainer.seed is true, not int"),
        ("trainer.seed", None, "trainer.seed is null, not int"),
        ("trainer.steps", 1.5, "trainer.steps is 1.5, not int"),
        ("trainer.steps", [150], "trainer.steps is [150], not int"),
        ("trainer.optimizer.learning_rate", "1e-3", 'trainer.optimizer.learning_rate is "1e-3", not float'),
        ("trainer.decay_learning_rate", 1, "trainer.decay_learning_rate is 1, not bool"),
        ("trainer.decay_learning_rate", "false", 'trainer.decay_learning_rate is "false", not bool'),
        ("trainer.mesh.rules", "embed=fsdp", 'trainer.mesh.rules is "embed=fsdp", not tuple'),
        ("trainer.mesh.rules", [1], "trainer.mesh.rules is [1], not tuple"),
        ("trainer.optimizer", None, "trainer.optimizer is null, not an object with fields"),
        ("trainer", [], "trainer is [], not an object with fields"),
        ("model", "small", 'model is "small", not an object with fields'),
        ("model.latent", 3, "model.latent is 3, not an object with fields"),
        ("data_dir", 7, "data_dir is 7, not str | None"),
        ("data_dir", {"a": 1}, 'data_dir is {"a": 1}, not str | None'),
        ("objective.objective", "ppo", 'objective.objective is "ppo", not Literal['),
        ("objective.clip_low", False, "objective.clip_low is false, not float | None"),
        ("objective.routing", ["free"], 'objective.routing is ["free"], not Literal['),
    ],
    ids=str,
)
def test_a_field_of_a_wrong_type_is_named(saved, field, value, words):
    path, edit = saved
    *outer, name = field.split(".")

    def change(content):
        for key in outer:
            content = content[key]
        content[name] = value

    edit(change)
    with pytest.raises(ValueError, match=re.escape(f"{path} is damaged: {words}")):
        load_config(path)


def test_all_mistakes_are_named_at_once(saved):
    path, edit = saved

    def change(content):
        content["trainer"].update(seed="a", steps=None)
        del content["trainer"]["prompts"]
        content["speed"] = 1

    edit(change)
    with pytest.raises(ValueError) as refusal:
        load_config(path)
    assert str(refusal.value) == (
        f'{path} is damaged: speed is an unknown field; trainer.steps is null, not int; trainer.seed is "a", not int; '
        "trainer.prompts is missing"
    )


def test_an_integer_is_a_float(saved):
    path, edit = saved
    edit(lambda content: content["trainer"]["optimizer"].update(learning_rate=1))
    assert load_config(path)[1].trainer.optimizer.learning_rate == 1


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} is not the folder of a run: it has no config.json"):
        load_config(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("task_name"), "unknown task None; known: countdown"),
        (lambda content: content.update(task_name="chess"), "unknown task 'chess'; known: countdown"),
        (lambda content: content.update(task_name=["countdown"]), r"unknown task \['countdown'\]"),
        (lambda content: content.update(speed=1), "config.json is damaged: speed is an unknown field"),
        (
            lambda content: content["trainer"].update(speed=1),
            "config.json is damaged: trainer.speed is an unknown",
        ),
        (lambda content: content["trainer"]["optimizer"].update(m=1), "trainer.optimizer.m is an unknown field"),
        (lambda content: content["trainer"].update(steps=-1), "config.json holds an impossible run: steps must be 0"),
    ],
)
def test_contents_that_are_refused(saved, change, message):
    path, edit = saved
    edit(change)
    with pytest.raises(ValueError, match=message):
        load_config(path)


@pytest.mark.parametrize(
    "text",
    [b"", b'{"task_name": "countdown", "tra', b"[1, 2]", b"null", b'"countdown"', b"\xff\xfe{", b"[" * 100_000],
    ids=lambda text: text[:8],
)
def test_a_file_that_holds_no_run_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text)
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
