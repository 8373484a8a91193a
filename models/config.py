"""The shape of a model, as one frozen dataclass that is checked when it is made.

Whatever distinguishes one family of models from another is a field here. The transformer reads nothing else.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from models.experts import Activation
from models.rope import RopeScaling
from rspo_jax.types import check_choice

Remat = Literal["none", "dots", "full"]
Dtype = Literal["float32", "bfloat16"]
DTYPES = get_args(Dtype)
Router = Literal["softmax", "sigmoid"]
AttentionBias = Literal["none", "qkv", "all"]
QueryKeyNorm = Literal["none", "head", "projection"]


@dataclass(frozen=True)
class LatentAttention:
    """Sizes of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    Keys and values are made from one small vector per token. Positions rotate only a part of each head, and all heads
    share that part of the keys.
    """

    kv_rank: int
    """Size of the vector that keys and values are made from."""
    plain_dim: int
    """Size of the part of a query or key head that is not rotated."""
    rotary_dim: int
    """Size of the part that is rotated; even."""
    value_dim: int
    """Head size of the values."""
    query_rank: int = 0
    """Size of the vector that queries are made from; 0: they are made from the hidden state directly."""

    def __post_init__(self) -> None:
        for name in ("kv_rank", "plain_dim", "rotary_dim", "value_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"latent.{name} must be at least 1, got {getattr(self, name)}")
        if self.rotary_dim % 2:
            raise ValueError(f"latent.rotary_dim must be even, got {self.rotary_dim}")
        if self.query_rank < 0:
            raise ValueError(f"latent.query_rank must be 0 or more, got {self.query_rank}")


class Stack(NamedTuple):
    """Consecutive layers of one kind. Their parameters are stacked on a leading axis of layers."""

    name: str
    """Key of the stack among the parameters."""
    first: int
    """Index of its first layer among all layers."""
    length: int
    """Number of its layers."""
    sparse: bool
    """True if its layers have experts."""


@dataclass(frozen=True)
class TransformerConfig:
    """A decoder. The defaults are a Qwen3-MoE of a size for a laptop's CPU."""

    vocab_size: int = 32
    hidden_size: int = 96
    """Size of the vector that a token has between layers."""
    num_layers: int = 2
    num_heads: int = 4
    """Heads of the queries."""
    num_kv_heads: int = 2
    """Heads of keys and values, which groups of query heads share."""
    head_dim: int = 24
    """Head size of queries and keys."""
    num_experts: int = 8
    """Experts of each layer, E; 0 for a model without experts."""
    num_experts_per_token: int = 2
    """Experts that a token activates, K."""
    expert_size: int = 192
    """Hidden width of one SwiGLU expert, F."""
    normalize_expert_weights: bool = True
    """If true, the combine weights of the K chosen experts are divided by their sum."""
    dense_layers: tuple[int, ...] = ()
    """Indices of the layers that have one SwiGLU for all tokens in place of experts, ascending."""
    dense_size: int = 0
    """Hidden width of that SwiGLU."""
    shared_expert_size: int = 0
    """Hidden width of an expert that every token goes through beside its chosen ones; 0: there is none."""
    gate_shared_expert: bool = False
    """If true, the shared expert's output is multiplied by a learned sigmoid."""
    router: Router = "softmax"
    """The function that turns router logits into scores: a softmax over all experts, or a sigmoid of each."""
    router_bias: bool = False
    """If true, the router adds a learned bias to its logits."""
    router_groups: int = 1
    """Number of groups that a sigmoid router divides the experts into; a token uses its best ones."""
    router_groups_per_token: int = 1
    """Number of groups that a token uses."""
    expert_weight_scale: float = 1.0
    """Factor on the final combine weights."""
    expert_biases: bool = False
    """If true, both products of an expert have a bias."""
    activation: Activation = "silu"
    """Activation of the experts: silu(gate) · up, or gpt-oss' clamped form."""
    attention_bias: AttentionBias = "none"
    """Projections of attention that have a bias: none, queries, keys and values ("qkv"), or the output too."""
    query_key_norm: QueryKeyNorm = "head"
    """RMS normalisation of queries and keys: none, over each head, or over all heads together."""
    clip_qkv: float = 0.0
    """Limit ± that queries, keys and values are clamped to; 0: they are not clamped."""
    attention_sinks: bool = False
    """If true, each head has a learned logit that joins its softmax and adds no value."""
    sliding_window: int = 0
    """Number of tokens that a token of a sliding layer sees, itself included; 0: no layer slides."""
    sliding_layers: tuple[int, ...] = ()
    """Indices of the layers with a sliding window, ascending."""
    latent: LatentAttention | None = None
    """Sizes of latent attention; None: attention is the usual one."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Stretch of the rotary frequencies to longer texts, if there is one."""
    rms_norm_epsilon: float = 1e-6
    tie_embeddings: bool = False
    """If true, the output head is the transposed embedding."""
    dtype: Dtype = "float32"
    """Dtype of the activations. Routers, norms and softmaxes are computed in float32 in any case."""
    param_dtype: Dtype = "float32"
    """Dtype of the parameters."""
    remat: Remat = "none"
    """Part that the backward pass computes again: nothing, all but matrix products ("dots"), or whole layers."""

    def __post_init__(self) -> None:
        counts = ["vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"]
        counts += ["num_experts_per_token", "expert_size"] if self.num_experts else ["dense_size"]
        for name in counts + (["dense_size"] if self.dense_layers else []):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("num_experts", "shared_expert_size", "sliding_window", "clip_qkv", "dense_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name, choices in (
            ("remat", Remat),
            ("dtype", Dtype),
            ("param_dtype", Dtype),
            ("router", Router),
            ("activation", Activation),
            ("attention_bias", AttentionBias),
            ("query_key_norm", QueryKeyNorm),
        ):
            check_choice(name, getattr(self, name), choices)
        self._check_experts()
        self._check_attention()

    def _check_experts(self) -> None:
        if self.num_experts and self.num_experts_per_token > self.num_experts:
            raise ValueError(
                f"num_experts_per_token is {self.num_experts_per_token}, but a layer has only {self.num_experts} "
                "experts: lower the former or raise the latter"
            )
        self._check_layers("dense_layers", self.dense_layers)
        if self.gate_shared_expert and not self.shared_expert_size:
            raise ValueError("gate_shared_expert needs a shared expert: set shared_expert_size")
        groups, chosen = self.router_groups, self.router_groups_per_token
        if self.router != "sigmoid" and (groups, chosen) != (1, 1):
            raise ValueError(f"router_groups are for the sigmoid router, but router is {self.router!r}")
        if not 1 <= chosen <= groups:
            raise ValueError(f"router_groups_per_token must be between 1 and router_groups ({groups}), got {chosen}")
        if groups > 1:
            each, rest = divmod(self.num_experts, groups)
            if rest or each < 2 or chosen * each < self.num_experts_per_token:
                raise ValueError(
                    f"{self.num_experts} experts in {groups} groups, of which a token uses {chosen}: groups must be "
                    f"of equal size, at least 2, and a token's groups must hold {self.num_experts_per_token} experts"
                )

    def _check_attention(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        self._check_layers("sliding_layers", self.sliding_layers)
        if bool(self.sliding_layers) != bool(self.sliding_window):
            raise ValueError("sliding_window and sliding_layers go together: set both or neither")
        if self.latent is None:
            return
        if self.head_dim != self.latent.plain_dim + self.latent.rotary_dim or self.num_kv_heads != self.num_heads:
            raise ValueError(
                "latent attention needs head_dim = latent.plain_dim + latent.rotary_dim and num_kv_heads = num_heads"
            )
        without = {
            "attention_bias": "none",
            "query_key_norm": "none",
            "attention_sinks": False,
            "sliding_window": 0,
            "clip_qkv": 0.0,
        }
        for name, value in without.items():
            if getattr(self, name) != value:
                raise ValueError(f"latent attention needs {name} = {value!r}, got {getattr(self, name)!r}")

    def _check_layers(self, name: str, layers: tuple[int, ...]) -> None:
        if list(layers) != sorted({*layers}) or any(not 0 <= layer < self.num_layers for layer in layers):
            raise ValueError(f"{name} must be ascending, between 0 and {self.num_layers - 1}; got {layers}")

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """All layers in order: one stack called `layers`, or `layers_0`, `layers_1`, … where the kinds alternate."""
        sparse = [bool(self.num_experts) and layer not in self.dense_layers for layer in range(self.num_layers)]
        bounds = [0, *(layer for layer in range(1, self.num_layers) if sparse[layer] != sparse[layer - 1])]
        ends = [*bounds[1:], self.num_layers]
        return tuple(
            Stack("layers" if len(bounds) == 1 else f"layers_{number}", first, end - first, sparse[first])
            for number, (first, end) in enumerate(zip(bounds, ends, strict=True))
        )

    @property
    def num_sparse_layers(self) -> int:
        """Number of layers with experts, the L of the router logits."""
        return sum(stack.length for stack in self.stacks if stack.sparse)
