"""`python -m experiments.upcycle SOURCE TARGET`: makes a mixture of experts of a dense model.

Both are folders in Hugging Face's format: a dense Qwen3 becomes a Qwen3-MoE, a dense Qwen2 or Qwen2.5 a Qwen2-MoE.
Without noise the new model computes what the dense one does. It is made on one device, which has to hold both models;
with JAX_PLATFORMS=cpu that is the host. This file must never know how experts are made.
"""

import dataclasses
import pathlib
import sys
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import jax
import tyro

import models
from experiments.errors import complain
from models.upcycling import UpcyclingConfig, upcycle, upcycled_config


@dataclass(frozen=True)
class Upcycling:
    """Make a mixture of experts of a dense model, which computes the same until it is trained."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Folder of the dense model: config.json, *.safetensors, and the tokenizer, which goes along."""
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """Folder to write, absent or empty."""
    upcycling: Annotated[UpcyclingConfig, tyro.conf.arg(name="")] = UpcyclingConfig()
    seed: int = 0
    """Of the router, the noise and the shared expert."""
    param_dtype: Literal["float32", "bfloat16"] | None = None
    """What the weights are held and written in; what those of the source are in when absent."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")


class Size(NamedTuple):
    """Numbers of a model."""

    total: int
    active: int
    """All but the experts that a token does not go through."""


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for something that the user can mend."""
    try:
        run(tyro.cli(Upcycling, args=arguments, prog="python -m experiments.upcycle"))
    except (ValueError, OSError) as error:
        return complain(error)
    return 0


def run(command: Upcycling) -> None:
    """Reads, makes and writes.

    Raises:
      ValueError: if the source is no dense model that can become a mixture of experts, or the target holds something.
      OSError: if a file cannot be read or written.
    """
    target = pathlib.Path(command.target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} is there already and not an empty folder: name another one to write to")
    config = models.load_config_hf(command.source)
    config = dataclasses.replace(config, param_dtype=command.param_dtype or config.dtype)
    sparse = upcycled_config(config, command.upcycling)
    _, params = models.load_hf(command.source, config.dtype, config.param_dtype)
    params = upcycle(config, params, command.upcycling, jax.random.key(command.seed))
    models.save_hf(command.target, sparse, params, source=command.source)
    shared = f", and a shared one of width {sparse.shared_expert_size}" if sparse.shared_expert_size else ""
    print(f"{command.source}: dense, {size_of(config).total:,} parameters")
    print(
        f"{command.target}: {sparse.num_experts} experts of width {sparse.expert_size} a layer, "
        f"{sparse.num_experts_per_token} a token{shared}; {size_of(sparse).total:,} parameters, of which a token "
        f"activates {size_of(sparse).active:,}"
    )


def size_of(config: models.TransformerConfig) -> Size:
    """Counts the parameters, embeddings included."""
    params = jax.eval_shape(lambda key: models.init_params(config, key), jax.random.key(0))
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    if not config.num_experts:
        return Size(total, total)
    stacks = [params[stack.name]["moe"] for stack in config.stacks if stack.sparse]
    experts = sum(moe["gate_up"].size + moe["down"].size for moe in stacks)
    return Size(total, total - experts + experts * config.num_experts_per_token // config.num_experts)


if __name__ == "__main__":
    sys.exit(main())
