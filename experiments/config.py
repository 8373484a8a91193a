"""Configurations of runs: one frozen dataclass per task, checked here as a whole and kept as `config.json`.

The commands build their flags from these dataclasses. Nothing here starts a computation, so that impossible runs are
refused before the first compile.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import tyro

import models
from experiments.config_fields import differences, flatten, make, read_fields, words_of
from experiments.run_config import FolderRun, ObjectiveOptions, Run
from experiments.tasks.code.config import CodeConfig
from experiments.tasks.countdown import SPLITS, CharacterTokenizer, CountdownConfig, CountdownReward
from experiments.tasks.countdown.chat import ChatCountdownConfig, ChatCountdownTask
from experiments.tasks.countdown.task import CountdownTask
from experiments.tasks.guess import GuessConfig, GuessTask, GuessTokenizer
from experiments.tasks.mathematics.config import MathConfig
from experiments.tasks.prompts.config import PromptsConfig
from experiments.tasks.prompts.rewards import HandedOver, notation, parse_all
from experiments.tasks.reasoning_gym.config import ReasoningGymConfig
from experiments.tasks.reasoning_gym.text import GymTokenizer
from rspo_jax.hosts import say
from rspo_jax.records import FilePath, as_path
from rspo_jax.rollouts import ConversationConfig, SamplerConfig
from rspo_jax.training import (
    EvaluationConfig,
    OptimizerConfig,
    TrainerConfig,
    WarmStartConfig,
    check_learner,
)
from rspo_jax.types import Params, Task

if TYPE_CHECKING:
    from experiments.trained import Trained


@dataclass(frozen=True)
class CountdownRun(Run):
    """Train a small Mixture-of-Experts model on Countdown: reach a number by arithmetic on a few given ones."""

    task: CountdownConfig = CountdownConfig(train=12_000, validation=512, test=1_536)
    reward: CountdownReward = CountdownReward()
    model: Annotated[models.TransformerConfig, tyro.conf.AvoidSubcommands] = field(
        default_factory=lambda: models.TransformerConfig(vocab_size=CharacterTokenizer.vocabulary_size, expert_size=96)
    )
    objective: Annotated[ObjectiveOptions, tyro.conf.arg(name="")] = ObjectiveOptions()
    trainer: Annotated[TrainerConfig, tyro.conf.arg(name="")] = TrainerConfig(
        steps=90,
        prompts=192,
        group_size=8,
        learned_groups=64,
        sampler=SamplerConfig(max_new_tokens=12),
        optimizer=OptimizerConfig(learning_rate=1.25e-3),
        decay_learning_rate=True,
        warm_start=WarmStartConfig(steps=150, optimizer=OptimizerConfig(learning_rate=6e-3, warmup_updates=20)),
        # Evaluations draw 512 responses at a time, so two programs of the sampler serve all of them.
        evaluation=EvaluationConfig(every=15, problems=512),
    )
    data_dir: str | None = None
    """The folder of the data set; TensorFlow Datasets' own when absent."""
    start_from: str | None = None
    """The folder of a run of the same model: this run begins with its newest parameters, in place of a warm start."""

    def __post_init__(self) -> None:
        if self.start_from is not None and self.trainer.warm_start.steps:
            raise ValueError(f"a run that starts from {self.start_from} needs no warm start: set warm_start.steps to 0")
        self.task.check()
        self.reward.check()
        for split in SPLITS:
            if getattr(self.task, split) < 1:
                raise ValueError(
                    f"a run needs problems of every split, but task.{split} is {getattr(self.task, split)}"
                )
        if self.model.vocab_size != CharacterTokenizer.vocabulary_size:
            raise ValueError(
                f"model.vocab_size is {self.model.vocab_size}, but Countdown's tokenizer has "
                f"{CharacterTokenizer.vocabulary_size} tokens"
            )
        if self.trainer.evaluation.problems > self.task.validation:
            raise ValueError(
                f"evaluation.problems is {self.trainer.evaluation.problems}, but the validation split has only "
                f"{self.task.validation} (task.validation)"
            )
        check_learner(self.trainer, self.learner())

    def check(self) -> None:
        if self.start_from is None:
            return
        _, source = load_config(as_path(self.start_from) / "config.json")
        if source.architecture() != self.model:
            changes = "; ".join(differences(source.architecture(), self.model))
            raise ValueError(f"the run in {self.start_from} has another model ({changes}): give this run the same")

    def architecture(self) -> models.TransformerConfig:
        return self.model

    def build_task(self) -> CountdownTask:
        return CountdownTask(self.task, self.reward, self.data_dir)

    def load_params(self) -> Params | None:
        if self.start_from is None:
            return None
        from rspo_jax.training.restore import restore_params

        _, source = load_config(as_path(self.start_from) / "config.json")
        init_params = functools.partial(models.init_params, self.model)
        with_reference = source.learner().regularizers.needs_reference
        return restore_params(
            models.Transformer(self.model), init_params, source.trainer, self.start_from, with_reference
        ).params


@dataclass(frozen=True)
class GuessRun(Run):
    """Train a small Mixture-of-Experts model to guess a number with hints, in conversations of several turns."""

    task: GuessConfig = GuessConfig()
    model: Annotated[models.TransformerConfig, tyro.conf.AvoidSubcommands] = field(
        default_factory=lambda: models.TransformerConfig(vocab_size=GuessTokenizer.vocabulary_size, expert_size=96)
    )
    objective: Annotated[ObjectiveOptions, tyro.conf.arg(name="")] = ObjectiveOptions()
    trainer: Annotated[TrainerConfig, tyro.conf.arg(name="")] = TrainerConfig(
        steps=80,
        prompts=128,
        group_size=8,
        sampler=SamplerConfig(max_new_tokens=4),
        conversation=ConversationConfig(max_turns=4, max_tokens=34),
        optimizer=OptimizerConfig(learning_rate=5e-4),
        decay_learning_rate=True,
        warm_start=WarmStartConfig(steps=300, optimizer=OptimizerConfig(learning_rate=6e-3, warmup_updates=20)),
        evaluation=EvaluationConfig(problems=512),
    )

    def __post_init__(self) -> None:
        self.task.check()
        if self.model.vocab_size != GuessTokenizer.vocabulary_size:
            raise ValueError(
                f"model.vocab_size is {self.model.vocab_size}, but the tokenizer of the games has "
                f"{GuessTokenizer.vocabulary_size} tokens"
            )
        check_learner(self.trainer, self.learner())

    def architecture(self) -> models.TransformerConfig:
        return self.model

    def build_task(self) -> GuessTask:
        return GuessTask(self.task)


@dataclass(frozen=True)
class MathRun(FolderRun):
    """Train a model from a Hugging Face folder on mathematics, with rewards from a verifier of answers."""

    task: MathConfig = MathConfig()

    def check(self) -> None:
        super().check()
        self.task.check()

    def build_task(self) -> Task:
        from experiments.tasks.mathematics.task import MathTask

        return MathTask(self.task, self.tokenizer())


@dataclass(frozen=True)
class CodeRun(FolderRun):
    """Train a model from a Hugging Face folder on programming, with rewards from tests that run in a sandbox."""

    task: CodeConfig = CodeConfig()

    def check(self) -> None:
        super().check()
        self.task.check()

    def build_task(self) -> Task:
        from experiments.tasks.code.task import CodeTask

        return CodeTask(self.task, self.tokenizer())


@dataclass(frozen=True)
class PromptRun(FolderRun):
    """Train a model from a Hugging Face folder on prompts of your own, with rewards from functions of your own."""

    task: PromptsConfig = PromptsConfig()
    trainer: Annotated[TrainerConfig, tyro.conf.arg(name="")] = TrainerConfig(
        steps=200,
        prompts=16,
        group_size=8,
        max_prompt_tokens=1024,
        sampler=SamplerConfig(max_new_tokens=512),
        optimizer=OptimizerConfig(learning_rate=1e-6),
        warm_start=WarmStartConfig(steps=0),
        evaluation=EvaluationConfig(problems=100),
    )
    # For Python: `data` and `steps` are short for `task.data` and `trainer.steps`. `rewards` are functions, which are
    # called in this process, texts as on the command line, or pairs of either and a weight; a list of them, or one.
    data: InitVar[tyro.conf.Suppress[str | os.PathLike[str] | None]] = None
    rewards: InitVar[tyro.conf.Suppress[Sequence[Any] | None]] = None
    steps: InitVar[tyro.conf.Suppress[int | None]] = None

    def __post_init__(
        self, data: str | os.PathLike[str] | None, rewards: Sequence[Any] | None, steps: int | None
    ) -> None:
        changes: dict[str, Any] = {} if data is None else {"data": os.fspath(data)}
        if rewards is not None:
            names = tuple(map(notation, [rewards] if callable(rewards) or isinstance(rewards, str) else rewards))
            in_process = self.task.rewards_in_process or any(isinstance(name, HandedOver) for name in names)
            changes |= {"rewards": names, "rewards_in_process": in_process}
        if changes:
            object.__setattr__(self, "task", dataclasses.replace(self.task, **changes))
        if steps is not None:
            object.__setattr__(self, "trainer", dataclasses.replace(self.trainer, steps=steps))

    def check(self) -> None:
        super().check()
        self.task.check()

    def build_task(self) -> Task:
        from experiments.tasks.prompts.task import PromptsTask

        return PromptsTask(self.task, self.tokenizer())

    def sources(self) -> list[dict[str, Any]]:
        return [
            {"reward": one.name, "place": one.place, "weight": one.weight, "sha256": one.source_digest()}
            for one in parse_all(self.task.rewards)
        ]

    def train(self, run_dir: str | os.PathLike[str], resume: bool = False, trackers: Sequence[str] = ()) -> "Trained":
        """Train, as `python -m experiments.train prompts` does, and return the trained model.

        Args:
          run_dir: the folder of the run, absent or empty; or its address in a bucket.
          resume: if True, go on with the run in the folder, or start it.
          trackers: places to show the run in beside TensorBoard, such as "wandb" and "trackio".

        Raises:
          UserError: for a mistake that the caller can correct, before anything is compiled.
          Stopped: after SIGTERM or an interrupt, once the state is saved.
        """
        from experiments.trained import train_run

        return train_run(self, run_dir, resume, trackers)


@dataclass(frozen=True)
class ChatCountdownRun(FolderRun):
    """Train a chat model from a Hugging Face folder on Countdown, with answers between <answer> and </answer>."""

    task: ChatCountdownConfig = ChatCountdownConfig()
    trainer: Annotated[TrainerConfig, tyro.conf.arg(name="")] = TrainerConfig(
        steps=200,
        prompts=128,
        max_prompt_tokens=256,
        sampler=SamplerConfig(max_new_tokens=1024),
        optimizer=OptimizerConfig(learning_rate=1e-6),
        warm_start=WarmStartConfig(steps=0),
        evaluation=EvaluationConfig(problems=200),
    )

    def check(self) -> None:
        super().check()
        self.task.check()

    def build_task(self) -> Task:
        return ChatCountdownTask(self.task, self.tokenizer())


@dataclass(frozen=True)
class GymRun(FolderRun):
    """Train on data sets of the library reasoning-gym: the model of a Hugging Face folder, or a small one from scratch,
    which reads and writes characters."""

    task: ReasoningGymConfig = ReasoningGymConfig()
    model: str = ""
    """The folder of a chat model: config.json, *.safetensors and the tokenizer. When absent, the small model is trained
    from scratch. The other defaults of a run depend on this flag."""
    small_model: models.TransformerConfig = field(
        default_factory=lambda: models.TransformerConfig(vocab_size=GymTokenizer.vocabulary_size, expert_size=96)
    )
    """The small model, where no folder is named."""
    trainer: Annotated[TrainerConfig, tyro.conf.arg(name="")] = TrainerConfig(
        steps=150,
        prompts=128,
        group_size=8,
        max_prompt_tokens=512,
        sampler=SamplerConfig(max_new_tokens=32),
        optimizer=OptimizerConfig(learning_rate=1.5e-3),
        decay_learning_rate=True,
        warm_start=WarmStartConfig(steps=300, optimizer=OptimizerConfig(learning_rate=6e-3, warmup_updates=20)),
        evaluation=EvaluationConfig(problems=200),
    )

    @classmethod
    def default(cls, arguments: Sequence[str]) -> "GymRun":
        has_folder = any(argument == "--model" or argument.startswith("--model=") for argument in arguments)
        return cls(trainer=FolderRun().trainer) if has_folder else cls()

    def __post_init__(self) -> None:
        if self.small_model.vocab_size != GymTokenizer.vocabulary_size:
            raise ValueError(
                f"small_model.vocab_size is {self.small_model.vocab_size}, but the tokenizer of characters has "
                f"{GymTokenizer.vocabulary_size} tokens"
            )
        check_learner(self.trainer, self.learner())

    def check(self) -> None:
        if self.model:
            super().check()
        self.task.check()
        if self.trainer.evaluation.problems > self.task.validation:
            raise ValueError(
                f"evaluation.problems is {self.trainer.evaluation.problems}, but the validation split has only "
                f"{self.task.validation} (task.validation)"
            )

    def architecture(self) -> models.TransformerConfig:
        return super().architecture() if self.model else self.small_model

    def build_task(self) -> Task:
        from experiments.tasks.reasoning_gym.task import GymTask

        return GymTask(self.task, self.tokenizer() if self.model else GymTokenizer())

    def load_params(self) -> Params | None:
        return super().load_params() if self.model else None


RUNS: dict[str, type[Run]] = {
    "countdown": CountdownRun,
    "guess": GuessRun,
    "mathematics": MathRun,
    "code": CodeRun,
    "prompts": PromptRun,
    "countdown_chat": ChatCountdownRun,
    "reasoning_gym": GymRun,
}
"""Task name -> class of its runs. The commands' choices come from this table."""


FIELD_COUNT = "number_of_fields"
"""Entry of `config.json` that tells a file that has lost a field from one of a version that did not have the field."""


def save_config(path: FilePath, name: str, run: Run) -> None:
    """Write `config.json`."""
    from rspo_jax.records import write_json

    values = dataclasses.asdict(run)
    write_json(path, {"task_name": name, FIELD_COUNT: len(flatten(values))} | values)


def load_config(path: FilePath) -> tuple[str, Run]:
    """Read what `save_config` wrote: the task's name and the run.

    A field that the version which wrote the file did not have gets its default, and a sentence says so.

    Raises:
      ValueError: if the file is missing or is not such a config; if fields are unknown, of a wrong type, or lost since
        the file was written, all of which are named; or if the run is impossible.
    """
    path = as_path(path)
    if not path.exists():
        raise ValueError(f"{path.parent} is not the folder of a run: it has no {path.name}")
    try:
        values = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # from decoding, or from JSON
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it holds {words_of(values)}, not an object with fields")
    name, count = values.pop("task_name", None), values.pop(FIELD_COUNT, None)
    if not isinstance(name, str) or name not in RUNS:
        raise ValueError(f"{path} is for the unknown task {name!r}; known: {', '.join(RUNS)}")
    mistakes: list[str] = []
    missing: list[str] = []
    fields = read_fields(RUNS[name], values, "", mistakes, missing)
    if count is not None and (mistakes or count != len(flatten(values))):
        mistakes += [f"{field} is missing" for field in missing]
    if mistakes:
        raise ValueError(f"{path} is damaged: {'; '.join(mistakes)}")
    if missing:
        _say_once(f"{path} was written before there were {', '.join(missing)}: the run has their defaults")
    try:
        return name, make(RUNS[name], fields)
    except ValueError as error:
        raise ValueError(f"{path} holds an impossible run: {error}") from error


@functools.cache
def _say_once(sentence: str) -> None:
    """Print a sentence in the first process; a start reads a run's configuration several times."""
    say(sentence)
