"""Figures of one program of a pod, from the TPU compiler: memory, arithmetic and collectives of one device."""

import math
import time
from dataclasses import asdict
from typing import Any

import jax

from experiments.compilers import hlo, memory, tpu, work
from experiments.compilers.chips import Chip
from experiments.compilers.costs import read_costs
from experiments.compilers.hlo import Instruction
from experiments.pod import programs
from experiments.pod.model_flops import model_flops
from experiments.pod.programs import ProgramName, Setting

ARGUMENTS = {
    "parameters": ("state.params", "params"),
    "optimizer": ("state.opt_state",),
    "route": ("batch.old_route",),
    "kv_cache": ("cache.layers",),
}
"""Kind of argument -> prefixes of the paths of its arrays."""
_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
"""Matrix products of the attention kernels, each over all pairs of a token and an earlier one."""
MOST_COLLECTIVES = 12
"""Number of collectives that a report lists one by one."""


def attention_flops(kernel: Instruction, operands: list[Instruction]) -> float | None:
    """Return the FLOPs of JAX's splash attention over the pairs under the causal mask; None for another kernel.

    It declares none to the compiler. The kernel skips tiles above the diagonal and computes whole tiles on it.
    """
    products = next((number for name, number in _PRODUCTS.items() if name in kernel.op_name), None)
    floats = [array for operand in operands for array in operand.arrays if array.dtype in ("bf16", "f32")]
    if products is None or not floats or len(floats[0].dims) < 3:
        return None
    *rows, heads, tokens, head_dim = floats[0].dims  # the queries; without an axis of rows if a device has one row
    return 2.0 * products * math.prod(rows) * heads * head_dim * tokens * (tokens + 1) / 2


def analyse(
    program: ProgramName, setting: Setting, objective: str, mesh: jax.sharding.Mesh, chip: Chip
) -> dict[str, Any]:
    """Compile one of `programs.PROGRAMS` and read the compiler's texts.

    Returns:
      Plain figures of one device, ready for JSON. If the compiler fails, `error` holds its message and there are no
      figures of memory and work.

    Raises:
      ValueError: if the mesh does not divide an array, before anything is compiled.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    figures: dict[str, Any] = {"program": program, "objective": objective, "layers": setting.model.num_layers}
    lowered = programs.lower(program, setting, objective, mesh)
    figures["lower_seconds"] = time.perf_counter() - started
    try:
        reading = tpu.compile_and_read(lowered)
    except jax.errors.JaxRuntimeError as error:
        return figures | {"error": str(error).splitlines()[0], "fits": False}
    cpu_seconds = time.process_time() - cpu_started
    figures |= {"compile_seconds": reading.seconds, "cpu_seconds": cpu_seconds, "error": "", "refusal": reading.refusal}
    costs = read_costs(reading.compiled) if reading.compiled else None
    parsed = hlo.parse_hlo(reading.text)
    done = work.count(parsed, dict(mesh.shape), attention_flops)
    held = _memory(memory.read_memory(parsed, reading.buffers, reading.peak), chip)
    held["alive"] = costs and costs.peak_bytes
    largest = sorted(done.collectives, key=lambda moved: -moved.total_bytes)[:MOST_COLLECTIVES]
    by_kind = [{"kind": kind, "axes": list(axes), "bytes": size} for (kind, axes), size in done.by_collective().items()]
    return figures | {
        "fits": reading.compiled is not None,
        "memory": held,
        "flops": _flops(done, program, setting, mesh.size, chip),
        "collectives": {
            "bytes": done.bytes_received,
            "by_kind": by_kind,
            "largest": [asdict(moved) | {"bytes": moved.total_bytes} for moved in largest],
        },
        "optimal_seconds_loops_once": costs and costs.optimal_seconds,
        "cycles": done.cycles,
        "unknown_loops": list(done.unknown_loops),
        "undeclared_kernels": list(done.undeclared_kernels),
    }


def _memory(held: memory.Memory, chip: Chip) -> dict[str, Any]:
    parts = {name: held.of(*prefixes) for name, prefixes in ARGUMENTS.items()}
    return parts | {
        "other_arguments": sum(held.arguments.values()) - sum(parts.values()),
        "results": held.results,
        "activations": held.temporaries,
        "constants": held.constants,
        "peak": held.peak,
        "hbm": chip.hbm_bytes,
        "largest": [asdict(buffer) for buffer in held.largest],
    }


def _flops(done: work.Work, program: ProgramName, setting: Setting, devices: int, chip: Chip) -> dict[str, float]:
    needed = model_flops(program, setting)
    return {
        "total": done.flops,
        "matrix": done.matrix_flops,
        "kernels": done.kernel_flops,
        "elementwise": done.elementwise_flops,
        "model": needed.needed / devices,
        "model_with_remat": needed.with_remat / devices,
        "seconds_at_peak": done.flops / chip.flops_per_second,
    }
