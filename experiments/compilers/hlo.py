"""Parser of compiled XLA programs: their computations and instructions, and the trip count of each loop.

XLA's own cost analysis counts the body of a loop once, however often it runs, so that the work of a program has to be
read off its text: optimized HLO, per device, from the compiler for CPUs, GPUs or TPUs.
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Value = Any  # an int, a bool, a tuple of values, or None for a value that is only known at run time

_INSTRUCTION = re.compile(r"  (ROOT )?%(\S+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%(\S+) \(")
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\]")
_OPCODE = re.compile(r" ?([a-z][\w-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BYTES = {"pred": 1, "token": 0, "opaque": 0, "c64": 8, "c128": 16, "bf16": 2}
_PASSED_ON = frozenset({"copy", "bitcast", "convert", "reshape", "copy-done", "optimization-barrier"})
_COMPARISONS = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}
_ARITHMETIC = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "minimum": min,
    "maximum": max,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
}
_MOST_TRIPS = 1 << 40


@dataclass(frozen=True)
class ArrayType:
    """The type of an array."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Bytes without the padding of a layout."""
        bits = re.search(r"\d+", self.dtype)
        size = _BYTES[self.dtype] if self.dtype in _BYTES else int(bits.group()) / 8 if bits else 0
        return self.elements * size


@dataclass(frozen=True)
class Instruction:
    """One line of a program."""

    name: str
    opcode: str
    arrays: tuple[ArrayType, ...]
    """Arrays of the result: one, or the leaves of a tuple."""
    is_tuple: bool
    operands: tuple[str, ...]
    constant: str
    """Text between the parentheses of a constant or a parameter; empty for other instructions."""
    attributes: str
    """Text after the operands."""

    @functools.cached_property
    def op_name(self) -> str:
        """Path of JAX's primitive, or of the argument for a parameter; empty if the compiler made the operation up."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found.group(1).replace("\\'", "'") if found else ""

    def attribute(self, name: str) -> str | None:
        """Return the text of an attribute without spaces, such as `dimensions={0}`."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", self.attributes)
        return found.group(1) if found else None

    def numbers(self, name: str) -> tuple[int, ...]:
        """Return the whole numbers of an attribute such as `lhs_contracting_dims={1,2}`."""
        return tuple(map(int, re.findall(r"-?\d+", self.attribute(name) or "")))

    def called(self, name: str) -> list[str]:
        """Return the computations that an attribute such as `branch_computations` names."""
        return _NAME.findall(self.attribute(name) or "")

    @property
    def callee(self) -> str:
        """The computation that a fusion, a call or an asynchronous start runs."""
        return (self.called("calls") or self.called("to_apply"))[0]


@dataclass(frozen=True)
class Computation:
    """A function of a program."""

    name: str
    instructions: Mapping[str, Instruction]
    """Instructions by name, in the order of the text."""
    root: Instruction

    def operands(self, instruction: Instruction) -> Iterator[Instruction]:
        return (self.instructions[name] for name in instruction.operands)


@dataclass(frozen=True)
class Program:
    """A compiled program, for one device."""

    computations: Mapping[str, Computation]
    entry: Computation

    def trip_count(self, computation: Computation, loop: Instruction, parameters: Value = None) -> int | None:
        """Return the number of turns of a `while`, or None if it depends on data.

        It is the compiler's note, else it follows from the condition and the counter's start and step, if these are
        constants that reach the loop through tuples, fusions and the loops around it.

        Args:
          computation: the computation that holds the loop.
          loop: the `while`.
          parameters: known values of the computation's parameters, a tuple.
        """
        noted = _TRIP_COUNT.search(loop.attributes)
        return int(noted.group(1)) if noted else _derived_trip_count(self, computation, loop, parameters)

    def carried(self, computation: Computation, loop: Instruction, parameters: Value = None) -> Value:
        """Return the known values of a loop's parameter: the elements that the body hands on unchanged."""
        start = self.value(computation, loop.operands[0], parameters)
        body = self.computations[loop.called("body")[0]]
        after = self.value(body, body.root.name, (start,))
        again = self.value(body, body.root.name, (after,))
        if not isinstance(start, tuple) or not isinstance(after, tuple) or not isinstance(again, tuple):
            return (None,)
        return (tuple(a if a == b == c else None for a, b, c in zip(start, after, again, strict=True)),)

    def value(self, computation: Computation, name: str, parameters: Value = None) -> Value:
        """Return the value of a scalar or a tuple that is known before the program runs."""
        instruction = computation.instructions[name]
        if not instruction.is_tuple and (instruction.arrays[0].dims or instruction.arrays[0].dtype[0] not in "sup"):
            return None
        match instruction.opcode:
            case "constant":
                text = instruction.constant
                if text in ("true", "false"):
                    return text == "true"
                return int(text) if re.fullmatch(r"-?\d+", text) else None
            case "parameter":
                index = int(instruction.constant)
                return parameters[index] if isinstance(parameters, tuple) and index < len(parameters) else None
            case "tuple":
                return tuple(self.value(computation, operand, parameters) for operand in instruction.operands)
            case "get-tuple-element":
                elements = self.value(computation, instruction.operands[0], parameters)
                return elements[instruction.numbers("index")[0]] if isinstance(elements, tuple) else None
            case "while":
                return self.carried(computation, instruction, parameters)[0]
            case "fusion" | "call":
                callee = self.computations[instruction.callee]
                values = tuple(self.value(computation, operand, parameters) for operand in instruction.operands)
                return self.value(callee, callee.root.name, values)
            case "copy-start":
                return (self.value(computation, instruction.operands[0], parameters),) * 3
            case opcode if opcode in _PASSED_ON:
                passed = self.value(computation, instruction.operands[0], parameters)
                return passed[0] if opcode == "copy-done" and isinstance(passed, tuple) else passed
            case opcode if opcode in _ARITHMETIC or opcode == "compare":
                values = [self.value(computation, operand, parameters) for operand in instruction.operands]
                if None in values:
                    return None
                compare = opcode == "compare"
                combine = _COMPARISONS[instruction.attribute("direction") or ""] if compare else _ARITHMETIC[opcode]
                return combine(*values)
        return None


def _derived_trip_count(program: Program, computation: Computation, loop: Instruction, parameters: Value) -> int | None:
    """Return the number of turns after which the condition fails, if every counter grows by a constant step."""
    condition, body = (program.computations[loop.called(name)[0]] for name in ("condition", "body"))
    start = program.value(computation, loop.operands[0], parameters)
    first = program.value(body, body.root.name, (start,))
    second = program.value(body, body.root.name, (first,))
    if not all(isinstance(state, tuple) for state in (start, first, second)):
        return None
    states = zip(start, first, second, strict=True)
    steps = [b - a if None not in (a, b, c) and isinstance(a, int) and b - a == c - b else None for a, b, c in states]

    def goes_on(turns: int) -> Value:
        state = tuple(None if step is None else a + turns * step for a, step in zip(start, steps, strict=True))
        return program.value(condition, condition.root.name, (state,))

    if goes_on(0) is None:
        return None
    if not goes_on(0):
        return 0
    beyond = 1
    while goes_on(beyond):
        beyond *= 2
        if beyond > _MOST_TRIPS:
            return None
    low = beyond // 2  # the loop goes on after `low` turns, and not after `beyond`
    while beyond - low > 1:
        middle = (low + beyond) // 2
        low, beyond = (middle, beyond) if goes_on(middle) else (low, middle)
    return beyond


def parse_hlo(text: str) -> Program:
    """Parse optimized HLO, as `jax.stages.Compiled.as_text` returns it.

    Raises:
      ValueError: if the text is no HLO program.
    """
    computations: dict[str, Computation] = {}
    entry, header, lines = None, None, []
    for line in text.splitlines():
        if header is None:
            header, lines = _COMPUTATION.match(line), []
        elif line == "}" or line.startswith("}, "):
            instructions = {instruction.name: instruction for instruction in map(_parse_instruction, lines)}
            roots = [name for name, text in zip(instructions, lines, strict=True) if text.startswith("  ROOT ")]
            root = instructions[roots[-1] if roots else list(instructions)[-1]]
            computation = computations[header.group(2)] = Computation(header.group(2), instructions, root)
            entry = computation if header.group(1) else entry
            header = None
        elif _INSTRUCTION.match(line):
            lines.append(line)
        elif lines:  # an attribute may run over several lines
            lines[-1] += line
    if entry is None:
        raise ValueError(f"this is no HLO program: no entry computation in {text[:80]!r}")
    return Program(computations, entry)


def _parse_instruction(line: str) -> Instruction:
    """Parse one instruction, all its lines joined."""
    header = _INSTRUCTION.match(line)
    assert header is not None
    start = header.end()
    is_tuple = line[start] == "("
    end = _closing(line, start) + 1 if is_tuple else line.index(" ", start)
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        raise ValueError(f"this instruction has no opcode: {line[:120]!r}")
    close = _closing(line, opcode.end() - 1)
    inside = line[opcode.end() : close]
    result = re.sub(r"/\*.*?\*/", "", line[start:end])  # without comments
    arrays = tuple(
        ArrayType(dtype, tuple(int(size.removeprefix("<=")) for size in dims.split(",") if size))
        for dtype, dims in _ARRAY.findall(result)
    )
    is_constant = opcode.group(1) in ("constant", "parameter")
    return Instruction(
        name=header.group(2),
        opcode=opcode.group(1),
        arrays=arrays,
        is_tuple=is_tuple,
        operands=() if is_constant else tuple(_NAME.findall(inside)),
        constant=inside if is_constant else "",
        attributes=line[close + 1 :],
    )


def _closing(line: str, start: int) -> int:
    """Return the position at which the parenthesis at `start` closes."""
    depth = 0
    for found in re.compile(r"[()]").finditer(line, start):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"unbalanced parentheses in {line[:120]!r}")
