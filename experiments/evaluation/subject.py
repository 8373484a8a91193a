"""What is evaluated: a model with its parameters on the mesh, and the task that it answers.

Whatever the model comes from, the rest of an evaluation sees a `Subject` and nothing else. This file must never know
how responses are drawn or counted.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import tyro
from etils import epath

import models
from experiments.config import Place, load_config
from experiments.tasks.code.config import CodeConfig
from experiments.tasks.mathematics.config import MathConfig
from experiments.tasks.mathematics.problems import SETS
from experiments.text import ChatConfig, HuggingFaceTokenizer
from rspo_jax.sharding import MeshConfig
from rspo_jax.training import sampling_params
from rspo_jax.training.restore import restore_params
from rspo_jax.types import Params, Policy, Task


@runtime_checkable
class Votes(Protocol):
    """What a task offers besides `rspo_jax.types.Task` if its answers can be put to a vote (maj@k)."""

    def answers(self, problems: Sequence[Any], responses: Sequence[str]) -> list[str | None]:
        """The answer that each response gives, so written that answers which mean the same are equal; None where a
        response gives none."""
        ...


def _math_task(name: str, source: "Source", tokenizer: HuggingFaceTokenizer) -> Task:
    from experiments.tasks.mathematics.task import MathTask

    return MathTask(MathConfig(name=name, test_path=source.problems), tokenizer)


def _code_task(name: str, source: "Source", tokenizer: HuggingFaceTokenizer) -> Task:
    from experiments.tasks.code.task import CodeTask

    del name
    return CodeTask(CodeConfig(source.run_untrusted_code, test_path=source.problems), tokenizer)


FOLDER_TASKS: dict[str, Callable[[str, "Source", HuggingFaceTokenizer], Task]] = {
    **dict.fromkeys(SETS, _math_task),
    "code": _code_task,
}
"""What a model of a Hugging Face folder can be asked to solve."""
DEFAULT_MAX_NEW_TOKENS = 3072


@dataclass(frozen=True)
class Source:
    """Where the model is, and what it is to solve."""

    run_dir: Annotated[Place | None, tyro.conf.Positional] = None
    """The folder of a run, or its address in a bucket. It knows its task, and its newest checkpoint is taken."""
    model: Path | None = None
    """Instead of a run: a Hugging Face folder with config.json, *.safetensors and a tokenizer."""
    task: Annotated[str | None, tyro.conf.arg(metavar="{" + ",".join(FOLDER_TASKS) + "}")] = None
    """What the model is to solve."""
    problems: str | None = None
    """The file of the problems, a JSON object a line. Only gsm8k can do without, through TensorFlow Datasets."""
    chat: ChatConfig = ChatConfig()
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the model's activations and parameters; what the folder's weights are in when absent."""
    max_prompt_tokens: int | None = None
    """Problems of --task with longer prompts are left out and counted."""
    run_untrusted_code: bool = False
    """For the task code: read docs/code_rewards.md first."""

    def __post_init__(self) -> None:
        if self.run_dir is not None and self.model is None and self.task is None:
            return
        if self.run_dir is None and self.model is not None and self.task is not None:
            if self.task not in FOLDER_TASKS:
                raise ValueError(f"unknown task {self.task!r}; choose one of {', '.join(FOLDER_TASKS)}")
            return
        raise ValueError("name what to evaluate: either the folder of a run, or --model FOLDER and --task TASK")


@dataclass(frozen=True)
class Subject:
    """A model and its task."""

    title: str
    """Names both, for a reader."""
    identity: dict[str, Any]
    """The same for two subjects only if they draw the same responses; as JSON has it."""
    policy: Policy
    params: Params
    """As the sampler wants them, on the mesh in use."""
    task: Task
    max_new_tokens: int
    """Where nothing else is asked for."""
    max_prompt_tokens: int | None
    """Problems with longer prompts are left out."""
    home: epath.Path
    """Its evaluations go into folders in here."""


def open_subject(source: Source, mesh: MeshConfig) -> Subject:
    """Loads what is named, for the mesh in use (`jax.set_mesh`), which is made from `mesh`.

    Raises:
      ValueError: if what is named is not there, or does not fit the mesh.
      CheckpointError: if all checkpoints of a run are damaged.
    """
    return _open_folder(source, mesh) if source.run_dir is None else _open_run(source.run_dir, mesh)


def _open_run(run_dir: epath.Path, mesh: MeshConfig) -> Subject:
    name, run = load_config(run_dir / "config.json")
    run.check()
    config, model = dataclasses.replace(run.trainer, mesh=mesh), run.architecture()
    policy = models.Transformer(model)
    init_params, regularizers = functools.partial(models.init_params, model), run.learner().regularizers
    restored = restore_params(policy, init_params, config, run_dir, regularizers.needs_reference)
    return Subject(
        title=f"{run_dir}, step {restored.step}",
        identity={"run": _absolute(run_dir), "checkpoint": restored.index, "task_name": name},
        policy=policy,
        params=sampling_params(policy, restored.params, config),
        task=run.build_task(),
        max_new_tokens=config.sampler.max_new_tokens,
        max_prompt_tokens=config.max_prompt_tokens,
        home=run_dir / "evaluations" / f"step-{restored.step}",
    )


def _open_folder(source: Source, mesh: MeshConfig) -> Subject:
    assert source.model is not None and source.task is not None
    tokenizer = HuggingFaceTokenizer(source.model, source.chat)
    task = FOLDER_TASKS[source.task](source.task, source, tokenizer)
    config = models.load_config_hf(source.model, source.dtype)
    tokenizer.check_model(config.vocab_size)
    config, params = models.load_hf(source.model, config.dtype, config.dtype, rules=mesh.sampling_rules)
    files = sorted(source.model.glob("*.safetensors"))
    return Subject(
        title=f"{source.model}, {source.task}",
        identity={
            "model": os.path.realpath(source.model),
            "files": {path.name: path.stat().st_size for path in files},
            "dtype": config.dtype,
            "task_name": source.task,
        },
        policy=models.Transformer(config),
        params=params,
        task=task,
        max_new_tokens=_max_new_tokens(source.model),
        max_prompt_tokens=source.max_prompt_tokens,
        home=epath.Path("evaluations") / f"{source.model.resolve().name}-{source.task}",
    )


def _max_new_tokens(folder: Path) -> int:
    """What the folder's authors generate at most, if they say so."""
    path = folder / "generation_config.json"
    said = json.loads(path.read_text()) if path.is_file() else {}
    return said.get("max_new_tokens") or DEFAULT_MAX_NEW_TOKENS


def _absolute(path: epath.Path) -> str:
    text = os.fspath(path)
    return text if "://" in text else os.path.realpath(text)
