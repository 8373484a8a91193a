"""Mixture-of-Experts language models in Flax Linen, with their router logits as a plain output."""

from rspo_jax.extras import naming_the_extra

with naming_the_extra("models"):
    from models.config import LatentAttention, TransformerConfig
    from models.hugging_face.folder import load_config_hf, load_hf, save_hf
    from models.rope import RopeScaling
    from models.transformer import Cache, Transformer, init_params

__all__ = [
    "Cache",
    "LatentAttention",
    "RopeScaling",
    "Transformer",
    "TransformerConfig",
    "init_params",
    "load_config_hf",
    "load_hf",
    "save_hf",
]
