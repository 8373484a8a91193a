"""The pages about rewards, tasks and loops of one's own: their files are written and their programs run, in little."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import jax
import pytest
from support.folders import write_model

import experiments
from experiments import evaluate, export, train
from experiments.errors import MISTAKE
from rspo_jax.records import read_metrics
from rspo_jax.rollouts import SamplerConfig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"prompts": 4, "group_size": 4, "mini_batches": 2, "sampler": SamplerConfig(max_new_tokens=6)}
FLAGS = "--steps 1 --prompts 4 --group-size 4 --mini-batches 2 --sampler.max-new-tokens 6 --task.workers 1"


def blocks_of(page, language):
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [code for found, code in blocks if found == language]


@pytest.fixture(autouse=True)
def promotion_as_optax_needs_it():
    """Optax multiplies Python floats with int32 counts, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder: a tiny model, and a data file that begins as the page shows it."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "folder")
    (shown,) = blocks_of("docs/own_reward.md", "json")
    more = [{"prompt": f"What is {number} + 1?", "answer": str(number + 1)} for number in range(6)]
    (tmp_path / "prompts.jsonl").write_text(shown + "".join(json.dumps(row) + "\n" for row in more))
    return tmp_path


def test_your_own_reward(place, capsys):
    rewards, program = blocks_of("docs/own_reward.md", "py")
    assert rewards.startswith("# rewards.py\n")
    assert program.startswith(blocks_of("README.md", "py")[0])
    (place / "rewards.py").write_text(rewards)
    (commands,) = (block for block in blocks_of("docs/own_reward.md", "") if "experiments.train" in block)
    trained, evaluated, exported = (shlex.split(line, comments=True)[3:] for line in commands.splitlines())
    assert train.main([*trained, *FLAGS.split()]) == 0
    row = read_metrics(place / "runs" / "mine")[-1]
    assert {"rewards/correct/mean", "rewards/brief/std", "rewards/brief/none", "rewards/correct/failed"} <= set(row)
    assert row["rewards/brief/mean"] < 0 and row["unjudged"] == 0
    expected = row["rewards/correct/mean"] + 0.2 * row["rewards/brief/mean"]
    assert row["reward"] == pytest.approx(expected, abs=1e-6)
    assert evaluate.main([*evaluated, "--samples", "1"]) == 0
    assert export.main(exported) == 0 and (place / "out" / "tokenizer.json").exists()
    # Another source, or another weight, is another reward.
    (place / "rewards.py").write_text(rewards.replace("/ 100", "/ 50"))
    again = [*trained, *FLAGS.split(), "--resume"]
    capsys.readouterr()
    assert train.main(again) == MISTAKE
    assert "the source of the reward correct is not the one that it was started with" in capsys.readouterr().err
    (place / "rewards.py").write_text(rewards)
    assert train.main([word.replace("@0.2", "@0.3") for word in again]) == MISTAKE
    assert "the weight of the reward brief was 0.2, and is 0.3 now" in capsys.readouterr().err
    assert train.main(again) == 0

    # The same in Python, elsewhere.
    small = "steps=1, trainer=dataclasses.replace(PromptRun().trainer, **{**SMALL})"
    program = program.replace("steps=200", small).replace("runs/mine", "runs/python").replace('"out"', '"out2"')
    names = {"dataclasses": dataclasses, "SMALL": SMALL, "__name__": "__main__"}
    exec(compile(program, "own_reward.md", "exec"), names)
    assert (place / "out2" / "model.safetensors").exists()
    kept = json.loads((place / "runs" / "python" / "rewards.json").read_text())
    assert [(one["reward"], one["place"]) for one in kept] == [("correct", "python")]
    resumed = names["run"].train("runs/python", resume=True)
    assert resumed.summary["final_reward"] == names["trained"].summary["final_reward"]
    with pytest.raises(train.UserError, match="is not empty: add --resume"):
        names["run"].train("runs/python")


def test_your_own_task_and_your_own_loop(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for number, program in enumerate(blocks_of("docs/own_task.md", "py")):
        exec(compile(program, f"own_task.md, program {number}", "exec"), names)
    said = capsys.readouterr().out
    assert "step 2: reward " in said and "updates 4" in said
    assert read_metrics(tmp_path / "runs" / "backwards")[-1]["step"] == 4


def test_importing_experiments_imports_no_trainer():
    assert experiments.__all__ == ["PromptRun"]
    with pytest.raises(AttributeError, match="has no attribute 'Run'"):
        experiments.Run  # noqa: B018
