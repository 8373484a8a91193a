"""NVIDIA's compiler on a machine without GPUs: devices by name, and what their kernels lack in registers.

JAX's plugin for CUDA holds the compiler, and its wheels bring ptxas. Nothing here opens a GPU or runs a program. This
file must never know what is being compiled.
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


class Chip(NamedTuple):
    """What the compiler has to know of a GPU, as XLA publishes it (xla/backends/gpu/target_config/specs)."""

    device_kind: str
    capability: tuple[int, int]
    multiprocessors: int
    clock_ghz: float
    memory_bytes: int
    memory_bytes_per_second: int
    cache_bytes: int
    shared_bytes: int
    """Of a multiprocessor."""
    shared_bytes_of_block: int
    accelerated: bool
    """Whether it has instructions that only this very capability has, as Hopper's matrix products of a warp group."""


_HOPPER = Chip(
    device_kind="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    multiprocessors=132,
    clock_ghz=1.98,
    memory_bytes=84_942_979_072,
    memory_bytes_per_second=3_352_320_000_000,
    cache_bytes=52_428_800,
    shared_bytes=233_472,
    shared_bytes_of_block=232_448,
    accelerated=True,
)
CHIPS = {
    "a100": Chip(
        device_kind="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        multiprocessors=108,
        clock_ghz=1.41,
        memory_bytes=84_987_740_160,
        memory_bytes_per_second=2_039_000_000_000,
        cache_bytes=41_943_040,
        shared_bytes=167_936,
        shared_bytes_of_block=166_912,
        accelerated=False,
    ),
    "h100": _HOPPER,
    "h200": _HOPPER._replace(
        device_kind="NVIDIA H200", memory_bytes=151_397_597_184, memory_bytes_per_second=4_800_000_000_000
    ),
}
_TARGET = """
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
  core_count: {chip.multiprocessors} clock_rate_ghz: {chip.clock_ghz} fpus_per_core: {fpus}
  device_memory_size: {chip.memory_bytes} memory_bandwidth: {chip.memory_bytes_per_second}
  l2_cache_size: {chip.cache_bytes}
  shared_memory_per_core: {chip.shared_bytes} shared_memory_per_block: 49152
  shared_memory_per_block_optin: {chip.shared_bytes_of_block}
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  name: "{chip.device_kind}" driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0"
}}
platform_name: "CUDA"
runtime_version {{ major: 13 }}
dnn_version_info {{ major: 9 minor: 12 }}
device_description_str: "{chip.device_kind}"
"""


def gpu_mesh(name: str, axis: str) -> Mesh:
    """A mesh of one axis over GPUs of one host that need not exist.

    Args:
      name: a chip of `CHIPS`, and with a colon their number: "h200" or "h200:8".
      axis: the name of the mesh axis.

    Raises:
      RuntimeError: if JAX's plugin for CUDA is not installed.
      ValueError: if there is no such chip, or the number is not a positive one.
    """
    chip, _, number = name.partition(":")
    if chip not in CHIPS or not re.fullmatch(r"([1-9]\d*)?", number):
        raise ValueError(f"no GPU is called {name!r}: name one of {', '.join(CHIPS)}, as h200, or h200:8 for eight")
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise RuntimeError("compiling for GPUs needs the compiler in JAX's plugin: pip install 'jax[cuda13]'")
    if not jax.config.jax_platforms:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_platforms", "cpu")  # else JAX looks for a GPU as soon as it needs a device
    jax.devices()  # loads the plugin
    topology = topologies.get_topology_desc(
        name, "cuda", target_config=target_of(CHIPS[chip]), topology=f"1x1x{number or 1}"
    )
    return Mesh(np.array(topology.devices), (axis,))


def target_of(chip: Chip) -> str:
    """The chip as a text of XLA's `GpuTargetConfigProto`."""
    major, minor = chip.capability
    features = "feature_extension: ACCELERATED_FEATURES" if chip.accelerated else ""
    return _TARGET.format(chip=chip, major=major, minor=minor, features=features, fpus=128 if major > 8 else 64)


class Kernel(NamedTuple):
    """What ptxas says of one kernel that multiplies on tensor cores."""

    name: str
    spilled_bytes: int
    """Of a thread, which writes them to memory for want of registers."""


def kernels_of(function: Callable[..., Any], *arguments: Any) -> list[Kernel]:
    """Compiles a function of arrays that need not exist, and asks ptxas about each of its kernels.

    Args:
      function: a function of pytrees of arrays.
      arguments: pytrees of `jax.ShapeDtypeStruct` with a sharding over GPUs.
    """
    with tempfile.TemporaryDirectory() as folder:
        jax.jit(function).lower(*arguments).compile(compiler_options={"xla_dump_to": folder})
        return spills_of(path.read_text() for path in sorted(Path(folder).glob("*.ptx")))


def spills_of(texts: Iterable[str]) -> list[Kernel]:
    """What ptxas says of the kernels, one a text of PTX, that multiply on tensor cores."""
    return [_ask_ptxas(text) for text in texts if re.search(r"\bwgmma\.mma_async|\bmma\.sync", text)]


def _ask_ptxas(text: str) -> Kernel:
    found = re.search(r"\.entry (\w+)", text)
    target = re.search(r"^\.target (\w+)", text, re.MULTILINE)
    assert found and target
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(text)
        command = [_ptxas(), "-v", f"-arch={target[1]}", source, "-o", Path(folder) / "kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert spilled
    return Kernel(re.sub(r"__\d+$", "", found[1]), int(spilled[1]))


def _ptxas() -> Path:
    """The one that comes with the plugin's wheels, of the version that the plugin was built for."""
    wheels = importlib.util.find_spec("nvidia")
    assert wheels is not None and wheels.submodule_search_locations is not None
    return next(path for root in wheels.submodule_search_locations for path in Path(root).glob("*/bin/ptxas"))
