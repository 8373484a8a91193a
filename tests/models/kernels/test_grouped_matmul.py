"""The grouped product against one dense product a group in float64, with the gradients written out by hand: each
backend's implementation (kernels interpreted), and the tiles that the TPU's kernel is given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.gpu_lowering import LOWERS_TRITON, lowered

from models.kernels import grouped_matmul as grouped
from models.kernels import megablox_matmul as megablox
from models.kernels.triton_matmul import triton_matmul

IMPLEMENTATIONS = {
    "chosen": grouped.grouped_matmul,
    "blocks": grouped.block_matmul,
    "megablox": functools.partial(megablox.megablox_matmul, interpret=True),
    "triton": functools.partial(triton_matmul, interpret=True),
}


def dense_products(rows, weights, group_sizes, cotangent):
    """The product, and the gradients of sum(product * cotangent) in rows and weights, in float64."""
    rows, weights, cotangent = (np.asarray(array, np.float64) for array in (rows, weights, cotangent))
    product, d_rows, d_weights = np.zeros(cotangent.shape), np.zeros(rows.shape), np.zeros(weights.shape)
    group_of_row = np.repeat(np.arange(len(group_sizes)), group_sizes)
    for row, group in enumerate(group_of_row):
        product[row] = rows[row] @ weights[group]
        d_rows[row] = weights[group] @ cotangent[row]
        d_weights[group] += np.outer(rows[row], cotangent[row])
    return product, d_rows, d_weights


def random_inputs(group_sizes, depth, width, beyond=0):
    rng = np.random.default_rng([*group_sizes, depth, width])
    num_rows = sum(group_sizes) + beyond
    shapes = ((num_rows, depth), (len(group_sizes), depth, width), (num_rows, width))
    rows, weights, cotangent = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return rows, weights, np.asarray(group_sizes, np.int32), cotangent


def value_and_gradients(multiply, rows, weights, group_sizes, cotangent):
    def run(rows, weights, group_sizes, cotangent):
        value, vjp = jax.vjp(lambda rows, weights: multiply(rows, weights, group_sizes), rows, weights)
        return value, *vjp(cotangent)

    return jax.jit(run)(rows, weights, group_sizes, cotangent)


def assert_near(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape
    error = np.max(np.abs(np.asarray(actual, np.float64) - expected))
    assert error <= tolerance * np.max(np.abs(expected)), error


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("group_sizes", "depth", "width"),
    [
        ((40, 0, 3, 90, 0), 7, 5),  # empty groups, the last one too; nothing is a multiple of a tile
        ((0, 256, 0), 128, 130),  # one group has all
        ((1,), 3, 2),
    ],
    ids=str,
)
def test_matches_one_dense_product_a_group(name, group_sizes, depth, width):
    inputs = random_inputs(group_sizes, depth, width)
    actual = value_and_gradients(IMPLEMENTATIONS[name], *inputs)
    for array, expected in zip(actual, dense_products(*inputs), strict=True):
        assert_near(array, expected)


def test_several_tiles_along_each_axis(monkeypatch):
    monkeypatch.setattr(megablox, "_tile_columns", lambda size, longest: 128)
    inputs = random_inputs((200, 1, 99), 140, 260)
    actual = value_and_gradients(IMPLEMENTATIONS["megablox"], *inputs)
    for array, expected in zip(actual, dense_products(*inputs), strict=True):
        assert_near(array, expected)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rows_beyond_the_groups_reach_nothing(name):
    rows, weights, group_sizes, cotangent = random_inputs((30, 0, 11), 7, 5, beyond=100)
    rows[41:], cotangent[41:] = np.nan, np.nan
    value, d_rows, d_weights = value_and_gradients(IMPLEMENTATIONS[name], rows, weights, group_sizes, cotangent)
    expected = dense_products(rows[:41], weights, group_sizes, cotangent[:41])
    for array, oracle in zip((value[:41], d_rows[:41], d_weights), expected, strict=True):
        assert_near(array, oracle)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bfloat16_stays_bfloat16_and_is_summed_in_float32(name):
    rows, weights, group_sizes, cotangent = random_inputs((150, 0, 60), 33, 20)
    rounded = [jnp.asarray(array, jnp.bfloat16) for array in (rows, weights, cotangent)]
    actual = value_and_gradients(IMPLEMENTATIONS[name], rounded[0], rounded[1], group_sizes, rounded[2])
    exact = [np.asarray(array, np.float64) for array in rounded]
    for array, expected in zip(actual, dense_products(exact[0], exact[1], group_sizes, exact[2]), strict=True):
        assert array.dtype == jnp.bfloat16
        assert_near(array, expected, tolerance=2**-8)


@pytest.mark.parametrize(("rows", "depth", "groups", "width"), [(0, 3, 2, 4), (5, 0, 2, 4), (5, 3, 2, 0)], ids=str)
def test_nothing_to_multiply(rows, depth, groups, width):
    out = grouped.grouped_matmul(
        jnp.ones((rows, depth)), jnp.ones((groups, depth, width)), jnp.zeros(groups, jnp.int32)
    )
    assert out.shape == (rows, width) and not np.any(out)


@pytest.mark.parametrize(
    ("rows", "weights", "group_sizes", "message"),
    [
        (jnp.ones((4, 3)), jnp.ones((2, 5, 6)), jnp.ones(2, jnp.int32), r"rows must be \[M, D\] and weights"),
        (jnp.ones((4, 3)), jnp.ones((3, 6)), jnp.ones(2, jnp.int32), r"rows must be \[M, D\] and weights"),
        (jnp.ones((4, 3)), jnp.ones((2, 3, 6)), jnp.ones(3, jnp.int32), "one entry for each of the 2 groups"),
        (jnp.ones((4, 3)), jnp.ones((2, 3, 6)), jnp.ones(2), "group_sizes must be int32"),
        (jnp.ones((4, 3)), jnp.ones((2, 3, 6), jnp.bfloat16), jnp.ones(2, jnp.int32), "one dtype"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(rows, weights, group_sizes, message):
    with pytest.raises(ValueError, match=message):
        grouped.grouped_matmul(rows, weights, group_sizes)


@pytest.mark.parametrize(
    ("size", "longest", "tile"),
    [(768, 1024, 768), (1536, 1024, 768), (2048, 1024, 1024), (2048, 512, 512), (5, 1024, 128), (1030, 1024, 640)],
)
def test_equal_column_tiles_cover_an_axis(size, longest, tile):
    assert megablox._tile_columns(size, longest) == tile


def test_row_tiles_shared_by_two_groups_stay_few():
    for rows in (1, 100, 8192, 65536, 2**20):
        for groups in (1, 8, 32, 128):
            tile = megablox.tile_rows(rows, groups)
            assert tile in (128, 256, 512)
            assert tile == 128 or (groups - 1) * tile <= rows / 8


@LOWERS_TRITON
@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
def test_lowers_for_each_platform(platform):
    def loss(rows, weights, group_sizes):
        return jnp.sum(grouped.grouped_matmul(rows, weights, group_sizes))

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((256, 128), (2, 128, 128))]
    module = lowered(jax.grad(loss, argnums=(0, 1)), platform, *shapes, jax.ShapeDtypeStruct((2,), jnp.int32))
    assert ("tpu_custom_call" in module) == (platform == "tpu")
    assert ("triton" in module) == (platform == "cuda")
