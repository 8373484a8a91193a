"""Parameters on several devices, read into their places there and written from them.

One process with eight devices, which imports this file, runs all of it.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from support import hf_cases
from support.hf_comparison import same_bits

import models
from models.logical_axes import model_axes
from rspo_jax.sharding import MeshConfig, make_mesh, shardings_of

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import sys
from pathlib import Path
import test_devices, test_tensors

folder = Path(sys.argv[1])
test_devices.read_on_a_mesh(folder / "model", folder / "read.npz")
print("read on a mesh", flush=True)
test_tensors.check_four_devices(folder / "tensors")
print("written from four devices", flush=True)
"""


def read_on_a_mesh(folder, file):
    """Read a folder on eight devices, and leave the parameters in a file."""
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    with jax.set_mesh(mesh):
        config, params = models.load_hf(folder)
    places = shardings_of(mesh, params, model_axes(config))
    for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(places), strict=True):
        assert leaf.sharding == place
    experts = params["layers"]["moe"]["gate_up"]
    assert experts.addressable_data(0).size * 8 == experts.size
    np.savez(file, *map(np.asarray, jax.tree.leaves(params)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of the process with eight devices, and the process once it has ended."""
    folder = tmp_path_factory.mktemp("devices")
    for name in ("model", "tensors"):
        (folder / name).mkdir()
    # The family with the fewest shapes: each device compiles a program for each of them.
    hf_cases.write_golden_folder("mixtral_sliding", folder / "model")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent))),
    }
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, folder],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return folder, finished


def test_on_a_mesh_each_device_gets_its_own_part(run):
    folder, finished = run
    assert "read on a mesh" in finished.stdout, finished.stderr
    _, params = models.load_hf(folder / "model")
    assert same_bits([*np.load(folder / "read.npz").values()], jax.tree.leaves(params))


def test_devices_are_given_their_parts_and_give_them_back(run):
    _, finished = run
    assert "written from four devices" in finished.stdout and finished.returncode == 0, finished.stderr
