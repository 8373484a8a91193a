"""Choice of a mesh that suits a model and its batch on a pod, if the user names none."""

import math
from dataclasses import dataclass

import models
from rspo_jax.sharding import MESH_AXES, MeshConfig

MOST_EXPERT_WAYS = 8


@dataclass(frozen=True)
class MeshFlags:
    """Devices along each axis of the mesh; -1 on one of them takes all that are left. If none is given, a mesh is
    chosen that suits model, batch and topology."""

    data: int | None = None
    """Number of copies of parameters and optimizer."""
    fsdp: int | None = None
    """Devices that split rows, parameters and optimizer."""
    expert: int | None = None
    """Devices that split experts and rows."""
    tensor: int | None = None
    """Devices that split heads, the experts' hidden layer and the vocabulary."""
    context: int | None = None
    """Devices that split the tokens of a row."""
    rules: tuple[str, ...] = ()
    """Changes to the table of sharding rules, as embed=fsdp (`rspo_jax.sharding.MeshConfig.rules`)."""

    def config(self, model: models.TransformerConfig, devices: int, rows: int) -> MeshConfig:
        """Return the mesh as given, or one that suits.

        Args:
          model: the model that runs on it.
          devices: number of devices of the pod.
          rows: number of rows of a micro-batch.

        Raises:
          ValueError: if the sizes are not possible, or no mesh suits.
        """
        given = {name: getattr(self, name) for name in MESH_AXES if getattr(self, name) is not None}
        if given:
            return MeshConfig(**given, rules=self.rules)
        return MeshConfig(**suitable_sizes(model, devices, rows), rules=self.rules)


def suitable_sizes(model: models.TransformerConfig, devices: int, rows: int) -> dict[str, int]:
    """Choose a mesh: rows are split as far as they go, over `expert` and then `fsdp`; the devices left split tokens.

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
