"""Reading the compiler's lists of buffers."""

import pytest

from experiments.compilers import hlo, memory

PROGRAM = """ENTRY %main (a: f32[4], b: f32[8]) -> f32[4] {
  %p.1 = f32[8]{0} parameter(1), metadata={op_name="state.opt_state[0].mu['w']"}
  %p = f32[4]{0} parameter(0), metadata={op_name="state.params['w']"}
  %big = (f32[8]{0}, f32[16]{0}) custom-call(%p.1), custom_call_target="x", metadata={op_name="jit(f)/big"}
  ROOT %out = f32[4]{0} add(%p, %p)
}
"""
BUFFERS = """BufferAssignment:
allocation 0: size 4, color 8, page 0, thread-local:
 value: <1 x{2} @8> (size=4,offset=0): u32[]{:S(8)}
allocation 1: size 512, page 0, parameter 0, shape |f32[4]| at ShapeIndex {}, maybe-live-out:
 value: <7 param @0> (size=999,offset=0): f32[4]
allocation 2: size 1024, page 0, parameter 1, shape |f32[8]| at ShapeIndex {}:
allocation 3: size 64, page 0, maybe-live-out:
allocation 4: size 7000, page 0, preallocated-temp:
allocation 5: size 900, color 1, page 0, preallocated-temp:
allocation 6: size 32, page 0, constant:
allocation 7: size 80000, page 0, thread-local:
"""
PEAK = """  Live ranges at 12:
    out{}: 1 bytes (cumulative: 1 bytes)
  Live ranges at 34 (peak):
    big{1}: 64 bytes (cumulative: 64 bytes)
    p.1{}: 5000 bytes (cumulative: 64 bytes)
    gone{}: 96 bytes (cumulative: 64 bytes)
  Stack trace breakdown for peak usage: 1 bytes
    other{}: 99999 bytes
"""


def test_sizes_by_kind():
    found = memory.read_memory(hlo.parse_hlo(PROGRAM), BUFFERS)
    assert found.arguments == {"state.params['w']": 512, "state.opt_state[0].mu['w']": 1024}
    assert (found.results, found.temporaries, found.constants) == (64, 7000, 32)
    assert found.peak == 512 + 1024 + 64 + 7000 + 32
    assert found.of("state.params") == 512 and found.of("state.params", "state.opt_state") == 1536
    assert found.largest == ()


def test_what_is_alive_at_the_peak():
    largest = memory.read_memory(hlo.parse_hlo(PROGRAM), BUFFERS, PEAK).largest
    assert largest == (memory.Buffer(96, "", "gone"), memory.Buffer(64, "f32[16]", "jit(f)/big"))


def test_text_without_buffers_is_refused():
    with pytest.raises(ValueError, match="names no allocation"):
        memory.read_memory(hlo.parse_hlo(PROGRAM), "BufferAssignment:\n")
