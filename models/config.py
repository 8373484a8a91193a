"""The shape of a model: one frozen dataclass, checked when it is made. It must never know Flax or a checkpoint."""

from dataclasses import dataclass

REMAT_POLICIES = ("none", "dots", "full")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class TransformerConfig:
    """A decoder of the Qwen3-MoE architecture. The defaults are a toy for a laptop's CPU."""

    vocab_size: int = 32
    hidden_size: int = 96
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 24
    num_experts: int = 8
    """Experts of each layer, E."""
    num_experts_per_token: int = 2
    """Experts that a token activates, K."""
    expert_size: int = 192
    """Hidden width of one SwiGLU expert, F."""
    normalize_expert_weights: bool = True
    """Whether the combine weights of the K chosen experts are divided by their sum."""
    tie_embeddings: bool = False
    """Whether the output head is the transposed embedding."""
    rope_theta: float = 10_000.0
    rms_norm_epsilon: float = 1e-6
    dtype: str = "float32"
    """Of activations; routers, norms and softmaxes are computed in float32 whatever it is."""
    param_dtype: str = "float32"
    remat: str = "none"
    """What the backward pass computes again: nothing, everything but matrix products ("dots"), or whole layers."""

    def __post_init__(self) -> None:
        counts = (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "num_experts",
            "num_experts_per_token",
            "expert_size",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_experts_per_token > self.num_experts:
            raise ValueError(
                f"num_experts_per_token is {self.num_experts_per_token}, but a layer has only {self.num_experts} "
                "experts: lower the one or raise the other"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        for name, choices in (("remat", REMAT_POLICIES), ("dtype", DTYPES), ("param_dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
