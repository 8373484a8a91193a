"""Reading compiled programs: instructions, constants that reach a loop, and how often loops run."""

import re

import jax
import jax.numpy as jnp
import pytest

from experiments.compilers import hlo

LOOP = """HloModule test

%body (state: (s32[], s32[], f32[4])) -> (s32[], s32[], f32[4]) {
  %state = (s32[], s32[], f32[4]{0}) parameter(0)
  %counter = s32[] get-tuple-element(%state), index=0
  %bound = s32[] get-tuple-element(%state), index=1
  %data = f32[4]{0} get-tuple-element(%state), index=2
  %step = s32[] constant(STEP)
  %next = s32[] add(%counter, %step)
  ROOT %tuple = (s32[], s32[], /*index=2*/f32[4]{0}) tuple(%next, %bound, %data)
}, execution_thread="main"

%condition (state.1: (s32[], s32[], f32[4])) -> pred[] {
  %state.1 = (s32[], s32[], f32[4]{0}) parameter(0)
  %counter.1 = s32[] get-tuple-element(%state.1), index=0
  %bound.1 = s32[] get-tuple-element(%state.1), index=1
  ROOT %goes_on = pred[] compare(%counter.1, %bound.1), direction=DIRECTION
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0), metadata={op_name="state[\\'x\\']" stack_frame_id=1}
  %start = s32[] constant(START)
  %start.1 = s32[] copy(%start), frontend_attributes={kernel_metadata={
"a":"b (c"
}}, metadata={op_name="one"}
  %end = s32[] constant(END)
  %loop_state = (s32[], s32[], f32[4]{0}) tuple(%start.1, %end, %x)
  %loop = (s32[], s32[], f32[4]{0:T(8,128)S(1)}) while(%loop_state), condition=%condition, body=%body
  ROOT %result = f32[4]{0} get-tuple-element(%loop), index=2
}
"""


def looping(start: int, end: int, step: int, direction: str) -> hlo.Program:
    text = LOOP.replace("START", str(start)).replace("END", str(end)).replace("STEP", str(step))
    return hlo.parse_hlo(text.replace("DIRECTION", direction))


@pytest.mark.parametrize(
    ("start", "end", "step", "direction", "expected"),
    [
        (0, 48, 1, "LT", 48),
        (0, 48, 1, "LE", 49),
        (3, 10, 2, "LT", 4),
        (3, 11, 2, "LT", 4),
        (47, 0, -1, "GE", 48),
        (5, 0, -1, "GT", 5),
        (0, 4, 1, "NE", 4),
        (7, 7, 1, "LT", 0),
        (0, 1, 1, "LT", 1),
        (0, 1_000_003, 1, "LT", 1_000_003),
        (0, 5, 0, "LT", None),
    ],
)
def test_the_turns_of_a_loop_follow_from_its_condition(start, end, step, direction, expected):
    program = looping(start, end, step, direction)
    entry = program.entry
    assert program.trip_count(entry, entry.instructions["loop"]) == expected


def test_what_the_compiler_notes_counts_first():
    text = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"17"}}')
    program = hlo.parse_hlo(
        text.replace("DIRECTION", "LT").replace("START", "0").replace("END", "5").replace("STEP", "1")
    )
    assert program.trip_count(program.entry, program.entry.instructions["loop"]) == 17


def test_what_a_loop_hands_on_is_known_after_it():
    program = looping(0, 48, 1, "LT")
    assert program.carried(program.entry, program.entry.instructions["loop"]) == ((None, 48, None),)
    assert program.value(program.entry, "loop") == (None, 48, None)


def test_instructions_are_read_whole():
    entry = looping(0, 1, 1, "LT").entry
    x, copied, loop = (entry.instructions[name] for name in ("x", "start.1", "loop"))
    assert x.op_name == "state['x']" and x.constant == "0" and x.operands == ()
    assert copied.op_name == "one", "attributes may run over several lines"
    assert loop.is_tuple and [array.dims for array in loop.arrays] == [(), (), (4,)]
    assert [array.bytes for array in loop.arrays] == [4, 4, 16]
    assert entry.root.name == "result" and list(entry.operands(entry.root)) == [loop]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("f32", 24), ("bf16", 12), ("u8", 6), ("pred", 6), ("s64", 48), ("f8e4m3fn", 6), ("s4", 3), ("token", 0)],
)
def test_bytes_of_a_type(dtype, expected):
    assert hlo.ArrayType(dtype, (2, 3)).bytes == expected


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no HLO program"):
        hlo.parse_hlo("HloModule without anything in it")


def turns(function, *arguments, drop_notes: bool) -> list[int | None]:
    text = jax.jit(function).lower(*arguments).compile().as_text()
    if drop_notes:
        text, dropped = re.subn(r'"known_trip_count":\{[^}]*\}', '"forgotten":{}', text)
        assert dropped, "the compiler's notes look different now"
    program = hlo.parse_hlo(text)
    found = [(c, i) for c in program.computations.values() for i in c.instructions.values() if i.opcode == "while"]
    return sorted(program.trip_count(*loop) or -1 for loop in found)


@pytest.mark.parametrize("drop_notes", [False, True])
def test_loops_of_a_compiled_program(drop_notes):
    def nested(x, matrices):
        def body(x, matrix):
            return jax.lax.fori_loop(2, 8, lambda _, x: jnp.tanh(x @ matrix), x), None

        return jax.lax.scan(body, x, matrices)[0]

    shapes = jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.ShapeDtypeStruct((5, 8, 8), jnp.float32)
    assert turns(nested, *shapes, drop_notes=drop_notes) == [5, 6]


def test_a_loop_over_data_has_no_known_turns():
    def until_small(x):
        return jax.lax.while_loop(lambda x: jnp.max(x) > 1, lambda x: x / 2, x)

    assert turns(until_small, jax.ShapeDtypeStruct((8,), jnp.float32), drop_notes=False) == [-1]
