"""Experts on several devices give what a dense sum over all experts gives, whichever way the tokens travel, also where
the busiest device needs several rounds. `expert_parallel_program.py` computes it in a process that has four devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from models.expert_parallel import mix_experts
from models.experts import Experts
from rspo_jax.sharding import MESH_AXES

CASES = {
    "gathered, skewed, clamped": 8,
    "exchanged, even, silu": 6,
    "exchanged, skewed, clamped": 8,
    "exchanged, all to the first device, silu": 6,
    "exchanged in pairs, with tensor, skewed, clamped": 8,
    "gathered, with context, skewed, clamped": 8,
    "no expert axis, skewed, clamped": 8,
    "no expert axis, skewed, silu": 6,
    "ragged, skewed, clamped": 8,
}
"""And how many arrays are compared: two outputs and the gradients."""


@pytest.fixture(scope="module")
def report():
    flags = "--xla_force_host_platform_device_count=4 --xla_llvm_disable_expensive_passes=true"
    finished = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "support" / "expert_parallel_program.py")],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_those_of_the_dense_sum(report, case):
    assert len(report[case]) == CASES[case] and max(report[case]) < 1e-6


def test_there_is_no_other_case(report):
    assert set(report) == set(CASES)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 3}, "the batch has 4 rows, which the mesh axes fsdp cannot split into 3 equal parts"),
        ({"expert": 4}, "gate_up has 6 experts, which the mesh axes expert cannot split into 4 equal parts"),
        ({"tensor": 2}, "gate_up has 5 expert_hidden, which the mesh axes tensor cannot split into 2 equal parts"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(sizes, message):
    mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)
    shapes = ((4, 2, 8), (4, 2, 2), (6, 8, 2, 5), (6, 5, 8))
    x, weights, gate_up, down = (jnp.zeros(shape) for shape in shapes)
    expert_ids = jnp.zeros((4, 2, 2), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match=message):
        mix_experts(x, weights, expert_ids, Experts(gate_up, down))
