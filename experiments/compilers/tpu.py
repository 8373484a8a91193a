"""The TPU compiler on a machine without TPUs: a pod's devices by name, and programs compiled for them.

The package `libtpu` holds the compiler. Nothing here opens a TPU or runs a program.
"""

import importlib.util
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rspo_jax.sharding import lowering_for

_ENVIRONMENT = {
    # Without these, libtpu asks the cloud's metadata server which machine it is on.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # any that exists; the topology's name sets the target of the compilation
    # libtpu lets one process load it, as one process can hold a TPU. None is held here.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def topology_mesh(name: str, axes: Mapping[str, int]) -> Mesh:
    """Return a mesh over the devices of a TPU pod that need not exist.

    Args:
      name: as for `topology_of`.
      axes: mesh axis -> number of devices; -1 on at most one axis takes all that are left.

    Returns:
      A mesh with these axes, laid out along the pod's links.

    Raises:
      RuntimeError: if libtpu is not installed.
      ValueError: if libtpu does not know the topology, or the axes do not multiply to its devices.
    """
    topology = topology_of(name)
    shape = fill_in(axes, len(topology.devices), name)
    return topologies.make_mesh(topology, tuple(shape.values()), tuple(shape))


def topology_devices(name: str) -> Sequence[Any]:
    """Return the devices of a TPU pod that need not exist; see `topology_of`."""
    return topology_of(name).devices


def topology_of(name: str) -> topologies.TopologyDescription:
    """Return a TPU pod that need not exist.

    Sets the environment variables of libtpu that are not set yet; they have no effect once libtpu has been loaded.

    Args:
      name: generation and chips, as "v5p:2x2x1", "v5e:4x4", "v6e:16x16" or "tpu7x:4x4x4". tpu7x has two devices a
        chip, the others one.

    Raises:
      RuntimeError: if libtpu is not installed.
      ValueError: if libtpu does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError("compiling for TPU needs the compiler in the package libtpu: pip install libtpu")
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if not jax.config.jax_platforms:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_platforms", "cpu")  # else JAX looks for a TPU as soon as it needs a device
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"libtpu cannot build the topology {name!r}; name a generation and its chips, as v5p:2x2x1 or v5e:4x4 "
            f"(libtpu says: {str(error).splitlines()[0]})"
        ) from error


def fill_in(axes: Mapping[str, int], devices: int, name: str) -> dict[str, int]:
    """Replace the -1 among the axes' sizes.

    Raises:
      ValueError: if the axes do not multiply to the devices.
    """
    free = [axis for axis, size in axes.items() if size == -1]
    known = math.prod(size for size in axes.values() if size != -1)
    left = devices // known if known > 0 else 0
    filled = {axis: left if size == -1 else size for axis, size in axes.items()}
    if len(free) > 1 or min(filled.values(), default=0) < 1 or math.prod(filled.values()) != devices:
        raise ValueError(f"the axes {dict(axes)} must multiply to the {devices} devices of {name}")
    return filled


def shape_on(mesh: Mesh, shape: tuple[int, ...], dtype: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
    """Return an array without data, sharded over `mesh` by one mesh axis, or None, for each leading array axis."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))


def compile_for(function: Callable[..., Any], *arguments: Any, **jit_options: Any) -> jax.stages.Compiled:
    """Compile a function of arrays that need not exist, for the devices that their shardings name.

    Args:
      function: a function of pytrees of arrays.
      arguments: pytrees of `jax.ShapeDtypeStruct` with a sharding, as `shape_on` makes them.
      jit_options: for `jax.jit`, such as `out_shardings`.

    Returns:
      The compiled program; `memory_analysis()`, `cost_analysis()` and `as_text()` are per device.
    """
    device = next(iter(jax.tree.leaves(arguments)[0].sharding.device_set))
    with lowering_for(device.platform):
        return jax.jit(function, **jit_options).lower(*arguments).compile()


class Reading(NamedTuple):
    """The TPU compiler's own texts about a program."""

    compiled: jax.stages.Compiled | None
    """None if the program does not fit the device."""
    text: str
    """The optimized HLO, for one device."""
    buffers: str
    """The buffer assignment: the list of buffers and their places."""
    peak: str
    """The live ranges: the buffers that are alive at the peak."""
    seconds: float
    """Duration of the compilation."""
    refusal: str
    """The reason why the program does not fit; empty if it fits."""


def compile_and_read(lowered: jax.stages.Lowered) -> Reading:
    """Compile a program for TPUs, and keep the texts that the compiler writes even if the program does not fit.

    `jax.stages.Compiled.as_text` has neither the compiler's estimates nor programs that do not fit, and fails on some
    that do.

    Raises:
      jax.errors.JaxRuntimeError: if the compiler fails for any reason but too little memory.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        compiled, refusal = None, ""
        try:
            compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            refusal = str(error)
            if "RESOURCE_EXHAUSTED" not in refusal:
                raise
        seconds = time.perf_counter() - started

        def read(*endings: str) -> str:
            found = [path for ending in endings for path in Path(folder).glob(f"*{ending}.txt")]
            return found[0].read_text() if found else ""

        text = read(".after_codegen", ".after_optimizations", ".after_optimizations_before_buffer_assignment")
        buffers, peak = read(".after_optimizations-buffer-assignment"), read(".after_optimizations-live-range")
    return Reading(compiled, text, buffers, peak, seconds, refusal)
