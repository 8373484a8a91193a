"""Scores from hidden states on a mesh of four devices, in a process of its own, against those on one device."""

import subprocess
import sys
import textwrap

SHARDED = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from rspo_jax.log_probs import head_log_probs

B, T, D, V = 4, 8, 16, 96
rng = np.random.default_rng(0)
arrays = (
    jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32),
    jnp.asarray(rng.normal(size=(D, V)), jnp.float32),
    jnp.asarray(rng.permutation(np.arange(B * T) * 3 % V).reshape(B, T), jnp.int32),
    jnp.asarray(rng.normal(size=(B, T)), jnp.float32),
)

def run(hidden, head, targets, weights, block_columns=20):
    def loss(hidden, head):
        scores = head_log_probs(hidden, head, targets, 0.7, block_columns=block_columns)
        return jnp.sum(scores.log_probs * weights), scores
    (_, scores), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, head)
    return *scores, *gradients

expected = jax.device_get(jax.jit(run)(*arrays))

def check(shape, rows, head, gathers_allowed, context=True):
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "tensor"))
    shardings = [NamedSharding(mesh, spec) for spec in (P(rows), head, P(rows), P(rows))]
    placed = [jax.device_put(array, sharding) for array, sharding in zip(arrays, shardings)]
    outputs = tuple(shardings[i] for i in (2, 2, 0, 1))
    function = jax.jit(run, in_shardings=tuple(shardings), out_shardings=outputs)
    if context:
        with jax.set_mesh(mesh):
            compiled = function.lower(*placed).compile()
    else:
        compiled = function.lower(*placed).compile()
    for got, want in zip(compiled(*placed), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    text = compiled.as_text()
    if not gathers_allowed:
        assert "all-gather" not in text and "all-to-all" not in text, re.findall(".*all-(?:gather|to-all).*", text)
    loops = re.findall(r"body=%([\\w.]+)", text)
    assert loops
    for name in loops if context else []:
        body = text.split("%" + name + " (")[1].split("\\n}")[0]
        assert "all-" not in body and "collective" not in body, body

check((2, 2), "data", P(None, "tensor"), False)
check((1, 4), None, P(None, "tensor"), False)
check((4, 1), "data", P(None, None), False)
check((2, 2), "data", P("data", "tensor"), True)
check((2, 2), "data", P(None, "tensor"), True, context=False)

with jax.set_mesh(Mesh(np.array(jax.devices()).reshape(1, 4), ("data", "tensor"))):
    one_block = jax.jit(run, static_argnums=4)(*arrays, None)
for got, want in zip(one_block, expected, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

with jax.set_mesh(Mesh(np.array(jax.devices()).reshape(4, 1), ("data", "tensor"))):
    try:
        jax.jit(run)(arrays[0][:3], arrays[1], arrays[2][:3], arrays[3][:3])
    except ValueError as error:
        assert "3 rows" in str(error), error
    else:
        raise AssertionError("3 rows were split over 4 devices")
print("sharded as unsharded")
"""


def test_on_a_mesh_as_on_one_device():
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "PYTHONPATH": "."}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(SHARDED)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.stdout.strip() == "sharded as unsharded", finished.stderr
