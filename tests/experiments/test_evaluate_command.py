"""The command `python -m experiments.evaluate`: its output and files for a model that knows all answers by heart,
interrupted evaluations, and mistakes. The run is made here from a config and a checkpoint, without training."""

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import hf_cases
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

import models
from experiments import evaluate
from experiments.config import CountdownRun, save_config
from experiments.evaluation.progress import EvaluationProgress
from experiments.tasks.countdown import CharacterTokenizer, CountdownConfig
from experiments.tasks.countdown.task import CountdownTask
from rspo_jax.records.checkpoint import Checkpoints
from rspo_jax.rollouts import SamplerConfig
from rspo_jax.training import EvaluationConfig, TrainerConfig
from rspo_jax.training.state import fresh_state
from rspo_jax.types import Judgement

RESPONSE = 6
NAME_ONE = "name what to evaluate: either the folder of a run, or --model FOLDER and --task TASK"


def make_run(data_dir):
    """Return a run with four test problems of two numbers each, whose solutions have at most five characters."""
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
            evaluation=EvaluationConfig(problems=4),
        ),
        data_dir=str(data_dir),
    )


def memorise(run, problems):
    """Return the state of a run at step 7 whose model answers each problem with its own solution.

    All parameters are random but the head, which is solved for: at each place of each solution the next token's logit
    is 9, all others are 0. This takes no training, as there are fewer places than hidden dimensions.
    """
    init_params = functools.partial(models.init_params, run.model)
    shapes = jax.eval_shape(functools.partial(fresh_state, init_params, run.trainer))
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(0, 0.5, leaf.shape).astype(leaf.dtype), state.train.params)
    task = run.build_task()
    encode, eos = task.tokenizer.encode, task.tokenizer.eos_id
    texts = [(encode(task.prompt(problem)), [*encode(task.solution(problem)), eos]) for problem in problems]
    tokens = np.zeros((len(texts), max(len(prompt + solution) for prompt, solution in texts)), np.int32)
    for row, (prompt, solution) in enumerate(texts):
        tokens[row, : len(prompt + solution)] = prompt + solution
    hidden = jax.jit(models.Transformer(run.model).apply)({"params": params}, tokens).hidden
    places, nexts = [], []
    for row, (prompt, solution) in enumerate(texts):
        places += [(row, len(prompt) + at - 1) for at in range(len(solution))]
        nexts += solution
    features = np.stack([hidden[place] for place in places]).astype(np.float64)
    wanted = 9.0 * np.eye(run.model.vocab_size)[nexts]
    head, _, rank, _ = np.linalg.lstsq(features, wanted)
    assert rank == len(places) <= run.model.hidden_size
    params["head"] = head.astype(np.float32)
    return state._replace(train=state.train._replace(params=params), step=np.int32(7))


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """The folder of a run, and the four problems that its model knows."""
    folder = tmp_path_factory.mktemp("taught")
    run = make_run(folder / "data")
    problems = run.build_task().problems("test")
    run_dir = folder / "run"
    run_dir.mkdir()
    save_config(run_dir / "config.json", "countdown", run)
    with Checkpoints(run_dir / "checkpoints") as checkpoints:
        checkpoints.save(7, jax.tree.map(jnp.asarray, memorise(run, problems)), {"elapsed_seconds": 1.0})
    return run_dir, problems


def call(capsys, *arguments):
    try:
        code = evaluate.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = exit.code
    return code, capsys.readouterr()


def cells(output, start):
    """Return the numbers in the line of the table that starts with these words."""
    (line,) = (line for line in output.splitlines() if re.match(rf"\W*{re.escape(start)}", line))
    return [float(number) for number in re.findall(r"\d+\.\d+", line)]


def read(output):
    """Return the responses of an evaluation by problem and sample, and its summary without the speed."""
    lines = [json.loads(line) for line in (output / "responses.jsonl").read_text().splitlines()]
    summary = json.loads((output / "summary.json").read_text())
    del summary["throughput"]
    responses = {(line["problem"], line["sample"]): line for line in lines}
    assert len(responses) == len(lines)
    return responses, summary


@pytest.fixture(autouse=True)
def a_wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


BATCHES = ("--samples", 2, "--batch", 3, "--temperature", 1.5)
"""Three batches, the last of two responses."""


@pytest.fixture(scope="module")
def evaluated(taught, tmp_path_factory):
    """The folder of an evaluation that was not interrupted."""
    output = tmp_path_factory.mktemp("evaluated") / "whole"
    assert evaluate.main([str(argument) for argument in (taught[0], *BATCHES, "--output", output)]) == 0
    return output


def test_the_table_and_the_solutions(taught, capsys):
    run_dir, problems = taught
    code, captured = call(capsys, run_dir, "--temperature", 0, "--show", 3)
    assert (code, captured.err) == (0, "")
    assert "step 7: 4 test problems, greedy" in captured.out
    # Wilson's interval of 4 of 4 begins at 4 / (4 + z²).
    assert cells(captured.out, "│ pass@1 = avg@1") == [100.0, 51.0, 100.0]
    assert cells(captured.out, "│ cut off") == [0.0, 0.0, 49.0]
    assert cells(captured.out, "│ reward") == [1.0]  # and nothing is known of other rewards
    lengths = [len(problem.solution) + 1 for problem in problems]  # with the stop token
    assert cells(captured.out, "│ tokens of a response")[0] == pytest.approx(np.mean(lengths), abs=0.051)
    assert f"longest {max(lengths)}, mean of right ones" in captured.out
    assert "mean of wrong ones" not in captured.out
    assert re.search(r"4 responses drawn and judged: [\d,]+ tokens/s, [\d,.]+ responses/s, compilation", captured.out)
    shown = [line for line in captured.out.splitlines() if line.endswith(("right", "wrong"))]
    prompts = [f"{','.join(map(str, problem.numbers))}={problem.target}:" for problem in problems]
    assert shown == [
        f"{prompt} {problem.solution}   right" for prompt, problem in zip(prompts[:3], problems, strict=False)
    ]


def test_what_is_kept(taught, evaluated):
    run_dir, problems = taught
    task = make_run(run_dir.parent / "data").build_task()
    responses, summary = read(evaluated)
    assert sorted(responses) == [(problem, sample) for problem in range(4) for sample in range(2)]
    for line in responses.values():
        (judgement,) = task.judge([problems[line["problem"]]], [line["text"]])
        assert line["correct"] == (judgement.correct and not line["truncated"])
        assert line["answer"] is None
    right = np.array([[responses[problem, sample]["correct"] for sample in range(2)] for problem in range(4)])
    estimates = summary["estimates"]
    assert estimates["pass@1"]["value"] == estimates["avg@2"]["value"] == right.mean()
    assert estimates["pass@2"]["value"] == right.any(axis=1).mean()
    assert estimates["response_tokens"]["value"] == np.mean([line["tokens"] for line in responses.values()])
    assert estimates["truncated"]["value"] == np.mean([line["truncated"] for line in responses.values()])
    assert all(entry["low"] <= entry["value"] <= entry["high"] for entry in estimates.values() if entry["high"])
    assert not any(name.startswith("maj") for name in estimates)
    assert (summary["problems"], summary["samples"]) == (4, 2)
    assert summary["settings"] == json.loads((evaluated / "settings.json").read_text())
    assert (summary["settings"]["split"], summary["settings"]["sampler"]["temperature"]) == ("test", 1.5)
    assert json.loads((evaluated / "summary.json").read_text())["throughput"]["tokens_per_second"] > 0


@pytest.mark.parametrize("lines", [0.5, 3, 4.7, 7.2])
def test_an_interrupted_evaluation_goes_on_as_if_it_had_not_been(taught, evaluated, tmp_path, capsys, lines):
    """The evaluation was killed after this number of lines, the last of which was written in part."""
    shutil.copytree(evaluated, tmp_path / "cut")
    (tmp_path / "cut" / "summary.json").unlink()
    content = (tmp_path / "cut" / "responses.jsonl").read_bytes().splitlines(keepends=True)
    whole, part = int(lines), content[int(lines)]
    kept = b"".join(content[:whole]) + part[: int(len(part) * (lines - whole))]
    (tmp_path / "cut" / "responses.jsonl").write_bytes(kept)
    code, captured = call(capsys, taught[0], *BATCHES, "--output", tmp_path / "cut")
    assert code == 0
    assert f"{8 - whole} responses drawn and judged" in captured.out
    assert (tmp_path / "cut" / "responses.jsonl").read_bytes().startswith(b"".join(content[:whole]))
    assert read(tmp_path / "cut") == read(evaluated)


def test_a_second_time_nothing_is_drawn(taught, evaluated, capsys):
    before = {file.name: file.read_bytes() for file in evaluated.iterdir()}
    code, captured = call(capsys, taught[0], *BATCHES, "--output", evaluated)
    assert (code, captured.err) == (0, "")
    assert "all responses were there already" in captured.out
    assert {file.name: file.read_bytes() for file in evaluated.iterdir()} == before


def test_more_samples_and_fewer_problems(taught, evaluated, tmp_path, capsys):
    shutil.copytree(evaluated, tmp_path / "more")
    arguments = [*BATCHES, "--output", tmp_path / "more", "--samples", 3]
    code, captured = call(capsys, taught[0], *arguments)
    assert code == 0
    assert "4 responses drawn and judged" in captured.out
    responses, summary = read(tmp_path / "more")
    before = read(evaluated)[0]
    assert {place: responses[place] for place in before} == before
    assert (len(responses), summary["samples"]) == (12, 3)
    code, captured = call(capsys, taught[0], *arguments, "--limit", 2)
    assert code == 0
    assert "2 test problems, 3 samples" in captured.out and "there already" in captured.out
    assert read(tmp_path / "more")[1]["problems"] == 2


def test_ctrl_c_says_how_to_go_on(taught, evaluated, tmp_path, capsys, monkeypatch):
    def interrupted(progress, responses):
        raise KeyboardInterrupt

    output = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(EvaluationProgress, "update", interrupted)
        code, captured = call(capsys, taught[0], *BATCHES, "--output", output)
    assert code == 130
    assert f"stopped: 3 responses are in {output}; the same command continues" in captured.out
    assert call(capsys, taught[0], *BATCHES, "--output", output)[0] == 0
    assert read(output) == read(evaluated)


def test_a_folder_for_each_of_its_settings(taught, capsys):
    run_dir, _ = taught
    folders = []
    for split, temperature in (("test", 0), ("validation", 0)):
        code, captured = call(capsys, run_dir, "--split", split, "--temperature", temperature, "--show", 0)
        assert code == 0
        assert not captured.out.rstrip().endswith(("right", "wrong"))
        folders.append(Path(re.search(r"summary: (.*)/summary.json", captured.out)[1]))
        assert folders[-1].parent == run_dir / "evaluations" / "step-7"
        assert folders[-1].name.startswith(f"{split}-")
    assert folders[0] != folders[1]


def test_votes_where_the_task_has_answers(taught, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(CountdownTask, "answers", lambda _, problems, responses: list(responses), raising=False)
    code, captured = call(capsys, taught[0], *BATCHES, "--output", tmp_path / "votes")
    assert code == 0
    (row,) = (line for line in captured.out.splitlines() if "maj@2" in line)
    assert "%" in row
    responses, summary = read(tmp_path / "votes")
    assert all(line["answer"] == (None if line["truncated"] else line["text"]) for line in responses.values())
    assert summary["estimates"]["answered"]["value"] == 1 - summary["estimates"]["truncated"]["value"]


def test_another_checkpoint_under_the_same_number(taught, tmp_path, capsys):
    """The first model knows all answers, the second ends every response at once."""
    run_dir, output = tmp_path / "run", tmp_path / "output"
    shutil.copytree(taught[0], run_dir, ignore=shutil.ignore_patterns("evaluations"))
    arguments = (run_dir, "--temperature", 0, "--show", 0, "--output", output)
    assert cells(call(capsys, *arguments)[1].out, "│ pass@1 = avg@1")[0] == 100.0
    known = (output / "responses.jsonl").read_bytes()
    run = make_run(taught[0].parent / "data")
    state = fresh_state(functools.partial(models.init_params, run.model), run.trainer)
    params = state.train.params | {"head": jnp.zeros_like(state.train.params["head"])}
    shutil.rmtree(run_dir / "checkpoints")
    with Checkpoints(run_dir / "checkpoints") as checkpoints:
        state = state._replace(train=state.train._replace(params=params), step=jnp.int32(7))
        checkpoints.save(7, state, {"elapsed_seconds": 1.0})
    code, captured = call(capsys, *arguments)
    assert code == 0
    assert re.match(
        rf"the responses in {output} were drawn with other contents \(contents.weights: \w{{8}}… -> \w{{8}}…\): "
        rf"they were moved to {output}/earlier-1, and responses are drawn again\n",
        captured.out,
    )
    assert "4 responses drawn and judged" in captured.out
    assert cells(captured.out, "│ pass@1 = avg@1")[0] == 0.0
    assert (output / "earlier-1" / "responses.jsonl").read_bytes() == known
    assert json.loads((output / "earlier-1" / "summary.json").read_text())["estimates"]["pass@1"]["value"] == 1.0
    # Without --output, responses of other weights lie in another folder.
    (where,) = {
        Path(re.search(r"summary: (.*)/summary.json", call(capsys, *arguments[:-2])[1].out)[1]) for _ in range(2)
    }
    shutil.rmtree(run_dir / "checkpoints")
    shutil.copytree(taught[0] / "checkpoints", run_dir / "checkpoints")
    code, captured = call(capsys, *arguments[:-2])
    assert captured.out.startswith(f"the responses in {where} were drawn with other contents (contents.weights: ")
    assert "it stays as it is, and responses are drawn again" in captured.out
    assert cells(captured.out, "│ pass@1 = avg@1")[0] == 100.0


def test_another_judge_judges_the_stored_responses(taught, evaluated, tmp_path, capsys, monkeypatch):
    shutil.copytree(evaluated, tmp_path / "judged")
    before = read(evaluated)[0]
    monkeypatch.setattr(
        CountdownTask, "judge", lambda self, problems, responses: [Judgement(0.5, True) for _ in responses]
    )
    monkeypatch.setattr("experiments.evaluate.draw_missing", lambda *arguments: None)  # nothing may be drawn
    code, captured = call(capsys, taught[0], *BATCHES, "--output", tmp_path / "judged")
    assert code == 0
    assert captured.out.startswith(
        "8 responses are judged again, because references or judge have changed (judge.source: "
    )
    after, summary = read(tmp_path / "judged")
    assert {place: line["text"] for place, line in after.items()} == {
        place: line["text"] for place, line in before.items()
    }
    assert all(line["correct"] == (line["reward"] == 0.5) == (not line["truncated"]) for line in after.values())
    right_before, right = (sum(line["correct"] for line in lines.values()) for lines in (before, after))
    changed = sum(after[place] != before[place] for place in before)
    assert (
        f"{changed} verdicts have changed: {right_before} responses were right before, {right} are now" in captured.out
    )
    assert summary["estimates"]["pass@1"]["value"] == right / 8
    code, captured = call(capsys, taught[0], *BATCHES, "--output", tmp_path / "judged")
    assert "judged again" not in captured.out and "there already" in captured.out


def write_model(folder, seed):
    """Write the folder of a tiny Qwen3 with random weights, and a tokenizer of single bytes with a chat template."""
    config = dataclasses.replace(models.load_config_hf(hf_cases.GOLDEN / "qwen3"), vocab_size=257)
    params = models.init_params(config, jax.random.key(seed))
    models.save_hf(folder, config, params)
    vocabulary = {token: index for index, token in enumerate(["<|end|>", *sorted(ByteLevel.alphabet())])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "chat_template": "Q: {{ messages[-1].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_folder_whose_files_are_replaced(tmp_path, capsys, monkeypatch):
    """Weights of the same size and time, then the template, then a reference: what depends on each is made again."""
    monkeypatch.chdir(tmp_path)
    folder, problems, output = write_model(tmp_path / "model", 0), tmp_path / "problems.jsonl", tmp_path / "output"
    rows = [{"problem": f"{one}+1?", "answer": str(one + 1), "solution": "Add."} for one in range(2)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def evaluated_again():
        flags = ("--samples", 2, "--max-new-tokens", 4, "--show", 0, "--output", output)
        code, captured = call(capsys, "--model", folder, "--task", "math500", "--problems", problems, *flags)
        assert (code, captured.err) == (0, "")
        return captured.out

    def plant(path, content):
        before = path.stat()
        assert len(content) == before.st_size
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert "4 responses drawn and judged" in evaluated_again()
    first = read(output)
    assert "all responses were there already" in evaluated_again()
    assert read(output) == first

    other = write_model(tmp_path / "other", 1)
    plant(folder / "model.safetensors", (other / "model.safetensors").read_bytes())
    said = evaluated_again()
    assert "(contents.weights: " in said and "4 responses drawn and judged" in said
    assert {line["text"] for line in read(output)[0].values()} != {line["text"] for line in first[0].values()}

    template = folder / "tokenizer_config.json"
    plant(template, template.read_bytes().replace(b"Q: ", b"P: "))
    said = evaluated_again()
    assert "(contents.prompts: " in said and "contents.tokenizer.files: " in said
    assert "4 responses drawn and judged" in said
    assert sorted(path.name for path in output.glob("earlier-*")) == ["earlier-1", "earlier-2"]

    # All stored responses answer 7, which becomes right with the reference.
    lines = [json.loads(line) | {"truncated": False, "text": "\\boxed{7}"} for line in lines_of(output)]
    (output / "responses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    problems.write_text(problems.read_text().replace('"answer": "2"', '"answer": "7"'))
    said = evaluated_again()
    assert "4 responses are judged again" in said and "(judge.references: " in said
    assert "0 responses were right before, 2 are now" in said and "all responses were there already" in said
    assert {place: line["correct"] for place, line in read(output)[0].items()} == {
        (problem, sample): problem == 1 for problem in range(2) for sample in range(2)
    }


def lines_of(output):
    return (output / "responses.jsonl").read_text().splitlines()


def test_other_settings_than_those_of_the_folder(taught, evaluated, capsys):
    before = (evaluated / "responses.jsonl").read_bytes()
    code, captured = call(capsys, taught[0], *BATCHES, "--seed", 4, "--top-p", 0.5, "--output", evaluated)
    assert (code, captured.out) == (2, "")
    assert captured.err == (
        f"error: {evaluated} holds an evaluation with other settings (sampler.top_p: 1.0 -> 0.5; seed: 0 -> 4): "
        "choose another --output\n"
    )
    assert (evaluated / "responses.jsonl").read_bytes() == before


def test_the_folder_of_the_run_is_no_output(taught, capsys):
    code, captured = call(capsys, taught[0], "--output", taught[0])
    assert (code, captured.out) == (2, "")
    assert captured.err == f"error: {taught[0]} is not empty and holds no evaluation: choose another --output\n"


@pytest.mark.slow
def test_four_devices_draw_what_one_draws(taught, evaluated, tmp_path):
    output = tmp_path / "mesh"
    command = [sys.executable, "-m", "experiments.evaluate", taught[0], *BATCHES, "--output", output]
    command += ["--mesh.fsdp", 2, "--mesh.expert", 2]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    subprocess.run([str(word) for word in command], env=environment, check=True, stdout=subprocess.DEVNULL)
    assert {place: line["text"] for place, line in read(output)[0].items()} == {
        place: line["text"] for place, line in read(evaluated)[0].items()
    }


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
        (["--samples", 0], "samples must be at least 1, got 0"),
        (["--limit", 0], "limit must be at least 1, got 0"),
        (["--batch", -2], "batch must be at least 1, got -2"),
        (["--show", -1], "show and seed must be 0 or more, got -1 and 0"),
        (["--seed", -1], "show and seed must be 0 or more, got 6 and -1"),
        (["--temperature", 0, "--samples", 2], "at temperature 0 all 2 samples would be alike: leave --samples out"),
        (["--temperature", -1], "temperature must be 0 (greedy) or positive, got -1.0"),
        (["--top-p", 0], "top_p must lie in (0, 1], got 0.0"),
        (["--max-new-tokens", 0], "max_new_tokens must be at least 1, got 0"),
        (["--mesh.fsdp", 3], "the mesh {'data': 1, 'fsdp': 3,"),
        (
            ["--model", "elsewhere"],
            "name what to evaluate: either the folder of a run, or --model FOLDER and --task TASK",
        ),
        (["--task", "math500"], NAME_ONE),
        (["--judge-after", "x"], "a run has its own problems and judge: --judge-after is for --task"),
        (["--problems", "x", "--prompt-field", "y"], "a run has its own problems and judge: --problems is for --task"),
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
    for flag in ("PATH", "--model", "--task", "--split", "--samples", "--temperature", "--output", "--mesh.fsdp"):
        assert flag in captured.out
    for arguments in ([], ["--model", "elsewhere"], ["--task", "math500"]):
        code, captured = call(capsys, *arguments)
        assert (code, captured.out) == (2, "")
        assert NAME_ONE in " ".join(captured.err.split())
