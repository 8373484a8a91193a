"""`python -m experiments.upcycle SOURCE TARGET`: make a mixture of experts of a dense model.

Both are folders in Hugging Face's format: a dense Qwen3 becomes a Qwen3-MoE, a dense Qwen2 or Qwen2.5 a Qwen2-MoE.
Without noise the new model computes the same as the dense one. It is made on one device, which has to hold both models;
with JAX_PLATFORMS=cpu that is the host.
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
    """Seed of the router, the noise and the shared expert."""
    param_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype that the weights are held and written in; that of the source when absent."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")


class Size(NamedTuple):
    """Numbers of parameters of a model."""

    total: int
    active: int
    """All but those of the experts that a token does not go through."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 2 for a mistake that the user can correct."""
    try:
        run(tyro.cli(Upcycling, args=arguments, prog="python -m experiments.upcycle"))
    except (ValueError, OSError) as error:
        return complain(error)
    return 0


def run(command: Upcycling) -> None:
    """Read the dense model, make the mixture and write it.

    Raises:
      ValueError: if the source is not a dense model that can become a mixture, or the target holds something.
      OSError: if a file cannot be read or written.
    """
    target = pathlib.Path(command.target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists already and is not an empty folder: choose another one")
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
    """Count the parameters, embeddings included."""
    params = jax.eval_shape(lambda key: models.init_params(config, key), jax.random.key(0))
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    if not config.num_experts:
        return Size(total, total)
    stacks = [params[stack.name]["moe"] for stack in config.stacks if stack.sparse]
    experts = sum(moe["gate_up"].size + moe["down"].size for moe in stacks)
    return Size(total, total - experts + experts * config.num_experts_per_token // config.num_experts)


if __name__ == "__main__":
    sys.exit(main())
