"""The subject of an evaluation: a model with its parameters on the mesh, and the task that it answers.

The rest of an evaluation sees only a `Subject`, whether the model comes from a run or from a Hugging Face folder.
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
from experiments.config import FolderRun, load_config
from experiments.evaluation.identity import FileDigests, list_files, stamps_of
from experiments.run_config import Place
from experiments.tasks.code.config import CodeConfig
from experiments.tasks.countdown.chat import ChatCountdownConfig, ChatCountdownTask
from experiments.tasks.mathematics.config import MathConfig
from experiments.tasks.mathematics.problems import SETS
from experiments.tasks.reasoning_gym.config import ReasoningGymConfig
from experiments.text import ChatConfig, HuggingFaceTokenizer
from models.hugging_face.reading import list_tensors
from rspo_jax.rollouts import ConversationConfig
from rspo_jax.sharding import MeshConfig
from rspo_jax.training import sampling_params
from rspo_jax.training.restore import restore_params
from rspo_jax.types import Params, Policy, Task


@runtime_checkable
class Votes(Protocol):
    """A task whose answers can be put to a vote (maj@k), besides being a `rspo_jax.types.Task`."""

    def answers(self, problems: Sequence[Any], responses: Sequence[str]) -> list[str | None]:
        """Return the answer of each response, in a form in which answers of the same meaning are equal; None if a
        response gives no answer."""
        ...


def _math_task(name: str, source: "Source", tokenizer: HuggingFaceTokenizer) -> Task:
    from experiments.tasks.mathematics.task import MathTask

    config = MathConfig(
        name=name,
        prompt_field=source.prompt_field,
        answer_field=source.answer_field or ("answer" if name == "mathematics" else None),
        test_path=source.problems,
        judge_after=source.judge_after,
        **source.texts(),
    )
    return MathTask(config, tokenizer)


def _code_task(name: str, source: "Source", tokenizer: HuggingFaceTokenizer) -> Task:
    from experiments.tasks.code.task import CodeTask

    del name
    config = CodeConfig(
        source.run_untrusted_code,
        test_path=source.problems,
        prompt_field=source.prompt_field,
        checkers=source.checkers,
        judge_after=source.judge_after,
        **source.texts(),
    )
    return CodeTask(config, tokenizer)


def _countdown_task(name: str, source: "Source", tokenizer: HuggingFaceTokenizer) -> Task:
    del name
    config = ChatCountdownConfig(test_path=source.problems, judge_after=source.judge_after, **source.texts())
    return ChatCountdownTask(config, tokenizer)


def _gym_task(name: str, source: "Source", tokenizer: HuggingFaceTokenizer) -> Task:
    from experiments.tasks.reasoning_gym.task import GymTask

    del name
    for flag in ("problems", "prompt_field", "answer_field", "prompt", "judge_after"):
        if getattr(source, flag):
            flag = flag.replace("_", "-")
            raise ValueError(f"problems and judge of reasoning_gym come from its library: leave --{flag} out")
    config = ReasoningGymConfig(source.datasets, source.difficulty)
    return GymTask(config if source.system is None else dataclasses.replace(config, system=source.system), tokenizer)


FOLDER_TASKS: dict[str, Callable[[str, "Source", HuggingFaceTokenizer], Task]] = {
    **dict.fromkeys((*SETS, "mathematics"), _math_task),
    "code": _code_task,
    "countdown_chat": _countdown_task,
    "reasoning_gym": _gym_task,
}
"""Tasks for a model from a Hugging Face folder: name -> function that makes the task."""
DEFAULT_MAX_NEW_TOKENS = 3072
HOME, DIGESTS_FILE = "evaluations", "digests.json"
"""The folder of evaluations in that of a run, or in the current one for a model, and the cache of digests in it."""


@dataclass(frozen=True)
class Source:
    """The model to evaluate, and the task to solve."""

    run_dir: Annotated[Place | None, tyro.conf.Positional] = None
    """The folder of a run, or its address in a bucket. The task is the run's, and the newest checkpoint is used."""
    model: Path | None = None
    """Instead of a run: a Hugging Face folder with config.json, *.safetensors and a tokenizer."""
    task: Annotated[str | None, tyro.conf.arg(metavar="{" + ",".join(FOLDER_TASKS) + "}")] = None
    """The task that the model is to solve."""
    problems: str | None = None
    """The file or folder of the problems, in any format of docs/data.md. Only gsm8k works without, through TensorFlow
    Datasets, and countdown_chat, which generates them."""
    prompt_field: str | None = None
    """The field of the prompts in files of another layout than that of --task; "prompt", or else "messages", where
    --task is mathematics."""
    answer_field: str | None = None
    """The field of the right answer in such files, or of a list of answers any of which is right; "answer" where --task
    is mathematics."""
    prompt: str | None = None
    """The user's message, with {problem} in place of the problem; that of --task by default."""
    system: str | None = None
    """The system message of all prompts; that of --task by default."""
    datasets: tuple[str, ...] = ()
    """The data sets of the task reasoning_gym, each NAME or NAME:WEIGHT."""
    difficulty: tuple[str, ...] = ()
    """Their difficulty, as in training: level=1, NAME.level=1, NAME.ATTRIBUTE.level=1 or NAME.OPTION=VALUE."""
    chat: ChatConfig = ChatConfig()
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the model's activations and parameters; that of the folder's weights by default."""
    max_prompt_tokens: int | None = None
    """Longest prompt in tokens. Problems of --task with longer prompts are left out and counted."""
    judge_after: str = ""
    """Judge only what follows the last occurrence of this text in a response to --task, such as "</think>"; a response
    without it is wrong, and counted."""
    checkers: str | None = None
    """The file of the checkers that problems of the task code name."""
    run_untrusted_code: bool = False
    """Allow the task code to run the responses: read docs/code_rewards.md first."""

    def __post_init__(self) -> None:
        if self.run_dir is not None:
            texts = ("judge_after", "problems", "prompt_field", "answer_field", "prompt", "system")
            for name in (*texts, "datasets", "difficulty"):
                if getattr(self, name):
                    flag = f"--{name.replace('_', '-')}"
                    raise ValueError(f"a run has its own problems and judge: {flag} is for --task, so leave it out")
        if self.run_dir is not None and self.model is None and self.task is None:
            return
        if self.run_dir is None and self.model is not None and self.task is not None:
            if self.task not in FOLDER_TASKS:
                raise ValueError(f"unknown task {self.task!r}; choose one of {', '.join(FOLDER_TASKS)}")
            return
        raise ValueError("name what to evaluate: either the folder of a run, or --model FOLDER and --task TASK")

    def texts(self) -> dict[str, Any]:
        """Return the texts around a problem that are given, by the names that they have in the settings of a task."""
        given = {"prompt": self.prompt, "system": self.system}
        return {name: text for name, text in given.items() if text is not None}


@dataclass(frozen=True)
class Subject:
    """A model and its task."""

    title: str
    """Name of model and task for a reader."""
    contents: dict[str, Any]
    """Digests and settings that are equal for two subjects only if both answer a prompt alike; for JSON."""
    policy: Policy
    params: Params
    """Parameters in the form that the sampler needs, on the mesh in use."""
    task: Task
    max_new_tokens: int
    """Longest response in tokens unless the flags set one."""
    max_prompt_tokens: int | None
    """Longest prompt in tokens; problems with longer prompts are left out."""
    home: epath.Path
    """The folder that holds the folders of its evaluations."""
    conversation: ConversationConfig = ConversationConfig()
    """Limits of conversations, for a task of several turns."""


def open_subject(source: Source, mesh: MeshConfig) -> Subject:
    """Load a model and its task, for the mesh in use (`jax.set_mesh`).

    Args:
      source: the model and the task.
      mesh: the configuration from which the mesh in use was made.

    Raises:
      ValueError: if the source does not exist, does not fit the mesh, or changes while it is read.
      CheckpointError: if all checkpoints of a run are damaged.
    """
    return _open_folder(source, mesh) if source.run_dir is None else _open_run(source.run_dir, mesh)


def _open_run(run_dir: epath.Path, mesh: MeshConfig) -> Subject:
    _, run = load_config(run_dir / "config.json")
    run.check()
    config, model = dataclasses.replace(run.trainer, mesh=mesh), run.architecture()
    policy = models.Transformer(model)
    init_params, regularizers = functools.partial(models.init_params, model), run.learner().regularizers
    tokenizer_files = _tokenizer_files(epath.Path(run.model)) if isinstance(run, FolderRun) and run.model else {}
    seen = stamps_of(list_files(run_dir / "checkpoints")) | stamps_of(tokenizer_files)
    task = run.build_task()
    restored = restore_params(policy, init_params, config, run_dir, regularizers.needs_reference)
    digests = FileDigests(run_dir / HOME / DIGESTS_FILE)
    weights = digests.of(list_files(run_dir / "checkpoints" / str(restored.index)), seen)
    return Subject(
        title=f"{run_dir}, step {restored.step}",
        contents=_contents(weights, model, task, digests.of(tokenizer_files, seen)),
        policy=policy,
        params=sampling_params(policy, restored.params, config),
        task=task,
        max_new_tokens=config.sampler.max_new_tokens,
        max_prompt_tokens=config.max_prompt_tokens,
        home=run_dir / HOME / f"step-{restored.step}",
        conversation=config.conversation,
    )


def _open_folder(source: Source, mesh: MeshConfig) -> Subject:
    assert source.model is not None and source.task is not None
    folder = epath.Path(source.model)
    tokenizer_files = _tokenizer_files(folder)
    seen = stamps_of(tokenizer_files)
    tokenizer = HuggingFaceTokenizer(source.model, source.chat)
    task = FOLDER_TASKS[source.task](source.task, source, tokenizer)
    config = models.load_config_hf(source.model, source.dtype)
    tokenizer.check_model(config.vocab_size)
    weight_files = {tensor.file.name: epath.Path(tensor.file) for tensor in list_tensors(folder).values()}
    seen |= stamps_of(weight_files)
    config, params = models.load_hf(source.model, config.dtype, config.dtype, rules=mesh.sampling_rules)
    digests = FileDigests(epath.Path(HOME) / DIGESTS_FILE)
    weights = digests.of(weight_files, seen)
    # The longest response that the folder's authors generate, if they name one.
    path = source.model / "generation_config.json"
    generation = json.loads(path.read_text()) if path.is_file() else {}
    return Subject(
        title=f"{source.model}, {source.task}",
        contents=_contents(weights, config, task, digests.of(tokenizer_files, seen)),
        policy=models.Transformer(config),
        params=params,
        task=task,
        max_new_tokens=generation.get("max_new_tokens") or DEFAULT_MAX_NEW_TOKENS,
        max_prompt_tokens=source.max_prompt_tokens,
        home=epath.Path(HOME) / f"{source.model.resolve().name}-{source.task}",
    )


def _tokenizer_files(folder: epath.Path) -> dict[str, epath.Path]:
    """Return the files that turn a conversation into tokens and tokens into text, by name."""
    patterns = ("*token*.json", "chat_template*", "additional_chat_templates/*")
    paths = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
    return {os.fspath(path.relative_to(folder)): path for path in paths}


def _contents(weights: str, model: models.TransformerConfig, task: Task, tokenizer_files: str) -> dict[str, Any]:
    architecture = dataclasses.asdict(model)
    del architecture["remat"]  # which changes nothing but the backward pass
    ends = {name: list(getattr(task.tokenizer, name, ())) for name in ("stop_ids", "stop_strings")}
    tokenizer = {"files": tokenizer_files, "pad_id": task.tokenizer.pad_id} | ends
    return {"weights": weights, "model": architecture, "tokenizer": tokenizer}
