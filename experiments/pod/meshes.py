"""Which mesh a model and its batch get on a pod, where the user does not say. This file must never compile anything."""

import math
from dataclasses import dataclass

import models
from rspo_jax.sharding import MESH_AXES, MeshConfig

MOST_EXPERT_WAYS = 8


@dataclass(frozen=True)
class MeshFlags:
    """Devices along each axis of the mesh; -1 on one of them takes all that are left. A mesh that suits model, batch
    and topology when none is given."""

    data: int | None = None
    """Copies of parameters and optimizer."""
    fsdp: int | None = None
    """Rows, parameters and optimizer are split."""
    expert: int | None = None
    """Experts and rows are split."""
    tensor: int | None = None
    """Heads, the experts' hidden layer and the vocabulary are split."""
    context: int | None = None
    """The tokens of a row are split."""
    rules: tuple[str, ...] = ()
    """Changes to where parameters lie, as embed=fsdp (`rspo_jax.sharding.MeshConfig.rules`)."""

    def config(self, model: models.TransformerConfig, devices: int, rows: int) -> MeshConfig:
        """The mesh as given, or one that suits.

        Args:
          model: what runs on it.
          devices: of the pod.
          rows: of a micro-batch.

        Raises:
          ValueError: if the sizes are not possible, or no mesh suits.
        """
        given = {name: getattr(self, name) for name in MESH_AXES if getattr(self, name) is not None}
        if given:
            return MeshConfig(**given, rules=self.rules)
        return MeshConfig(**suitable_sizes(model, devices, rows), rules=self.rules)


def suitable_sizes(model: models.TransformerConfig, devices: int, rows: int) -> dict[str, int]:
    """Rows are split as far as they go, over `expert` first and then `fsdp`; the devices left split tokens.

    Raises:
      ValueError: if no such mesh exists.
    """
    expert = math.gcd(model.num_experts, MOST_EXPERT_WAYS, devices, rows)
    row_ways = math.gcd(devices, rows)
    context = devices // row_ways
    if model.num_kv_heads % context:
        raise ValueError(
            f"no mesh suits {rows} rows on {devices} devices: {row_ways} can split the rows, and the {context} left "
            f"would have to split {model.num_kv_heads} key/value heads; give a larger --batch, fewer --micro-batches, "
            "or a mesh by --mesh"
        )
    return {"fsdp": row_ways // expert, "expert": expert, "context": context}
