"""Reads the text of a compiled XLA program: its computations and instructions, and how often each loop runs.

XLA's own cost analysis counts the body of a loop once, however often it runs, so whoever wants to know what a program
does has to read the program. The text is that of optimized HLO, per device, from the compiler for CPUs, GPUs or TPUs.
This file must never know a cost.
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Value = Any  # an int, a bool, a tuple of values, or None for what is only known at run time

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
class Array:
    """The type of an array."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Without the padding of a layout."""
        bits = re.search(r"\d+", self.dtype)
        size = _BYTES[self.dtype] if self.dtype in _BYTES else int(bits.group()) / 8 if bits else 0
        return self.elements * size


@dataclass(frozen=True)
class Instruction:
    """One line of a program."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    """Of its result: one, or the leaves of a tuple."""
    is_tuple: bool
    operands: tuple[str, ...]
    constant: str
    """What stands between the parentheses."""
    attributes: str
    """All that follows."""

    @functools.cached_property
    def op_name(self) -> str:
        """The path of JAX's primitive, or of the argument for a parameter; empty where the compiler made it up."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found.group(1).replace("\\'", "'") if found else ""

    def attribute(self, name: str) -> str | None:
        """The text of an attribute without spaces, as `dimensions={0}`."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", self.attributes)
        return found.group(1) if found else None

    def numbers(self, name: str) -> tuple[int, ...]:
        """The whole numbers of an attribute such as `lhs_contracting_dims={1,2}`."""
        return tuple(map(int, re.findall(r"-?\d+", self.attribute(name) or "")))

    def called(self, name: str) -> list[str]:
        """The computations that an attribute such as `branch_computations` names."""
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
    """By name, in the order of the text."""
    root: Instruction

    def operands(self, instruction: Instruction) -> Iterator[Instruction]:
        return (self.instructions[name] for name in instruction.operands)


@dataclass(frozen=True)
class Program:
    """A compiled program, for one device."""

    computations: Mapping[str, Computation]
    entry: Computation

    def trip_count(self, computation: Computation, loop: Instruction, parameters: Value = None) -> int | None:
        """How often a `while` runs.

        As the compiler has noted it, else from its condition and the counter's start and step, where these are
        constants that reach the loop through tuples, fusions and the loops around it.

        Args:
          computation: where the loop stands.
          loop: the `while`.
          parameters: what is known of the computation's parameters, a tuple.

        Returns:
          None where it depends on data.
        """
        noted = _TRIP_COUNT.search(loop.attributes)
        return int(noted.group(1)) if noted else _derived_trip_count(self, computation, loop, parameters)

    def carried(self, computation: Computation, loop: Instruction, parameters: Value = None) -> Value:
        """What is known of a loop's parameter in every turn: the elements that the body hands on as they are."""
        start = self.value(computation, loop.operands[0], parameters)
        body = self.computations[loop.called("body")[0]]
        after = self.value(body, body.root.name, (start,))
        again = self.value(body, body.root.name, (after,))
        if not isinstance(start, tuple) or not isinstance(after, tuple) or not isinstance(again, tuple):
            return (None,)
        return (tuple(a if a == b == c else None for a, b, c in zip(start, after, again, strict=True)),)

    def value(self, computation: Computation, name: str, parameters: Value = None) -> Value:
        """What is known of a scalar or a tuple before the program runs."""
        instruction = computation.instructions[name]
        if not instruction.is_tuple and (instruction.arrays[0].dims or instruction.arrays[0].dtype[0] not in "sup"):
            return None
        match instruction.opcode:
            case "constant":
                return _constant(instruction.constant)
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
                return None if None in values else _combined(instruction, values)
        return None


def _constant(text: str) -> int | bool | None:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _combined(instruction: Instruction, values: list[Any]) -> Value:
    if instruction.opcode == "compare":
        return _COMPARISONS[instruction.attribute("direction") or ""](*values)
    return _ARITHMETIC[instruction.opcode](*values)


def _derived_trip_count(program: Program, computation: Computation, loop: Instruction, parameters: Value) -> int | None:
    """The number of turns after which the condition fails, every counter growing by the same step in every turn."""
    condition, body = (program.computations[loop.called(name)[0]] for name in ("condition", "body"))
    start = program.value(computation, loop.operands[0], parameters)
    first = program.value(body, body.root.name, (start,))
    second = program.value(body, body.root.name, (first,))
    if not all(isinstance(state, tuple) for state in (start, first, second)):
        return None
    states = zip(start, first, second, strict=True)
    steps = [b - a if None not in (a, b, c) and _is_number(a) and b - a == c - b else None for a, b, c in states]

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
    low = beyond // 2  # it goes on after `low` turns, and not after `beyond`
    while beyond - low > 1:
        middle = (low + beyond) // 2
        low, beyond = (middle, beyond) if goes_on(middle) else (low, middle)
    return beyond


def _is_number(value: Value) -> bool:
    return isinstance(value, int)


def parse(text: str) -> Program:
    """Reads optimized HLO, as `jax.stages.Compiled.as_text` gives it.

    Raises:
      ValueError: if the text is no HLO program.
    """
    computations: dict[str, Computation] = {}
    entry, header, lines = None, None, []
    for line in text.splitlines():
        if header is None:
            header, lines = _COMPUTATION.match(line), []
        elif line == "}" or line.startswith("}, "):
            computation = _computation(header.group(2), lines)
            computations[computation.name] = computation
            entry = computation if header.group(1) else entry
            header = None
        elif _INSTRUCTION.match(line):
            lines.append(line)
        elif lines:  # an attribute may run over several lines
            lines[-1] += line
    if entry is None:
        raise ValueError(f"this is no HLO program: no entry computation in {text[:80]!r}")
    return Program(computations, entry)


def _computation(name: str, lines: list[str]) -> Computation:
    instructions = {instruction.name: instruction for instruction in map(_instruction, lines)}
    roots = [name for name, line in zip(instructions, lines, strict=True) if line.startswith("  ROOT ")]
    return Computation(name, instructions, instructions[roots[-1] if roots else list(instructions)[-1]])


def _instruction(line: str) -> Instruction:
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
    arrays = tuple(
        Array(dtype, tuple(int(size.removeprefix("<=")) for size in dims.split(",") if size))
        for dtype, dims in _ARRAY.findall(_without_comments(line[start:end]))
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


def _without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/", "", text)


def _closing(line: str, start: int) -> int:
    """Where the parenthesis at `start` closes."""
    depth = 0
    for found in re.compile(r"[()]").finditer(line, start):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"unbalanced parentheses in {line[:120]!r}")
