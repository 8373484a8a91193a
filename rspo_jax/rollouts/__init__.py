"""Prompts in, judged responses out, packed into rows to learn from."""

from rspo_jax.rollouts.groups import choose_groups, chosen_rows, is_informative, mask_rows
from rspo_jax.rollouts.packing import Packing, pack, unpack
from rspo_jax.rollouts.pieces import text_pieces
from rspo_jax.rollouts.prompts import (
    SPLITS,
    Problems,
    Prompts,
    UsableProblems,
    check_solutions,
    encode_prompts,
    load_problems,
    take,
    usable_problems,
)
from rspo_jax.rollouts.rollout import (
    Judged,
    ResponseLengths,
    assemble,
    cut,
    encode_solutions,
    judge,
    judge_texts,
    refilling_pays,
    reward_names,
    sample_in_chunks,
    sample_texts,
    solve,
    tells_correct,
)
from rspo_jax.rollouts.sampler import SamplerConfig, generate

__all__ = [
    "SPLITS",
    "Judged",
    "Packing",
    "Problems",
    "Prompts",
    "ResponseLengths",
    "SamplerConfig",
    "UsableProblems",
    "assemble",
    "check_solutions",
    "choose_groups",
    "chosen_rows",
    "cut",
    "encode_prompts",
    "encode_solutions",
    "generate",
    "is_informative",
    "judge",
    "judge_texts",
    "load_problems",
    "mask_rows",
    "pack",
    "refilling_pays",
    "reward_names",
    "sample_in_chunks",
    "sample_texts",
    "solve",
    "take",
    "tells_correct",
    "text_pieces",
    "unpack",
    "usable_problems",
]
