"""Mixture-of-Experts language models in Flax Linen, with their router logits as a plain output."""

from models.config import TransformerConfig
from models.transformer import Cache, Transformer, init_params

__all__ = ["Cache", "Transformer", "TransformerConfig", "init_params"]
