"""The configs of the policy objectives: frozen dataclasses, each checked when it is made. Bounds and options only; this
file must never know a formula."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

POSITIONS = ("pre_clip", "post_clip", "post_clip_literal")
AGGREGATIONS = ("sequence_mean", "token_mean", "constant_length")
GAMMA_USES = ("weight", "mask")


@dataclass(frozen=True, kw_only=True)
class RouterShiftOptions:
    """Whether and how the router-shift ratio γ of each token enters an objective.

    By default γ̃ = sg[max(γ, gamma_min)] weights the token. Two ablations: as a mask, a token with γ < gamma_min is left
    out of the gradient, its ratio counts as 1, and all other tokens have weight 1; the denominators stay. Without the
    stop-gradient, the loss also pulls the router towards the old one, where γ is differentiable and above its floor.
    """

    gamma_min: float | None = None
    """The floor of γ, in (0, 1]; None leaves the router shift out."""
    gamma_use: str = "weight"
    """"weight", or "mask" (an ablation)."""
    gamma_gradient: bool = False
    """True lets the gradient flow through γ (an ablation: in the paper training collapses)."""

    def __post_init__(self) -> None:
        if self.gamma_min is not None and not 0 < self.gamma_min <= 1:
            raise ValueError(f"gamma_min must lie in (0, 1], got {self.gamma_min}; 1 switches the router shift off")
        _check_choice("gamma_use", self.gamma_use, GAMMA_USES)
        if self.gamma_gradient and self.gamma_use == "mask":
            raise ValueError("gamma_gradient needs gamma_use 'weight': a mask has no gradient")


@dataclass(frozen=True)
class GMPOConfig:
    """GMPO: the bounds −clip_low and clip_high apply to the log-ratio d of each token. GMPO with a router shift is
    RSPO, so there is no option for it here."""

    aggregation: ClassVar[str] = "sequence_mean"

    clip_low: float = 0.4
    clip_high: float = 0.4

    def __post_init__(self) -> None:
        _check_clip(self)


@dataclass(frozen=True)
class RSPOConfig(RouterShiftOptions):
    """RSPO: GMPO's bounds, the floor of γ, and where γ̃ enters.

    * `pre_clip`: c(d + log γ̃), the bounds see the weighted ratio (the paper's second version).
    * `post_clip`: c(d) + log γ̃, a drifted token always counts less (the first version's intent).
    * `post_clip_literal`: c(d) + sgn(A)·log γ̃, the first version as it is printed, with the bracket raised to the
      sign of A. It *raises* the weight of drifted tokens in bad responses: an ablation, not a recommendation.
    """

    aggregation: ClassVar[str] = "sequence_mean"

    gamma_min: float | None = 0.8
    """The floor of γ, in (0, 1]; None makes it GMPO."""
    clip_low: float = 0.4
    clip_high: float = 0.4
    position: str = "pre_clip"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_clip(self)
        _check_choice("position", self.position, POSITIONS)


@dataclass(frozen=True)
class GSPOConfig(RouterShiftOptions):
    """GSPO: the sequence ratio, router shift included, is clipped to [1 − clip_low, 1 + clip_high].

    With GSPO's own narrow bounds, a mean γ̃ below 1 − clip_low cuts every response with a negative advantage and none
    with a positive one: watch the clip fractions by sign.
    """

    aggregation: ClassVar[str] = "sequence_mean"

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_clip(self)


@dataclass(frozen=True)
class GSPOTokenConfig(GSPOConfig):
    """GSPO-token: GSPO's ratio without gradient, times a ratio of the token that is 1 and carries it."""


@dataclass(frozen=True)
class GRPOConfig(RouterShiftOptions):
    """GRPO and its family: each token's ratio, times γ̃ where there is a router shift, is clipped to
    [1 − clip_low, 1 + clip_high].

    What a batch gives is one of three means: `sequence_mean` over responses of the mean over their tokens,
    `token_mean` over all tokens, `constant_length` over responses of the sum over their tokens, divided by one length.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregation: str = "sequence_mean"
    constant_length: int | None = None
    """Tokens that `constant_length` divides by; the T of the arrays when absent. Set it if T changes within a run."""
    dual_clip: float | None = None
    """For A < 0 the ratio also counts as no more than this; 3 is usual, None leaves it out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_clip(self)
        _check_choice("aggregation", self.aggregation, AGGREGATIONS)
        if self.constant_length is not None and self.constant_length < 1:
            raise ValueError(f"constant_length must be at least 1, got {self.constant_length}")
        if self.constant_length is not None and self.aggregation != "constant_length":
            raise ValueError(f"constant_length needs aggregation 'constant_length', got {self.aggregation!r}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip bounds the ratio of bad responses and must exceed 1, got {self.dual_clip}")


@dataclass(frozen=True)
class DrGRPOConfig(GRPOConfig):
    """Dr. GRPO (arXiv 2503.20783): advantages without the standard deviation, token sums over one constant length."""

    aggregation: str = "constant_length"


@dataclass(frozen=True)
class DAPOConfig(GRPOConfig):
    """DAPO (arXiv 2503.14476): the upper bound is wider, all tokens count alike. Its dynamic sampling and its overlong
    penalty are the trainer's business."""

    clip_high: float = 0.28
    aggregation: str = "token_mean"


@dataclass(frozen=True)
class RLOOConfig(GRPOConfig):
    """RLOO (arXiv 2402.14740): leave-one-out advantages, under the PPO clip and token mean that make several updates of
    one rollout possible. On-policy the clip does nothing."""

    aggregation: str = "token_mean"


@dataclass(frozen=True)
class ReinforcePPConfig(GRPOConfig):
    """REINFORCE++ (arXiv 2501.03262): advantages normalised over the whole batch, PPO clip, token mean."""

    aggregation: str = "token_mean"


@dataclass(frozen=True)
class CISPOConfig(RouterShiftOptions):
    """CISPO (arXiv 2506.13585): the ratio, as a weight without gradient, is clipped to [1 − clip_low, 1 + clip_high].

    An absolute cap of c on the ratio is clip_high = c − 1: 4 for TRL's 5.
    """

    aggregation: ClassVar[str] = "token_mean"

    clip_low: float | None = None
    """None for no lower bound, as in the paper's own runs."""
    clip_high: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_clip(self)


@dataclass(frozen=True)
class SAPOConfig(RouterShiftOptions):
    """SAPO (arXiv 2511.20347): a smooth gate of temperature τ instead of a clip; a larger τ falls off faster."""

    aggregation: ClassVar[str] = "sequence_mean"

    tau_positive: float = 1.0
    """For A > 0."""
    tau_negative: float = 1.05
    """For A ≤ 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tau_positive", "tau_negative"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


def _check_clip(config: Any) -> None:
    for name in ("clip_low", "clip_high"):
        bound = getattr(config, name)
        if bound is not None and not bound >= 0:
            raise ValueError(f"{name} must be 0 or more, got {bound}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
