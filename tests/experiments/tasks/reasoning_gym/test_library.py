"""The task with the library itself, which `make reasoning-gym` installs: every data set, and runs of both kinds."""

import importlib.util
import json
import shutil
import subprocess
import sys

import jax
import pytest
from support.commands import TIMINGS
from support.folders import write_model

from experiments.evaluate import main as evaluate
from experiments.tasks.reasoning_gym.config import ReasoningGymConfig
from experiments.tasks.reasoning_gym.task import GymTask
from experiments.train import main as train
from rspo_jax.records import read_metrics
from rspo_jax.types import Judgement

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed"),
]
WITHOUT_ANSWERS = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
RIGHT = Judgement(1.0, True)
# Names, and those of verifiers that evaluate what a model wrote, from their source.
QUESTION = """
import inspect, json, re, warnings
warnings.simplefilter("ignore")
from reasoning_gym.factory import DATASETS
sources = {name: inspect.getsource(row[0].score_answer) for name, row in DATASETS.items() if name != "composite"}
kinds = {
    "eval": [name for name, source in sources.items() if re.search(r"[^_a-z.]eval\\(answer", source)],
    "sympy": [name for name, source in sources.items() if re.search(r"parse_expr\\(answer", source)],
}
print(json.dumps({"all": sorted(sources)} | kinds))
"""


@pytest.fixture(scope="module")
def names():
    asked = subprocess.run([sys.executable, "-c", QUESTION], capture_output=True, text=True, check=True)
    return json.loads(asked.stdout)


@pytest.fixture(autouse=True)
def promotion_as_optax_needs_it():
    """Optax multiplies Python floats with int32 counts, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class AnyText:
    """A tokenizer for all texts, with a chat format."""

    pad_id, eos_id, stop_ids, vocabulary_size = 0, 1, (1,), 2**21

    def encode(self, text):
        return [2 + ord(character) for character in text]

    def decode(self, ids):
        return "".join(chr(one - 2) for one in ids if one > 1)

    def chat(self, messages):
        return "\n".join(message["content"] for message in messages)


def test_every_data_set_can_be_drawn_from_asked_and_answered(names):
    """Problems are the same in other processes and in another order, and the library's own answer is right."""
    assert len(names["all"]) >= 105
    config = ReasoningGymConfig(tuple(names["all"]), time_limit=60.0, wall_limit=500.0)
    task, again = GymTask(config, AnyText()), GymTask(config, AnyText())
    wanted = [(name, 10_000 + number) for number in range(3) for name in names["all"]]
    problems = task._make(wanted)
    assert None not in problems
    assert again._make(wanted[::-1])[::-1] == problems
    answered = [problem for problem in problems if problem.answer is not None]
    assert {problem.name for problem in problems} - {problem.name for problem in answered} == WITHOUT_ANSWERS
    judged = task.judge(answered, [task.solution(problem) for problem in answered])
    wrong = {problem.name for problem, verdict in zip(answered, judged, strict=True) if verdict != RIGHT}
    assert not wrong
    assert all(task.prompt(problem).endswith(problem.question) for problem in problems)
    # Nothing that is no answer is right, and no verifier hangs on it.
    for text in ("", "no idea", "<answer></answer>", "<answer>42</answer>", "<answer>" + "[" * 5000 + "</answer>"):
        assert sum(verdict.correct for verdict in task.judge(problems, [text] * len(problems))) < 20


def test_the_verifiers_that_evaluate_answers_are_known(names):
    asked = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            "from experiments.tasks.reasoning_gym import library; import json;"
            "print(json.dumps([sorted(library.BY_EVAL), sorted(library.BY_SYMPY)]))",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(asked.stdout) == [sorted(names["eval"]), sorted(names["sympy"])]


MIXTURE = ["chain_sum:2", "spell_backward", "gcd", "letter_counting"]
TINY = ("--steps", 2, "--prompts", 4, "--group-size", 2, "--task.validation", 8, "--task.test", 8)
TINY += ("--evaluation.problems", 8, "--task.workers", 2)


def call(command, *arguments):
    return command([str(argument) for argument in arguments])


def rows_of(run_dir):
    return [{name: row[name] for name in row if name not in TIMINGS} for row in read_metrics(run_dir)]


def test_a_small_model_from_scratch_goes_on_bit_for_bit(tmp_path, capsys):
    small = ("--warm-start.steps", 2, "--warm-start.batch-size", 4, "--sampler.max-new-tokens", 8)
    small += ("--max-prompt-tokens", 160, "--small-model.num-layers", 1, "--small-model.hidden-size", 32)
    flags = ("reasoning_gym", "--task.datasets", *MIXTURE, *TINY, *small, "--checkpoint.every", 1)
    assert call(train, *flags, "--run-dir", tmp_path / "straight") == 0
    # The run as it was after its first step.
    shutil.copytree(tmp_path / "straight", tmp_path / "stopped")
    newest = max((tmp_path / "stopped" / "checkpoints").iterdir(), key=lambda path: int(path.name))
    shutil.rmtree(newest)
    assert call(train, "reasoning_gym", "--run-dir", tmp_path / "stopped", "--resume") == 0
    assert rows_of(tmp_path / "stopped") == rows_of(tmp_path / "straight")
    capsys.readouterr()
    assert call(evaluate, tmp_path / "straight", "--samples", 1) == 0
    shown = capsys.readouterr().out
    assert all(entry.partition(":")[0] in shown for entry in MIXTURE)


def test_a_chat_folder_is_trained_and_evaluated(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_model(tmp_path / "model")
    flags = ("reasoning_gym", "--model", folder, "--task.datasets", *MIXTURE, *TINY)
    assert call(train, *flags, "--sampler.max-new-tokens", 4, "--run-dir", tmp_path / "run") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["trainer"]["optimizer"]["learning_rate"] == 1e-6 and config["trainer"]["warm_start"]["steps"] == 0
    capsys.readouterr()
    sets = ("--datasets", "countdown", "word_sorting", "--difficulty", "word_sorting.max_words=3")
    flags = ("--model", folder, "--task", "reasoning_gym", *sets, "--limit", 6, "--samples", 1, "--max-new-tokens", 4)
    assert call(evaluate, *flags) == 0
    shown = capsys.readouterr().out
    assert "countdown" in shown and "word_sorting" in shown
