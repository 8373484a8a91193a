"""Costs of a compiled program as XLA itself counts them: its cost analysis and its memory analysis."""

from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Costs:
    """Costs of a compiled program, per device. The body of a loop counts once, however often it runs."""

    flops: float
    transcendentals: float
    """Calls of exp, log and the like, which count as no FLOPs."""
    bytes_accessed: float
    """Bytes that all kernels together read and write, in whatever memory or cache."""
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    """Most bytes alive at once besides arguments and outputs."""
    peak_bytes: int
    """Most bytes alive at once, arguments and outputs included; a donated argument counts once. 0 if unknown. The CPU's
    compiler leaves temporaries out."""
    optimal_seconds: float | None
    """The TPU compiler's own estimate of the time; None from other compilers."""

    @property
    def compulsory_bytes(self) -> int:
        """Bytes that any program with these arguments and outputs must read or write once."""
        return self.argument_bytes + self.output_bytes


def read_costs(compiled: jax.stages.Compiled) -> Costs:
    """Read the compiler's cost and memory analysis.

    Raises:
      RuntimeError: if the backend's compiler gives none.
    """
    cost: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    if not cost or memory is None:
        raise RuntimeError("this backend's compiler gives no cost or memory analysis")
    optimal = cost.get("optimal_seconds")
    return Costs(
        flops=cost.get("flops", 0.0),
        transcendentals=cost.get("transcendentals", 0.0),
        bytes_accessed=cost.get("bytes accessed", 0.0),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=getattr(memory, "peak_memory_in_bytes", 0),  # not in every version of jaxlib
        optimal_seconds=optimal if optimal and optimal > 0 else None,
    )
