"""Collectives: their kinds, groups in every notation of XLA, bytes, and a program for four devices."""

import json
import os
import subprocess
import sys

import pytest

from experiments.compilers import collectives, hlo, work

MESH = {"data": 2, "fsdp": 4, "expert": 8}
LISTS = {
    "expert": "{" + ",".join("{" + ",".join(str(8 * i + j) for j in range(8)) + "}" for i in range(8)) + "}",
    "fsdp": "{"
    + ",".join("{" + ",".join(str(32 * i + 8 * j + k) for j in range(4)) + "}" for i in range(2) for k in range(8))
    + "}",
}


def one(line: str, mesh=MESH) -> collectives.Collective:
    text = (
        "ENTRY %main (x: f32[16,4]) -> f32[16,4] {\n  %x = f32[16,4]{1,0} parameter(0)\n" + f"  ROOT {line}\n" + "}\n"
    )
    program = hlo.parse_hlo(text)
    assert collectives.kind_of(program.entry.root)
    return collectives.read_collective(program.entry, program.entry.root, mesh)


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        (LISTS["expert"], ("expert",), 8),
        (LISTS["fsdp"], ("fsdp",), 4),
        ("[8,8]<=[64]", ("expert",), 8),
        ("[16,4]<=[2,4,8]T(0,2,1)", ("fsdp",), 4),
        ("[32,2]<=[2,32]T(1,0)", ("data",), 2),
        ("[2,32]<=[64]", ("fsdp", "expert"), 32),
        ("[1,64]<=[64]", collectives.ALL_DEVICES, 64),
        ("{}", collectives.ALL_DEVICES, 64),
        ("mesh['axis_0'=2,'axis_1'=4,'axis_2'=8] {'axis_1','axis_2'}", ("fsdp", "expert"), 32),
        ("mesh['axis_0'=2,'axis_1'=4,'axis_2'=8] {'axis_2','axis_1'}", ("fsdp", "expert"), 32),
        ("mesh['axis_0'=2,'axis_1'=4,'axis_2'=8] {'axis_0'}", ("data",), 2),
        ("mesh['a'=64] {'a':(2)4}", ("fsdp",), 4),
        ("mesh['a'=64] {'a':(1)2}", ("data",), 2),
        ("mesh['a'=8,'b'=8], device_ids=([8,8]T(1,0)) {'b'}", ("data", "fsdp"), 8),
    ],
)
def test_groups_in_every_notation(groups, axes, size):
    found = one(f"%a = f32[16,4]{{1,0}} all-gather(%x), channel_id=1, replica_groups={groups}, dimensions={{0}}")
    assert found.axes == axes
    assert found.bytes_received == 16 * 4 * 4 * (size - 1)


@pytest.mark.parametrize(
    ("line", "kind", "share"),
    [
        ("all-gather(%x), replica_groups=[8,8]<=[64], dimensions={0}", "all-gather", 7),
        ("all-gather-start(%x), replica_groups=[8,8]<=[64], dimensions={0}", "all-gather", 7),
        ("all-reduce(%x), replica_groups=[8,8]<=[64], to_apply=%add", "all-reduce", 2 * 7 / 8),
        ("all-reduce-start(%x), replica_groups=[8,8]<=[64], to_apply=%add", "all-reduce", 2 * 7 / 8),
        ("all-reduce(%x, %x), replica_groups=[8,8]<=[64], to_apply=%add", "all-reduce", 4 * 7 / 8),
        ("reduce-scatter(%x), replica_groups=[8,8]<=[64], dimensions={0}", "reduce-scatter", 7 / 8),
        ("all-to-all(%x), replica_groups=[8,8]<=[64], dimensions={0}", "all-to-all", 7 / 8),
        ("ragged-all-to-all(%x, %x, %x), replica_groups=[8,8]<=[64]", "ragged-all-to-all", 7 / 8),
        ("collective-broadcast(%x), replica_groups=[8,8]<=[64]", "collective-broadcast", 1),
        ("all-reduce(%x), replica_groups=[64,1]<=[64], to_apply=%add", "all-reduce", 0),
    ],
)
def test_bytes_by_kind(line, kind, share):
    found = one(f"%a = f32[16,4]{{1,0}} {line}")
    assert found.kind == kind
    assert found.bytes_received == pytest.approx(256 * share)


def test_a_permutation_counts_what_changes_its_place():
    pairs = ",".join(f"{{{i},{8 * (i // 8) + (i + 1) % 8}}}" for i in range(32))  # half of the devices, along "expert"
    kept = ",".join(f"{{{i},{i}}}" for i in range(32, 64))
    line = "%a = f32[16,4]{1,0} collective-permute-start(%x), channel_id=3, source_target_pairs="
    found = one(line + "{" + f"{pairs},{kept}" + "}")
    assert (found.kind, found.axes, found.bytes_received) == ("collective-permute", ("expert",), 128)


def test_without_a_mesh_the_axes_are_unknown():
    found = one("%a = f32[16,4]{1,0} all-gather(%x), replica_groups=[8,8]<=[64]", mesh={})
    assert found.axes == collectives.UNKNOWN_AXES and found.bytes_received == 7 * 256


def test_the_end_of_an_asynchronous_collective_is_not_counted_again():
    for opcode in ("all-gather-done", "collective-permute-done", "async-done", "add"):
        instruction = hlo.Instruction("a", opcode, (hlo.ArrayType("f32", (4,)),), False, (), "", "")
        assert collectives.kind_of(instruction) is None


SCATTER = """
%all-reduce-scatter (input: bf16[30,8]) -> bf16[4,8] {
  %input = bf16[30,8]{1,0} parameter(0)
  %zero = bf16[] constant(0)
  %pad = bf16[32,8]{1,0} pad(%input, %zero), padding=0_2x0_0
  %all-reduce.5 = bf16[32,8]{1,0:T(8,128)(2,1)} all-reduce(%pad), replica_groups=[8,8]<=[64], to_apply=%add
  %start = u32[] constant(0)
  ROOT %slice = bf16[4,8]{1,0} dynamic-slice(%all-reduce.5, %start, %start), dynamic_slice_sizes={4,8}
}

ENTRY %main (x: bf16[30,8]) -> bf16[4,8] {
  %x = bf16[30,8]{1,0} parameter(0)
  ROOT %fusion = bf16[4,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_the_tpu_form_of_a_reduce_scatter():
    found = work.count(hlo.parse_hlo(SCATTER), MESH)
    assert found.by_collective() == {("reduce-scatter", ("expert",)): 32 * 8 * 2 * 7 / 8}


PROGRAM = """
import functools, json, jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from experiments.compilers import hlo
from experiments.compilers import work

mesh = jax.make_mesh((2, 2), ("data", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

@functools.partial(jax.shard_map, mesh=mesh, in_specs=P(("data", "expert")), out_specs=P(("data", "expert")))
def step(x):
    def body(x, _):
        whole = jax.lax.all_gather(jnp.sin(x), "expert", tiled=True)
        x = jax.lax.psum_scatter(whole, "expert", tiled=True)
        x = jax.lax.all_to_all(x, "data", 1, 0, tiled=True).reshape(x.shape)
        return jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]), None
    x, _ = jax.lax.scan(body, x, length=6)
    return x + jax.lax.psum(x, ("data", "expert"))

text = jax.jit(step).lower(jax.ShapeDtypeStruct((16, 4), jnp.float32)).compile().as_text()
moved = work.count(hlo.parse_hlo(text), dict(mesh.shape)).collectives
print(json.dumps([[m.kind, list(m.axes), m.bytes_received, m.times] for m in moved]))
"""


def test_a_program_for_four_devices():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = {(kind, tuple(axes)): (size, times) for kind, axes, size, times in json.loads(done.stdout)}
    own = 4 * 4 * 4  # bytes of [4, 4] float32
    assert found == {
        ("all-gather", ("expert",)): (own, 6),
        ("reduce-scatter", ("expert",)): (own, 6),
        ("all-to-all", ("data",)): (own / 2, 6),
        ("collective-permute", ("data",)): (own, 6),
        ("all-reduce", ("all devices",)): (2 * own * 3 / 4, 1),
    }
