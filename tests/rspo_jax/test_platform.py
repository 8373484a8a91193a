"""The platform that programs are traced for, and that no trace is used for another one."""

import jax
import pytest

from rspo_jax.sharding import lowering_for, make_mesh, on_each_device, platform


def test_the_default_backend_is_the_platform_unless_something_else_is_named():
    assert platform() == jax.default_backend() == "cpu"
    with jax.default_device("cpu"):
        assert platform() == "cpu"
    with lowering_for("tpu"), jax.set_mesh(make_mesh()):
        assert platform() == "tpu"
        with lowering_for("gpu"):
            assert platform() == "cuda"
    assert platform() == "cpu"


@pytest.mark.parametrize("within_each_device", [False, True])
def test_a_mesh_names_the_platform_of_its_devices(within_each_device):
    found = []

    def note(x):
        found.append(platform())
        return x

    device = jax.sharding.AbstractDevice(device_kind="TPU v5p", num_cores=1, platform="tpu")
    axis_types = (jax.sharding.AxisType.Explicit,)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), axis_types, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        spec = jax.sharding.PartitionSpec()
        jax.jit(on_each_device(note, spec, spec) if within_each_device else note).trace(1.0)
    assert found == ["tpu"]


def test_one_function_is_traced_anew_for_each_platform():
    traced = []

    @jax.jit
    def note(x):
        traced.append(platform())
        return x

    # The cache of an outer function's trace and that of an inner one's both have to tell platforms apart.
    outer = jax.jit(lambda x: jax.checkpoint(note)(x))
    for name in ("cpu", "tpu", "cuda", "tpu", "cpu"):
        with lowering_for(name):
            outer.trace(1.0)
            jax.jit(jax.grad(outer)).trace(1.0)
            jax.eval_shape(outer, 1.0)
    assert traced == ["cpu", "tpu", "cuda"]
