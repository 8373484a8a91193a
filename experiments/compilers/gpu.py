"""NVIDIA's compiler on a machine without GPUs: devices by name, and the bytes that their kernels spill from registers.

JAX's plugin for CUDA holds the compiler, and its wheels bring ptxas. Nothing here opens a GPU or runs a program.
"""

import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from experiments.compilers.chips import GPUS, Chip
from rspo_jax.sharding import lowering_for


class Target(NamedTuple):
    """A GPU as the compiler has to know it (xla/backends/gpu/target_config/specs)."""

    chip: Chip
    capability: tuple[int, int]
    multiprocessors: int
    clock_ghz: float
    cache_bytes: int
    shared_bytes: int
    """Shared memory of a multiprocessor."""
    shared_bytes_of_block: int
    accelerated: bool
    """True if it has instructions that no later capability has, as Hopper's matrix products of a warp group."""


_H100 = Target(
    chip=GPUS["h100"],
    capability=(9, 0),
    multiprocessors=132,
    clock_ghz=1.98,
    cache_bytes=52_428_800,
    shared_bytes=233_472,
    shared_bytes_of_block=232_448,
    accelerated=True,
)
TARGETS = {
    "a100": Target(
        chip=GPUS["a100"],
        capability=(8, 0),
        multiprocessors=108,
        clock_ghz=1.41,
        cache_bytes=41_943_040,
        shared_bytes=167_936,
        shared_bytes_of_block=166_912,
        accelerated=False,
    ),
    "h100": _H100,
    "h200": _H100._replace(chip=GPUS["h200"]),
}
_TARGET_CONFIG = """
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
  core_count: {target.multiprocessors} clock_rate_ghz: {target.clock_ghz} fpus_per_core: {fpus}
  device_memory_size: {target.chip.hbm_bytes} memory_bandwidth: {target.chip.bytes_per_second:.0f}
  l2_cache_size: {target.cache_bytes}
  shared_memory_per_core: {target.shared_bytes} shared_memory_per_block: 49152
  shared_memory_per_block_optin: {target.shared_bytes_of_block}
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  name: "{target.chip.device_kinds[0]}" driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0"
}}
platform_name: "CUDA"
runtime_version {{ major: 13 }}
dnn_version_info {{ major: 9 minor: 12 }}
device_description_str: "{target.chip.device_kinds[0]}"
"""


def gpu_mesh(name: str, axis: str) -> Mesh:
    """Return a mesh of one axis over GPUs of one host that need not exist.

    Args:
      name: a key of `TARGETS`, and the number of GPUs after a colon: "h200" or "h200:8".
      axis: the name of the mesh axis.

    Raises:
      RuntimeError: if JAX's plugin for CUDA is not installed.
      ValueError: if there is no such GPU, or the number is not positive.
    """
    gpu, _, number = name.partition(":")
    if gpu not in TARGETS or not re.fullmatch(r"([1-9]\d*)?", number):
        raise ValueError(f"no GPU is called {name!r}: name one of {', '.join(TARGETS)}, as h200, or h200:8 for eight")
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise RuntimeError("compiling for GPUs needs the compiler in JAX's plugin: pip install 'jax[cuda13]'")
    if not jax.config.jax_platforms:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_platforms", "cpu")  # else JAX looks for a GPU as soon as it needs a device
    jax.devices()  # loads the plugin
    topology = topologies.get_topology_desc(
        name, "cuda", target_config=target_config(TARGETS[gpu]), topology=f"1x1x{number or 1}"
    )
    return Mesh(np.array(topology.devices), (axis,))


def target_config(target: Target) -> str:
    """Return a target as a text of XLA's `GpuTargetConfigProto`."""
    major, minor = target.capability
    features = "feature_extension: ACCELERATED_FEATURES" if target.accelerated else ""
    fpus = 128 if major > 8 else 64
    return _TARGET_CONFIG.format(target=target, major=major, minor=minor, features=features, fpus=fpus)


class Kernel(NamedTuple):
    """A kernel that multiplies on tensor cores, and the spills that ptxas reports."""

    name: str
    spilled_bytes: int
    """Bytes that each thread writes to memory for want of registers."""


def kernels_of(function: Callable[..., Any], *arguments: Any) -> list[Kernel]:
    """Compile a function of arrays that need not exist, and ask ptxas about each of its kernels.

    Args:
      function: a function of pytrees of arrays.
      arguments: pytrees of `jax.ShapeDtypeStruct` with a sharding over GPUs.
    """
    with tempfile.TemporaryDirectory() as folder, lowering_for("cuda"):
        jax.jit(function).lower(*arguments).compile(compiler_options={"xla_dump_to": folder})
        return spills_of(path.read_text() for path in sorted(Path(folder).glob("*.ptx")))


def spills_of(texts: Iterable[str]) -> list[Kernel]:
    """Ask ptxas about the kernels that multiply on tensor cores, among texts of PTX with one kernel each."""
    kernels = []
    for text in texts:
        if not re.search(r"\bwgmma\.mma_async|\bmma\.sync", text):
            continue
        entry = re.search(r"\.entry (\w+)", text)
        architecture = re.search(r"^\.target (\w+)", text, re.MULTILINE)
        assert entry and architecture
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "kernel.ptx"
            source.write_text(text)
            command = [_ptxas(), "-v", f"-arch={architecture[1]}", source, "-o", Path(folder) / "kernel.cubin"]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        spilled = re.search(r"(\d+) bytes spill stores", report)
        assert spilled
        kernels.append(Kernel(re.sub(r"__\d+$", "", entry[1]), int(spilled[1])))
    return kernels


def _ptxas() -> Path:
    """Return the ptxas of the plugin's wheels, which is of the version that the plugin was built for."""
    wheels = importlib.util.find_spec("nvidia")
    assert wheels is not None and wheels.submodule_search_locations is not None
    return next(path for root in wheels.submodule_search_locations for path in Path(root).glob("*/bin/ptxas"))
