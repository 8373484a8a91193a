"""Sharded equals unsharded: on eight devices, under meshes that use every axis, scoring, objective, gradient, update,
sampler and checkpoint give what one device gives. `mesh_program.py` computes it in a process that has the devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import QUICK

pytestmark = pytest.mark.slow
MESHES = {
    "data": {"data": 8, "fsdp": 1},
    "fsdp": {"fsdp": 8},
    "experts exchanged": {"fsdp": 2, "expert": 4},
    "experts gathered, and tensor": {"data": 2, "fsdp": 1, "expert": 2, "tensor": 2},
    "context": {"fsdp": 2, "context": 4},
    "all but data and fsdp": {"fsdp": 1, "expert": 2, "tensor": 2, "context": 2},
}


@pytest.fixture(scope="module")
def report():
    flags = f"--xla_force_host_platform_device_count=8 {QUICK}"
    finished = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "support" / "mesh_program.py"), json.dumps(MESHES)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", MESHES)
def test_all_numbers_are_those_of_one_device(report, mesh):
    distances = report[mesh]["distances"]
    assert {"old_log_probs", "statistics/loss", "statistics/gamma_mean", "statistics/grad_norm"} <= set(distances)
    assert sum(name.startswith("state/opt_state") for name in distances) > 20  # the first moment is the gradient
    # Drift lies on a grid of 1/1024 nat, and a log-prob between two of its points may be rounded either way.
    limits = {name: 1e-3 if "drift" in name else 1e-5 for name in distances}
    assert {name: value for name, value in distances.items() if not value < limits[name]} == {}


@pytest.mark.parametrize("mesh", MESHES)
def test_the_sampler_draws_the_tokens_of_one_device(report, mesh):
    assert {"tokens", "sampler_mask", "state/updates", "state/skipped"} <= set(report[mesh]["equal"])
    assert all(report[mesh]["equal"].values()), report[mesh]["equal"]


@pytest.mark.parametrize("mesh", MESHES)
def test_an_update_leaves_the_state_where_it_was(report, mesh):
    assert report[mesh]["kept"]


@pytest.mark.parametrize("mesh", MESHES)
def test_a_checkpoint_restores_on_another_mesh_and_on_one_device(report, mesh):
    assert all(report[mesh]["restored"].values()), report[mesh]["restored"]
