"""The table of logical axes, the mesh, and their refusals; nothing here compiles a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from rspo_jax.sharding import (
    MESH_AXES,
    RULES,
    MeshConfig,
    axes_of,
    constrain,
    fetch,
    fetch_own,
    from_own,
    make_mesh,
    own_rows,
    partition_spec,
    parts_of,
    sharding_of,
    shardings_of,
    spread,
)


def abstract_mesh(**sizes):
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)


def test_every_rule_names_axes_of_the_mesh_once():
    for axes in RULES.values():
        assert len(set(axes)) == len(axes) and set(axes) <= set(MESH_AXES)


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (("rows", "tokens", None), PartitionSpec(("data", "fsdp", "expert"), "context", None)),
        (("experts", "expert_embed", None, "expert_hidden"), PartitionSpec("expert", "fsdp", None, "tensor")),
        (("layers", "embed", "heads", None), PartitionSpec(None, ("fsdp", "expert"), "tensor", None)),
        ((), PartitionSpec()),
    ],
)
def test_the_table_says_what_splits_an_array(axes, expected):
    assert partition_spec(axes, MESH_AXES) == expected


def test_axes_that_the_mesh_lacks_split_nothing():
    assert partition_spec(("rows", "vocabulary"), ("data", "tensor")) == PartitionSpec("data", "tensor")
    assert partition_spec(("tokens",), ("data",)) == PartitionSpec(None)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="unknown logical axis 'row'; the table has rows, tokens"):
        partition_spec(("row",), MESH_AXES)


def test_a_collision_is_refused_with_both_axes():
    with pytest.raises(
        ValueError, match=r"mesh axis expert would split two axes of one array, experts and embed: change"
    ):
        partition_spec(("experts", "embed"), MESH_AXES)


def test_a_size_that_does_not_divide_is_refused_with_name_size_and_axes():
    mesh = abstract_mesh(fsdp=2, expert=3)
    with pytest.raises(
        ValueError, match=r"router has 16 embed, which the mesh axes fsdp, expert cannot split into 6 eq"
    ):
        sharding_of(mesh, "router", (16, 4), ("embed", None))
    assert sharding_of(mesh, "router", (18, 4), ("embed", None)).spec == PartitionSpec(("fsdp", "expert"), None)


def test_another_number_of_axes_is_refused():
    with pytest.raises(ValueError, match=r"router has shape \(4, 4\), but the logical axes \('embed',\)"):
        sharding_of(abstract_mesh(), "router", (4, 4), ("embed",))


def test_a_tree_of_arrays_names_the_leaf_that_does_not_fit():
    tree = {"moe": {"router": jnp.zeros((4, 3))}, "scale": jnp.zeros(3)}
    axes = {"moe": {"router": ("embed", None)}, "scale": (None,)}
    shardings = shardings_of(abstract_mesh(fsdp=4), tree, axes)
    assert shardings["moe"]["router"].spec == PartitionSpec(("fsdp", "expert"), None)
    assert shardings["scale"].spec == PartitionSpec(None)
    with pytest.raises(ValueError, match=r"\['moe'\]\['router'\] has 4 embed"):
        shardings_of(abstract_mesh(fsdp=8), tree, axes)


@pytest.mark.parametrize("sizes", [{"data": 0}, {"fsdp": -2}, {"fsdp": -1, "data": -1}])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="mesh axes must be positive, at most one of them -1"):
        MeshConfig(**sizes)


@pytest.mark.parametrize("rule", ["embd=fsdp", "embed", "embed=rows", "=fsdp"])
def test_impossible_rules_are_refused(rule):
    with pytest.raises(ValueError, match="which is not of the form name=axis,axis"):
        MeshConfig(rules=(rule,))


def test_rules_change_the_table():
    rules = MeshConfig(rules=("embed=fsdp", "vocabulary=")).parameter_rules
    assert rules["embed"] == ("fsdp",) and rules["vocabulary"] == ()
    assert {name: axes for name, axes in rules.items() if axes != RULES[name]}.keys() == {"embed", "vocabulary"}
    collision = MeshConfig(rules=("expert_embed=expert",)).parameter_rules
    with pytest.raises(ValueError, match="mesh axis expert would split two axes"):
        partition_spec(("experts", "expert_embed"), MESH_AXES, collision)


def test_a_mesh_needs_as_many_devices_as_it_has_places():
    with pytest.raises(ValueError, match=r"needs 4 devices, but there are 3"):
        make_mesh(MeshConfig(data=2, fsdp=2), jax.devices() * 3)
    with pytest.raises(ValueError, match=r"needs a multiple of 2 devices, but there are 3"):
        make_mesh(MeshConfig(data=2), jax.devices() * 3)


class Device:
    """A stand-in with the attributes that laying out a mesh looks at."""

    def __init__(self, index, slice_index):
        self.id, self.slice_index, self.process_index = index, slice_index, slice_index
        self.platform, self.device_kind = "cpu", "cpu"


def test_slices_are_crossed_by_data_alone():
    devices = [Device(index, index // 4) for index in range(8)]
    mesh = make_mesh(MeshConfig(data=4), devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices).reshape(4, 2)
    assert slices.tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(ValueError, match=r"mesh\.data is 1, but must be a multiple of the 2 slices"):
        make_mesh(MeshConfig(), devices)


def test_without_a_mesh_nothing_is_split():
    array = jnp.arange(6).reshape(2, 3)
    assert axes_of("rows") == () and parts_of("rows") == 1
    assert constrain(array, "rows", "tokens") is array
    assert own_rows(5).tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(from_own(np.asarray(array), "rows", None), array)
    assert np.array_equal(fetch(array), array) and np.array_equal(fetch_own(array), array)

    def double(array):
        return 2 * array

    assert spread(double, (("rows", None),), ("rows", None), ("array",)) is double
