"""The division of work over devices: one mesh, and one table of which mesh axes split which axis of an array.

Arrays are described by logical axes, such as ("embed", "heads", None); `RULES` maps these to mesh axes, and nothing
else does. `jax.jit` partitions all programs, except for code that has to be written by hand for each device's own part;
that runs inside `spread`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.extend import backend
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

LogicalAxes = tuple[str | None, ...]
"""The axes of an array: for each a name of `RULES`, or None for an axis that is never split."""
Rules = Mapping[str, tuple[str, ...]]
"""Logical axis -> the mesh axes that split it, the slowest first."""

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")
RULES: Rules = {
    "rows": ("data", "fsdp", "expert"),
    "tokens": ("context",),
    "layers": (),
    "embed": ("fsdp", "expert"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "attended_heads": ("tensor", "context"),
    "experts": ("expert",),
    "expert_embed": ("fsdp",),
    "expert_hidden": ("tensor",),
    "dense_hidden": ("tensor",),
    "vocabulary": ("tensor",),
}
"""The table.

`rows` are the rows of a batch of tokens, prompts, responses or a cache, and `tokens` are its positions. `embed` is the
hidden size in parameters, `expert_embed` the hidden size in the parameters of experts, which the axis `expert` splits
already; in activations the hidden size is whole. Each device of the axis `expert` brings rows of its own to the experts
of all. While tokens attend, all tokens of a row are in one place, and the axis `context` splits the heads as well
(`attended_heads`)."""

# Unlike a global of Python's, this context is part of every key in JAX's caches of traced and compiled functions.
_named_platform = jax.make_user_context(None)


@dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis of the mesh. At most one may be -1, for all devices that are left."""

    data: int = 1
    """Copies of parameters and optimizer, each for rows of its own. The one axis that crosses slices of a pod."""
    fsdp: int = -1
    """Parts of rows, parameters and optimizer; parameters are gathered layer by layer."""
    expert: int = 1
    """Parts of experts and of rows."""
    tensor: int = 1
    """Parts of the heads, of the experts' hidden layer and of the vocabulary."""
    context: int = 1
    """Parts of the tokens of a row and, while they attend, of the heads."""
    rules: tuple[str, ...] = ()
    """Changes of the table for parameters and optimizer: "embed=fsdp" to split an axis, "vocabulary=" for none."""

    def __post_init__(self) -> None:
        sizes = self.sizes
        if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
            raise ValueError(f"mesh axes must be positive, at most one of them -1 for all devices left; got {sizes}")
        _ = self.parameter_rules

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis -> size."""
        return {name: getattr(self, name) for name in MESH_AXES}

    @property
    def parameter_rules(self) -> Rules:
        """`RULES` with the changes of `rules`.

        Raises:
          ValueError: if a change has another form or names an unknown axis.
        """
        changed = dict(RULES)
        for rule in self.rules:
            name, _, axes = rule.partition("=")
            split = tuple(axis for axis in axes.split(",") if axis)
            unknown = [axis for axis in split if axis not in MESH_AXES]
            if name not in RULES or "=" not in rule or unknown:
                raise ValueError(
                    f"mesh.rules has {rule!r}, which is not of the form name=axis,axis with a name among "
                    f"{', '.join(RULES)} and axes among {', '.join(MESH_AXES)}"
                )
            changed[name] = split
        return changed

    @property
    def sampling_rules(self) -> Rules:
        """The rules for parameters while responses are drawn: axes that training gathers layer by layer stay whole."""
        return {**self.parameter_rules, "embed": (), "expert_embed": ()}


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh over all devices, or the given ones, laid out along their links.

    If the devices belong to several slices, the axis `data` crosses them, and no other does.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices, or `data` is no multiple of the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes
    known = math.prod(size for size in sizes.values() if size != -1)
    filled = {name: len(devices) // known if size == -1 else size for name, size in sizes.items()}
    if math.prod(filled.values()) != len(devices):
        least = f"a multiple of {known}" if -1 in sizes.values() else str(known)
        raise ValueError(
            f"the mesh {sizes} needs {least} devices, but there are {len(devices)}: change its sizes, "
            "or give one of them as -1"
        )
    shape = tuple(filled.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if filled["data"] % slices:
        raise ValueError(
            f"mesh.data is {filled['data']}, but must be a multiple of the {slices} slices, because it crosses them"
        )
    if slices > 1:
        across = (slices, *(1,) * (len(shape) - 1))
        within = (shape[0] // slices, *shape[1:])
        array = mesh_utils.create_hybrid_device_mesh(within, across, devices)
    else:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def partition_spec(axes: LogicalAxes, mesh_axes: Sequence[str], rules: Rules = RULES) -> PartitionSpec:
    """Return the partition of an array by the table, over the given mesh axes alone.

    Raises:
      ValueError: on a name that the table does not have, or if one mesh axis would split two axes of the array.
    """
    return PartitionSpec(*(part or None for part in _parts(axes, mesh_axes, rules)))


def _parts(axes: LogicalAxes, mesh_axes: Sequence[str], rules: Rules) -> list[tuple[str, ...]]:
    """Return the mesh axes that split each axis of an array."""
    unknown = [name for name in axes if name is not None and name not in rules]
    if unknown:
        raise ValueError(f"unknown logical axis {unknown[0]!r}; the table has {', '.join(rules)}")
    parts = [tuple(axis for axis in rules[name] if axis in mesh_axes) if name is not None else () for name in axes]
    used = [axis for part in parts for axis in part]
    twice = [axis for axis in used if used.count(axis) > 1]
    if twice:
        both = " and ".join(str(name) for name, part in zip(axes, parts, strict=True) if twice[0] in part)
        raise ValueError(
            f"the mesh axis {twice[0]} would split two axes of one array, {both}: change mesh.rules so that it splits "
            "one of them"
        )
    return parts


def sharding_of(mesh: Mesh, name: str, shape: Sequence[int], axes: LogicalAxes, rules: Rules = RULES) -> NamedSharding:
    """Return the sharding of an array.

    Args:
      mesh: the mesh, from `make_mesh`.
      name: the array's name, for errors.
      shape: the shape of the whole array.
      axes: its logical axes.
      rules: the table.

    Raises:
      ValueError: if the array has another number of axes, or a size that its mesh axes do not divide.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{name} has shape {tuple(shape)}, but the logical axes {axes}")
    _check_divides(name, shape, axes, _parts(axes, mesh.axis_names, rules), mesh.shape)
    return NamedSharding(mesh, partition_spec(axes, mesh.axis_names, rules))


def _check_divides(
    name: str, shape: Sequence[int], axes: LogicalAxes, parts: list[tuple[str, ...]], sizes: Mapping[str, int]
) -> None:
    for logical, size, part in zip(axes, shape, parts, strict=True):
        ways = math.prod(sizes[axis] for axis in part)
        if size % ways:
            raise ValueError(
                f"{name} has {size} {logical}, which the mesh axes {', '.join(part)} cannot split into {ways} equal "
                f"parts: choose sizes of the mesh that divide {size}"
            )


def shardings_of(mesh: Mesh, tree: Any, axes: Any, rules: Rules = RULES) -> Any:
    """Return `sharding_of` each array of a pytree; `axes` is a pytree like it, with logical axes in place of arrays."""
    paths, structure = jax.tree.flatten_with_path(tree)
    named = jax.tree.structure(tree).flatten_up_to(axes)
    return structure.unflatten(
        [
            sharding_of(mesh, f"the array {jax.tree_util.keystr(path)}", leaf.shape, leaf_axes, rules)
            for (path, leaf), leaf_axes in zip(paths, named, strict=True)
        ]
    )


def platform() -> str:
    """Return the platform that programs are traced for: "cpu", "tpu", "cuda", "rocm" or "oneapi".

    `lowering_for` names it. Without a name it is the platform of the mesh in use, of `jax.default_device` or of JAX's
    default backend, in this order. Functions with an implementation for each platform choose by it while they are
    traced, so that the other implementations cost nothing (`jax.lax.platform_dependent` traces them all). A program for
    other devices than the default ones has to be traced under such a mesh or name.
    """
    found = _named_platform.value
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device  # pyright: ignore
    if found is None and device is not None:
        found = device if isinstance(device, str) else device.platform
    if found is None:
        found = jax.default_backend()
    if found != "gpu":
        return found
    return next((name for name in ("rocm", "oneapi") if name in backend.backends()), "cuda")


def lowering_for(platform: str) -> AbstractContextManager[None]:
    """Name the platform of the programs that are traced in this context, for devices that this machine lacks.

    Args:
      platform: a name that `platform` returns, or "gpu".
    """
    return _named_platform(platform)


def free_axes() -> tuple[str, ...]:
    """Return the axes of the mesh in use that have several devices and that no enclosing `jax.shard_map` has taken.

    The mesh in use is the one of `jax.set_mesh`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in mesh.axis_names if mesh.shape[name] > 1 and name not in mesh.manual_axes)


def on_each_device(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Return `jax.shard_map` of a function over all axes of the mesh in use that no enclosing one has taken.

    Axes of a single device are among them: XLA must not partition a kernel along any axis. The arguments are those of
    `jax.shard_map`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = set(mesh.axis_names) - set(mesh.manual_axes)
    # Kernels do not declare which axes their results vary over, and loops start from constants: nothing can be checked.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False)


def axes_of(name: str, rules: Rules = RULES) -> tuple[str, ...]:
    """Return the free axes that split a logical axis."""
    free = free_axes()
    return tuple(axis for axis in rules[name] if axis in free)


def parts_of(name: str, rules: Rules = RULES) -> int:
    """Return the number of parts that the mesh in use splits a logical axis into."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in axes_of(name, rules))


def check_split(name: str, shape: Sequence[int], axes: LogicalAxes) -> None:
    """Refuse an array with an axis that the mesh in use does not divide.

    Raises:
      ValueError: naming the array `name`.
    """
    free = free_axes()
    _check_divides(name, shape, axes, _parts(axes, free, RULES), jax.sharding.get_abstract_mesh().shape)


def split_axes(name: str, size: int, rules: Rules = RULES) -> tuple[str, ...]:
    """Return the free axes that split a logical axis of size `size`, or none if they do not divide it."""
    return axes_of(name, rules) if size % parts_of(name, rules) == 0 else ()


def constrain(array: jax.Array, *axes: str | None, rules: Rules = RULES) -> jax.Array:
    """Constrain an array to the sharding of the table, and return it.

    An axis that the mesh does not divide stays whole. Without a mesh the array is returned as it is.
    """
    if not free_axes():
        return array
    fitting = tuple(
        name if name is not None and split_axes(name, size, rules) else None
        for name, size in zip(axes, array.shape, strict=True)
    )
    return jax.lax.with_sharding_constraint(array, partition_spec(fitting, free_axes(), rules))


def spread(
    function: Callable[..., Any], inputs: Sequence[LogicalAxes], outputs: LogicalAxes, names: Sequence[str]
) -> Callable[..., Any]:
    """Return `function` applied to each device's own parts, or `function` itself without a mesh in use.

    Args:
      function: a function of as many arrays as `inputs` has entries, which returns one array.
      inputs: logical axes of each argument.
      outputs: logical axes of its result.
      names: names of the arguments, for errors.

    Returns:
      A function of whole arrays. It raises ValueError for a size that the mesh does not divide.
    """
    free = free_axes()
    if not free:
        return function
    specs = tuple(partition_spec(axes, free) for axes in inputs)
    spread_function = on_each_device(function, specs, partition_spec(outputs, free))

    def checked(*arrays: jax.Array) -> Any:
        for name, array, axes in zip(names, arrays, inputs, strict=True):
            check_split(name, array.shape, axes)
        return spread_function(*arrays)

    return checked


def own_rows(count: int) -> np.ndarray:
    """Return which of `count` rows lie on devices of this process, under the mesh in use: int [n], ascending."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return np.arange(count)
    sharding = sharding_of(mesh, "the batch", (count,), ("rows",))
    own = np.zeros(count, bool)
    for index in sharding.addressable_devices_indices_map((count,)).values():
        own[index] = True
    return np.flatnonzero(own)


def from_own(values: Any, *axes: str | None) -> jax.Array:
    """Make a global array from the parts that each process has for its own devices, under the mesh in use.

    Args:
      values: an array of the shape of the whole; entries for other processes' devices are not read.
      axes: its logical axes.
    """
    values, mesh = np.asarray(values), jax.sharding.get_mesh()
    if mesh.empty:
        return jnp.asarray(values)
    sharding = sharding_of(mesh, "the batch", values.shape, axes)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def fetch(array: jax.Array) -> np.ndarray:
    """Copy a global array, whole, to the host of every process. All processes must call it."""
    if not array.is_fully_addressable and not array.is_fully_replicated:
        array = jax.jit(lambda array: array, out_shardings=NamedSharding(jax.sharding.get_mesh(), PartitionSpec()))(
            array
        )
    return np.asarray(array)


def fetch_own(array: jax.Array) -> np.ndarray:
    """Copy the rows `own_rows(B)` of a global array [B, …] to the host; other rows hold 0."""
    if array.is_fully_addressable:
        return np.asarray(array)
    spec = partition_spec(("rows", *(None,) * (array.ndim - 1)), MESH_AXES)
    array = jax.device_put(array, NamedSharding(jax.sharding.get_mesh(), spec))  # already there: nothing moves
    rows = np.zeros(array.shape, array.dtype)
    for shard in array.addressable_shards:
        rows[shard.index] = np.asarray(shard.data)
    return rows
