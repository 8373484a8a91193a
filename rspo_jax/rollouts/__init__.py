"""Prompts in, judged responses out, packed into rows to learn from."""

from rspo_jax.rollouts.data import take
from rspo_jax.rollouts.packing import unpack
from rspo_jax.rollouts.rollout import (
    Judged,
    Packing,
    Prompts,
    ResponseLengths,
    assemble,
    check_solutions,
    encode_prompts,
    encode_solutions,
    judge,
    pack,
    refilling_pays,
    sample_in_chunks,
    solve,
    usable_problems,
)
from rspo_jax.rollouts.sampler import SamplerConfig, generate

__all__ = [
    "Judged",
    "Packing",
    "Prompts",
    "ResponseLengths",
    "SamplerConfig",
    "assemble",
    "check_solutions",
    "encode_prompts",
    "encode_solutions",
    "generate",
    "judge",
    "pack",
    "refilling_pays",
    "sample_in_chunks",
    "solve",
    "take",
    "unpack",
    "usable_problems",
]
