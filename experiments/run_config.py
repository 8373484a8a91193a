"""What the configurations of all runs share: the objective's options, the base classes, and the type of places.

Nothing here starts a computation, so that impossible runs are refused before the first compile.
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from etils import epath

import models
from experiments.text import ChatConfig, HuggingFaceTokenizer
from models.config import Dtype, Remat
from rspo_jax.objectives import OBJECTIVES, Aggregation, CorrectionConfig, GammaUse, Position, RegularizerConfig
from rspo_jax.records import as_path
from rspo_jax.rollouts import SamplerConfig
from rspo_jax.routing import AdaptiveShiftConfig, LayerAggregation, Routing
from rspo_jax.training import (
    EvaluationConfig,
    LearnerConfig,
    OptimizerConfig,
    TrainerConfig,
    WarmStartConfig,
)
from rspo_jax.types import Params, Task

Place = Annotated[
    epath.Path,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda texts: as_path(texts[0]),
        is_instance=lambda value: isinstance(value, epath.Path),
        str_from_instance=lambda path: [os.fspath(path)],
    ),
]
"""A folder, or an address that starts with gs://."""
if TYPE_CHECKING:
    ObjectiveName = str
else:
    ObjectiveName = Literal[*OBJECTIVES]  # the choices of the flag come from the one table


@dataclass(frozen=True)
class ObjectiveOptions:
    """The objective, and changes to its defaults. An option that the objective does not have is refused."""

    objective: ObjectiveName = "rspo"
    """The loss; docs/objectives.md compares them."""
    gamma_min: float | None = None
    """Floor of the router-shift ratio; switches the router shift on in objectives that leave it out by default."""
    gamma_use: GammaUse | None = None
    """The router-shift ratio as a weight, or as a mask (an ablation)."""
    gamma_gradient: bool | None = None
    """Let the gradient flow through the router-shift ratio (an ablation)."""
    clip_low: float | None = None
    """Width of the clip range below."""
    clip_high: float | None = None
    """Width of the clip range above."""
    dual_clip: float | None = None
    """Bound of the ratio of bad responses; 3 is usual."""
    position: Position | None = None
    """The place at which γ enters RSPO: before the clip or after it."""
    aggregation: Aggregation | None = None
    """The mean over a batch in GRPO and its family."""
    constant_length: int | None = None
    """Number of tokens that the aggregation constant_length divides by."""
    tau_positive: float | None = None
    """SAPO's temperature for good responses."""
    tau_negative: float | None = None
    """SAPO's temperature for other responses."""
    layer_aggregation: LayerAggregation = "mean"
    """Aggregation of the router shift over layers."""
    routing: Routing = "free"
    """Treatment of the routers: none (free), no updates (frozen), the old policy's choice and scores (copy), its choice
    alone (replay_trainer), or the sampler's choice (replay_sampler)."""
    regularizers: RegularizerConfig = RegularizerConfig()
    adaptive_shift: AdaptiveShiftConfig = AdaptiveShiftConfig()
    correction: CorrectionConfig = CorrectionConfig()
    diagnostics: bool = True
    """Record the distributions of routes, experts and ratios: arrays of each step in diagnostics.jsonl."""
    micro_batches: int = 1
    """Parts that a mini-batch is cut into to save memory."""
    row_length: int | None = None
    """Tokens of a row that responses are packed into; the length of the longest possible sequence when absent."""
    route_on_host: bool = False
    """Keep the old route in the host's memory between scoring and update."""

    def __post_init__(self) -> None:
        self.config()

    def config(self) -> Any:
        """Return the objective's own config.

        Raises:
          ValueError: if the objective is unknown or does not have a given option.
        """
        if self.objective not in OBJECTIVES:
            raise ValueError(f"unknown objective {self.objective!r}; choose one of {', '.join(OBJECTIVES)}")
        config_type = OBJECTIVES[self.objective].config_type
        known = {option.name for option in dataclasses.fields(config_type)}
        of_any = {option.name for row in OBJECTIVES.values() for option in dataclasses.fields(row.config_type)}
        options = {}
        for name in [option.name for option in dataclasses.fields(self) if option.name in of_any]:
            value = getattr(self, name)
            if value is not None and name not in known:
                raise ValueError(f"{self.objective} has no option {name}; it has {', '.join(sorted(known))}")
            if value is not None:
                options[name] = value
        return config_type(**options)


@dataclass(frozen=True)
class Run:
    """A run of any task. The classes of the tasks add fields and set their own defaults."""

    objective: Annotated[ObjectiveOptions, tyro.conf.arg(name="")] = ObjectiveOptions()
    trainer: Annotated[TrainerConfig, tyro.conf.arg(name="")] = TrainerConfig()

    @classmethod
    def default(cls, arguments: Sequence[str]) -> "Run":
        """Return the run that the flags of a new run change; it may depend on which of them are given."""
        return cls()

    def check(self) -> None:
        """Raise ValueError if a setting without a default is missing, or a file shows that the run is impossible."""

    def architecture(self) -> models.TransformerConfig:
        """Return the model's configuration."""
        raise NotImplementedError

    def build_task(self) -> Task:
        """Return the problems and their judge."""
        raise NotImplementedError

    def load_params(self) -> Params | None:
        """Return parameters to start from, on the mesh in use; None for fresh ones."""
        return None

    def sources(self) -> list[dict[str, Any]]:
        """Return what the run is rewarded by and its configuration does not hold: objects for `rewards.json`."""
        return []

    def learner(self) -> LearnerConfig:
        """Return the part of the settings that an update needs."""
        return LearnerConfig(
            objective=self.objective.objective,
            objective_config=self.objective.config(),
            layer_aggregation=self.objective.layer_aggregation,
            routing=self.objective.routing,
            regularizers=self.objective.regularizers,
            correction=self.objective.correction,
            adaptive_shift=self.objective.adaptive_shift,
            diagnostics=self.objective.diagnostics,
            temperature=self.trainer.sampler.temperature,
            micro_batches=self.objective.micro_batches,
            row_length=self.objective.row_length,
            route_on_host=self.objective.route_on_host,
        )


@dataclass(frozen=True)
class FolderRun(Run):
    """A run that starts from a model in a Hugging Face folder, and reads and writes with its tokenizer."""

    model: str = ""
    """The folder: config.json, *.safetensors and the tokenizer. It must stay in place for the whole run. Every process
    reads it, so all hosts must see it."""
    chat: ChatConfig = ChatConfig()
    dtype: Dtype | None = None
    """dtype of activations; that of the folder's weights when absent."""
    param_dtype: Dtype = "float32"
    """dtype of parameters and optimizer state."""
    remat: Remat = "full"
    """Activations that the backward pass computes again."""
    trainer: Annotated[TrainerConfig, tyro.conf.arg(name="")] = TrainerConfig(
        steps=200,
        prompts=128,
        max_prompt_tokens=1024,
        sampler=SamplerConfig(max_new_tokens=3072),
        optimizer=OptimizerConfig(learning_rate=1e-6),
        warm_start=WarmStartConfig(steps=0),
        evaluation=EvaluationConfig(problems=200),
    )

    def check(self) -> None:
        if not self.model:
            raise ValueError("a run needs a model to start from: name its Hugging Face folder with --model")
        self.tokenizer().check_model(self.architecture().vocab_size)

    def architecture(self) -> models.TransformerConfig:
        return dataclasses.replace(
            models.load_config_hf(self.model, self.dtype, self.param_dtype),
            remat=self.remat,
        )

    def tokenizer(self) -> HuggingFaceTokenizer:
        """Read the folder's tokenizer."""
        return HuggingFaceTokenizer(self.model, self.chat)

    def load_params(self) -> Params | None:
        rules = self.trainer.mesh.parameter_rules
        return models.load_hf(self.model, self.dtype, self.param_dtype, rules=rules)[1]
