"""Work of one run of a compiled program on one device: FLOPs and bytes moved.

The body of a loop counts as often as it runs; a loop whose number of turns depends on data counts once and is named.
The branch of a conditional with the most FLOPs counts. Padding that the compiler adds inside a kernel does not count,
as it is not in the program's text.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from experiments.compilers import collectives
from experiments.compilers.collectives import Collective
from experiments.compilers.hlo import Computation, Instruction, Program, Value

# Opcodes that XLA's own cost analysis counts as one FLOP an element, and as one transcendental.
# fmt: off
ELEMENTWISE = frozenset({
    "add", "subtract", "multiply", "divide", "maximum", "minimum", "remainder", "abs", "negate", "sign",
    "floor", "ceil", "round-nearest-even", "round-nearest-afz", "compare", "select", "clamp", "and", "or",
    "xor", "not", "shift-left", "shift-right-logical", "shift-right-arithmetic", "is-finite", "convert",
    "popcnt", "count-leading-zeros",
})
TRANSCENDENTAL = frozenset({
    "exponential", "exponential-minus-one", "log", "log-plus-one", "logistic", "power", "rsqrt", "sqrt",
    "cbrt", "sine", "cosine", "tan", "tanh", "atan2", "erf",
})
# fmt: on
_DECLARED_FLOPS = re.compile(r'"cost_estimate":\{[^}]*"flops":"(\d+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NO_ESTIMATE = 1 << 62
KERNEL = "tpu_custom_call"

KernelFlops = Callable[[Instruction, list[Instruction]], float | None]


@dataclass(frozen=True)
class Work:
    """The work of one run."""

    matrix_flops: float = 0.0
    """FLOPs of matrix products and convolutions; a multiplication and an addition are two."""
    kernel_flops: float = 0.0
    """FLOPs of hand-written kernels, as declared to the compiler or known to the caller."""
    elementwise_flops: float = 0.0
    """FLOPs of elementwise operations, one an element, and of reductions, one a term, as XLA counts them."""
    transcendentals: float = 0.0
    """Calls of exp, log and the like, which count as no FLOPs."""
    cycles: float = 0.0
    """The TPU compiler's estimate of the operations for which it gives one: neither kernels nor collectives."""
    collectives: tuple[Collective, ...] = ()
    unknown_loops: tuple[str, ...] = ()
    """Loops that were counted once because their number of turns depends on data."""
    undeclared_kernels: tuple[str, ...] = ()
    """Hand-written kernels whose FLOPs are unknown."""

    @property
    def flops(self) -> float:
        return self.matrix_flops + self.kernel_flops + self.elementwise_flops

    @property
    def bytes_received(self) -> float:
        return sum(collective.total_bytes for collective in self.collectives)

    def plus(self, other: "Work") -> "Work":
        """Return the work of both, one after the other."""
        return Work(**{name: value + vars(other)[name] for name, value in vars(self).items()})

    def times(self, count: float) -> "Work":
        """Return the work of `count` runs."""
        numbers = {name: value * count for name, value in vars(self).items() if not isinstance(value, tuple)}
        moved = tuple(replace(collective, times=collective.times * count) for collective in self.collectives)
        return replace(self, collectives=moved, **numbers)

    def by_collective(self) -> dict[tuple[str, tuple[str, ...]], float]:
        """Return (kind, axes) -> bytes that a device receives, largest first."""
        sums: dict[tuple[str, tuple[str, ...]], float] = {}
        for moved in self.collectives:
            sums[moved.kind, moved.axes] = sums.get((moved.kind, moved.axes), 0.0) + moved.total_bytes
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class _Context:
    """Everything that stays the same while a program is read."""

    program: Program
    mesh: Mapping[str, int]
    kernel_flops: KernelFlops | None
    counted: dict[tuple[str, bool, Value], Work]
    """(computation, is it a fusion's, its parameters) -> its work, so that each is read once."""


def count(program: Program, mesh: Mapping[str, int] | None = None, kernel_flops: KernelFlops | None = None) -> Work:
    """Count the work of one run of a program.

    Args:
      program: a program for one device.
      mesh: axis -> size, in the order of the mesh's axes, to tell which axes a collective spans.
      kernel_flops: returns the FLOPs of a hand-written TPU kernel that declares none, from its instruction and its
        operands, or None if it does not know them.
    """
    return _count_computation(_Context(program, mesh or {}, kernel_flops, {}), program.entry, None, False)


def _count_computation(context: _Context, computation: Computation, parameters: Value, is_fused: bool) -> Work:
    key = (computation.name, is_fused, parameters)
    if key not in context.counted:
        total = Work()
        for instruction in computation.instructions.values():
            work = _count_instruction(context, computation, instruction, parameters, is_fused)
            cycles = _CYCLES.search(instruction.attributes)
            if cycles and int(cycles[1]) < _NO_ESTIMATE:
                work = replace(work, cycles=float(cycles[1]))
            total = total.plus(work)
        context.counted[key] = total
    return context.counted[key]


def _count_instruction(
    context: _Context, computation: Computation, instruction: Instruction, parameters: Value, is_fused: bool
) -> Work:
    program, opcode = context.program, instruction.opcode
    if collectives.kind_of(instruction):
        return Work(collectives=(collectives.read_collective(computation, instruction, context.mesh, is_fused),))
    match opcode:
        case "while":
            body = program.computations[instruction.called("body")[0]]
            trips = program.trip_count(computation, instruction, parameters)
            carried = program.carried(computation, instruction, parameters)
            once = _count_computation(context, body, carried, False)
            if trips is None:
                return once.plus(Work(unknown_loops=(instruction.op_name or instruction.name,)))
            return once.times(trips)
        case "fusion" | "call" | "async-start":
            values = tuple(program.value(computation, name, parameters) for name in instruction.operands)
            callee = program.computations[instruction.callee]
            return _count_computation(context, callee, values, opcode == "fusion")
        case "conditional":
            names = instruction.called("branch_computations") or [
                *instruction.called("true_computation"),
                *instruction.called("false_computation"),
            ]
            branches = [_count_computation(context, program.computations[name], None, False) for name in names]
            return max(branches, key=lambda work: (work.flops, work.bytes_received))
        case "custom-call":
            return _custom_call(context, computation, instruction)
    return _arithmetic(program, computation, instruction)


def _custom_call(context: _Context, computation: Computation, instruction: Instruction) -> Work:
    declared = _DECLARED_FLOPS.search(instruction.attributes)
    if declared:
        return Work(kernel_flops=float(declared[1]))
    if called := instruction.called("called_computations"):  # by a TPU's SparseCore, for one
        parts = [_count_computation(context, context.program.computations[name], None, False) for name in called]
        return functools.reduce(Work.plus, parts)
    if (instruction.attribute("custom_call_target") or "").strip('"') != KERNEL:
        return Work()
    known = context.kernel_flops and context.kernel_flops(instruction, list(computation.operands(instruction)))
    if known is None:
        return Work(undeclared_kernels=(instruction.op_name or instruction.name,))
    return Work(kernel_flops=known)


def _arithmetic(program: Program, computation: Computation, instruction: Instruction) -> Work:
    opcode, elements = instruction.opcode, instruction.arrays[0].elements if instruction.arrays else 0
    if opcode in ELEMENTWISE:
        return Work(elementwise_flops=float(elements))
    if opcode in TRANSCENDENTAL:
        return Work(transcendentals=float(elements))
    operands = list(computation.operands(instruction))
    match opcode:
        case "dot":
            contracted = math.prod(operands[0].arrays[0].dims[i] for i in instruction.numbers("lhs_contracting_dims"))
            return Work(matrix_flops=2.0 * elements * contracted)
        case "convolution":
            return Work(matrix_flops=_convolution_flops(instruction, *(operand.arrays[0].dims for operand in operands)))
        case "reduce":
            terms = operands[0].arrays[0].elements - elements
        case "reduce-window":
            # The additions of a sliding reduction; a window that always covers a whole axis reduces it only once.
            window = re.search(r"size=([\dx]+)", instruction.attributes)
            inputs, outputs = operands[0].arrays[0].dims, instruction.arrays[0].dims
            sizes = [int(size) for size in window[1].split("x")] if window else [1] * len(outputs)
            results, met = 1, 1
            for size, before, after in zip(sizes, inputs, outputs, strict=True):
                is_whole = before == after > 1 and size >= 2 * before - 1
                results, met = results * (1 if is_whole else after), met * (before if is_whole else size)
            terms = float(results * (met - 1))
        case "scatter":
            terms = operands[-1].arrays[0].elements
        case _:
            return Work()
    inner = program.computations[instruction.callee].instructions.values()
    return Work(elementwise_flops=float(terms * sum(step.opcode in ELEMENTWISE for step in inner)))


@dataclass(frozen=True)
class _Window:
    """One spatial axis of a convolution."""

    size: int
    stride: int = 1
    pad_low: int = 0
    lhs_dilate: int = 1
    rhs_dilate: int = 1

    def valid_pairs(self, inputs: int, outputs: int) -> int:
        """Return the number of pairs of output and kernel positions that meet an input, not padding or a gap."""
        kernel, output = np.ogrid[: self.size, :outputs]
        place = output * self.stride - self.pad_low + kernel * self.rhs_dilate
        return int(np.sum((place >= 0) & (place % self.lhs_dilate == 0) & (place // self.lhs_dilate < inputs)))


def _convolution_flops(instruction: Instruction, inputs: tuple[int, ...], kernel: tuple[int, ...]) -> float:
    """Return two FLOPs for each product that is not with padding, as XLA counts them.

    The TPU compiler writes matrix products as convolutions.
    """
    labels = re.match(r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels") or "")
    assert labels is not None
    of_input, _, of_output = labels.groups()
    outputs = instruction.arrays[0].dims
    axes = sorted(label for label in of_input if label.isdigit())
    # {size=8x1 stride=1x1 pad=7_7x0_0 lhs_dilate=.. rhs_dilate=.. rhs_reversal=..}, of which any may be left out
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in (window[1] if window else "").split() if "=" in part)
    columns = [
        [int(part.split("_")[0]) for part in fields[name].split("x")] if name in fields else [default] * len(axes)
        for name, default in (("size", 1), ("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
    ]
    windows = [_Window(*values) for values in zip(*columns, strict=True)]
    pairs = math.prod(
        found.valid_pairs(inputs[of_input.index(axis)], outputs[of_output.index(axis)])
        for axis, found in zip(axes, windows, strict=True)
    )
    feature_groups, batch_groups = (
        int(instruction.attribute(name) or 1) for name in ("feature_group_count", "batch_group_count")
    )
    features = inputs[of_input.index("f")] / feature_groups * outputs[of_output.index("f")]
    return 2.0 * features * inputs[of_input.index("b")] / batch_groups * pairs
