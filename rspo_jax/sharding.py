"""How work is spread over a mesh: rows of a batch lie on the axes `data` and `fsdp` of the mesh in use,
the vocabulary on `tensor`.

`jax.jit` partitions everything but hand-written kernels; those run on each device's own rows. This file must never
know a model, a loss or a number of devices.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

ROW_AXES = ("data", "fsdp")
VOCABULARY_AXIS = "tensor"


def row_axes() -> tuple[str, ...]:
    """The axes of the mesh in use (`jax.set_mesh`) that split rows and that no `jax.shard_map` around has taken."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in ROW_AXES if name in mesh.axis_names and name not in mesh.manual_axes)


def over_rows(function: Callable[..., Any], has_rows: tuple[bool, ...]) -> Callable[..., Any]:
    """`function` on each device's own rows; `function` itself where no mesh with a row axis is set (`jax.set_mesh`).

    Args:
      function: of arrays or pytrees of arrays; what it returns leads with the rows.
      has_rows: for each positional argument, whether it leads with the rows. Others are whole on every device, and
        their gradients are summed.
    """
    axes = row_axes()
    if not axes:
        return function
    specs = tuple(PartitionSpec(axes) if rows else PartitionSpec() for rows in has_rows)
    # The kernels do not say over which axes their results vary, so that this cannot be checked.
    return jax.shard_map(function, in_specs=specs, out_specs=PartitionSpec(axes), check_vma=False)
