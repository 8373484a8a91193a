"""FLOPs of compiled programs: against XLA's own count without loops, and against arithmetic with loops."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from support.tpu_compiler import need_libtpu

from experiments.compilers import hlo, work

DEPTH, WIDTH, ROWS = 5, 32, 8


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def compiled(function, *arguments):
    # The suite compiles without these emitters, and then a scatter becomes a loop.
    emitters = "xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", "")
    options = {"xla_cpu_use_fusion_emitters": True} if emitters else None
    return jax.jit(function).lower(*arguments).compile(options)


def work_of(function, *arguments) -> work.Work:
    return work.count(hlo.parse_hlo(compiled(function, *arguments).as_text()))


def convolve(x, kernel, **options):
    return jax.lax.conv_general_dilated(x, kernel, **{"window_strides": (1, 1), "padding": "SAME"} | options)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (jnp.matmul, (shape(64, 32), shape(32, 16))),
        (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (shape(5, 8, 16), shape(5, 16, 4))),
        (lambda a, b: jnp.einsum("bij,cjb->ic", a, b), (shape(5, 8, 16), shape(3, 16, 5))),
        (lambda x: jnp.sum(jnp.exp(x) * 2 + x, axis=0), (shape(64, 32),)),
        (lambda x: jnp.sqrt(jnp.where(x > 0, x, -x)).astype(jnp.bfloat16), (shape(64, 32),)),
        (lambda x, y: x.at[y].add(x[0]), (shape(64, 32), shape(7, dtype=jnp.int32))),
        (convolve, (shape(4, 3, 16, 16), shape(8, 3, 3, 3))),
        (
            lambda x, k: convolve(x, k, window_strides=(2, 1), rhs_dilation=(1, 2)),
            (shape(4, 3, 16, 15), shape(8, 3, 3, 3)),
        ),
        (
            lambda x, k: convolve(x, k, lhs_dilation=(3, 1), padding=[(1, 0), (2, 2)]),
            (shape(4, 3, 9, 9), shape(8, 3, 3, 3)),
        ),
        (lambda x, k: convolve(x, k, feature_group_count=3), (shape(4, 3, 9, 9), shape(6, 1, 3, 3))),
    ],
)
def test_without_loops_it_is_what_xla_counts(function, arguments):
    program = compiled(function, *arguments)
    cost = program.cost_analysis()
    found = work.count(hlo.parse_hlo(program.as_text()))
    assert found.flops == cost["flops"] > 0
    assert found.transcendentals == cost.get("transcendentals", 0)


def layer(x, matrix):
    return jnp.tanh(x @ matrix), None


def loss_of_scan(matrices, x):
    return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, matrices)[0])


def loss_unrolled(matrices, x):
    for matrix in matrices:
        x, _ = layer(x, matrix)
    return jnp.sum(x)


def test_a_scan_counts_as_often_as_it_runs():
    arguments = shape(DEPTH, WIDTH, WIDTH), shape(ROWS, WIDTH)
    once = 2 * ROWS * WIDTH * WIDTH
    scanned, unrolled = work_of(loss_of_scan, *arguments), work_of(loss_unrolled, *arguments)
    assert scanned.matrix_flops == unrolled.matrix_flops == DEPTH * once
    assert scanned.transcendentals == unrolled.transcendentals == DEPTH * ROWS * WIDTH


def test_forward_and_backward_of_a_scan():
    arguments = shape(DEPTH, WIDTH, WIDTH), shape(ROWS, WIDTH)
    once = 2 * ROWS * WIDTH * WIDTH
    found = work_of(jax.grad(loss_of_scan), *arguments)
    # Each layer forward, again in the backward pass, and two products there; the input of the first needs no gradient,
    # but the loop computes it.
    assert found.matrix_flops == 4 * DEPTH * once
    first_layer = once
    assert work_of(jax.grad(loss_unrolled), *arguments).matrix_flops == 3 * DEPTH * once - first_layer


def test_loops_in_loops_multiply():
    def nested(x, matrix):
        inner = lambda _, x: jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ matrix), x)  # noqa: E731
        return jax.lax.fori_loop(2, 9, inner, x)

    assert work_of(nested, shape(4, 4), shape(4, 4)).matrix_flops == 7 * 3 * 2 * 4**3


def test_a_loop_over_data_counts_once_and_is_named():
    def until_small(x, matrix):
        return jax.lax.while_loop(lambda x: jnp.max(x) > 1, lambda x: x @ matrix, x)

    found = work_of(until_small, shape(4, 4), shape(4, 4))
    assert found.matrix_flops == 2 * 4**3
    assert len(found.unknown_loops) == 1 and "while" in found.unknown_loops[0]


def test_of_a_conditional_the_larger_branch_counts():
    def either(choice, x, matrix):
        branches = [lambda: x, lambda: (x @ matrix) @ matrix, lambda: x @ matrix]
        return jax.lax.switch(choice, branches)

    found = work_of(either, shape(dtype=jnp.int32), shape(4, 4), shape(4, 4))
    assert found.matrix_flops == 2 * 2 * 4**3


KERNELS = """ENTRY %main (x: f32[16,4]) -> f32[16,4] {
  %x = f32[16,4]{1,0} parameter(0)
  %a = f32[16,4]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":\
{"body":"XYZ=","cost_estimate":{"bytes_accessed":"1","flops":"1000","transcendentals":"0"}}}
  %b = f32[16,4]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/secret"}
  %c = f32[16,4]{1,0} custom-call(%b), custom_call_target="AllocateBuffer"
  ROOT %d = f32[16,4]{1,0} add(%c, %c), backend_config={"window_config":{"estimated_cycles":"77"}}
}
"""


def test_kernels_count_what_they_declare_or_what_the_caller_knows():
    program = hlo.parse_hlo(KERNELS)
    found = work.count(program)
    assert (found.kernel_flops, found.elementwise_flops, found.cycles) == (1000, 64, 77)
    assert found.undeclared_kernels == ("jit(f)/secret",)
    found = work.count(program, kernel_flops=lambda kernel, operands: 10.0 * operands[0].arrays[0].elements)
    assert (found.kernel_flops, found.undeclared_kernels) == (1640, ())


WINDOWS = """%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (x: f32[3,8]) -> f32[3,8] {
  %x = f32[3,8]{1,0} parameter(0)
  %zero = f32[] constant(0)
  ROOT %r = f32[3,8]{1,0} reduce-window(%x, %zero), window={size=1xSIZE pad=0_0xPAD_PAD}, to_apply=%add
}
"""


@pytest.mark.parametrize(("size", "pad", "terms"), [(3, 1, 3 * 8 * 2), (15, 7, 3 * 7)])
def test_a_window_over_a_whole_axis_is_one_reduction(size, pad, terms):
    program = hlo.parse_hlo(WINDOWS.replace("SIZE", str(size)).replace("PAD", str(pad)))
    assert work.count(program).elementwise_flops == terms


SPARSE_CORE = """%called (p: f32[64]) -> f32[64] {
  %p = f32[64]{0} parameter(0)
  ROOT %r = f32[64]{0} all-reduce(%p), replica_groups=[1,4]<=[4], to_apply=%add
}, execution_thread="sparsecore"

%async (p.1: f32[64]) -> f32[64] {
  %p.1 = f32[64]{0} parameter(0)
  ROOT %c = f32[64]{0} custom-call(%p.1), custom_call_target="TODO", called_computations={%called}
}, execution_thread="sparsecore"

ENTRY %main (x: f32[64]) -> f32[64] {
  %x = f32[64]{0} parameter(0)
  %start = ((f32[64]{0}), f32[64]{0}, u32[]) async-start(%x), async_execution_thread="sparsecore", calls=%async
  %update = ((f32[64]{0}), f32[64]{0}, u32[]) async-update(%start)
  ROOT %done = f32[64]{0} async-done(%update)
}
"""


def test_what_another_core_does_counts_once():
    (moved,) = work.count(hlo.parse_hlo(SPARSE_CORE), {"fsdp": 4}).collectives
    assert (moved.kind, moved.axes, moved.total_bytes) == ("all-reduce", ("fsdp",), 2 * 256 * 3 / 4)


def test_a_cost_beyond_every_number_is_no_estimate():
    program = hlo.parse_hlo(KERNELS.replace('"77"', '"9223372036854775807"'))
    assert work.count(program).cycles == 0


def test_works_add_up():
    one = work.Work(matrix_flops=1, cycles=2, unknown_loops=("a",))
    total = one.times(3).plus(one)
    assert (total.matrix_flops, total.cycles, total.unknown_loops) == (4, 8, ("a", "a"))


TPU_PROGRAM = """
import jax, jax.numpy as jnp
from experiments.compilers import hlo
from experiments.compilers import tpu
from experiments.compilers import work

DEPTH, WIDTH, ROWS = 4, 256, 512
mesh = tpu.topology_mesh("v5p:2x2x1", {"data": -1})

def layer(x, matrices):
    return x + jnp.tanh(x @ matrices[0]) @ matrices[1], None

def loss(matrices, x):
    return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, matrices)[0] ** 2)

def loss_unrolled(matrices, x):
    for i in range(DEPTH):
        x, _ = layer(x, (matrices[0][i], matrices[1][i]))
    return jnp.sum(x**2)

matrix = tpu.shape_on(mesh, (DEPTH, WIDTH, WIDTH), jnp.bfloat16, None, "data")
x = tpu.shape_on(mesh, (ROWS, WIDTH), jnp.bfloat16, "data")
for function in (loss, loss_unrolled):
    reading = tpu.compile_and_read(jax.jit(jax.value_and_grad(function)).lower((matrix, matrix), x))
    found = work.count(hlo.parse_hlo(reading.text), dict(mesh.shape))
    print(found.matrix_flops, found.cycles > 0, "data" in str(found.by_collective()), len(found.unknown_loops))
"""


def test_on_the_tpu_compiler_a_scan_counts_as_often_as_it_runs(monkeypatch):
    need_libtpu(monkeypatch)
    done = subprocess.run([sys.executable, "-c", TPU_PROGRAM], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    scanned, unrolled = (line.split() for line in done.stdout.splitlines())
    product = 2 * (512 // 4) * 256 * 256
    assert scanned[1:] == unrolled[1:] == ["True", "True", "0"]
    # A layer has two products forward, the first of them again, and two for each in the backward pass. Without a loop
    # nothing is made again, and the input of the first layer needs no gradient.
    assert float(scanned[0]) == 4 * 7 * product
    assert float(unrolled[0]) == (4 * 6 - 1) * product
