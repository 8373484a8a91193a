"""Arrays on a mesh of four devices, in a process of its own."""

import os
import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from rspo_jax.sharding import MeshConfig, constrain, fetch, fetch_own, from_own, make_mesh, own_rows, parts_of, spread

with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, tensor=2))):
    assert (parts_of("rows"), parts_of("vocabulary"), parts_of("tokens")) == (2, 2, 1)
    values = np.arange(12.0, dtype=np.float32).reshape(4, 3)
    array = from_own(values, "rows", None)
    assert {shard.data.shape for shard in array.addressable_shards} == {(2, 3)}
    assert own_rows(4).tolist() == [0, 1, 2, 3]
    assert np.array_equal(fetch(array), values) and np.array_equal(fetch_own(array), values)
    laid = jax.jit(lambda x: constrain(x, None, "vocabulary"))(values[:, :2])
    assert {shard.data.shape for shard in laid.addressable_shards} == {(4, 1)}
    whole = jax.jit(lambda x: constrain(x, "rows", "vocabulary"))(values)  # 3 columns stay whole
    assert {shard.data.shape for shard in whole.addressable_shards} == {(2, 3)}
    shapes = []
    def local(x, y):
        shapes.append((x.shape, y.shape))
        return x + y
    out = jax.jit(spread(local, (("rows", None), ("rows", None)), ("rows", None), ("x", "y")))(array, array)
    assert shapes[0] == ((2, 3), (2, 3)) and np.array_equal(out, 2 * values)
    try:
        spread(local, (("rows", None), ("rows", None)), ("rows", None), ("x", "y"))(array, array[:3])
    except ValueError as error:
        assert "y has 3 rows, which the mesh axes fsdp cannot split into 2 equal parts" in str(error), error
    else:
        raise AssertionError("3 rows were split into 2 parts")
print("done")
"""


def test_on_four_devices():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.stdout.strip() == "done", finished.stderr
