"""The statistics against numpy in float64: alone, empty, and stacked over micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rspo_jax import statistics

SHAPE = (4, 5)
TINY = float(np.finfo(np.float32).tiny)  # the device may flush smaller results to zero
compiled_quantile = jax.jit(statistics.masked_quantile)
compiled_reduce = jax.jit(statistics.reduce)


def masks():
    """Yield a mask of every size from 1 to 20."""
    rng = np.random.default_rng(0)
    for count in range(1, 21):
        mask = np.zeros(20, bool)
        mask[rng.permutation(20)[:count]] = True
        yield mask.reshape(SHAPE)


def assert_quantiles(values, mask):
    """Interpolated quantiles must match to float32 accuracy, quantiles at an element exactly."""
    kept = np.sort(values[mask])
    for percent in (0, 10, 37, 50, 100):
        quantile = compiled_quantile(values, mask, np.int32(percent))
        assert quantile.dtype == jnp.float32 and quantile.shape == ()
        rank, between = divmod(percent * (kept.size - 1), 100)
        # Between two signs, the neighbours' rounding is what remains.
        atol = TINY if kept[0] >= 0 else max(TINY, 1e-6 * float(np.abs(kept[rank : rank + 2]).max()))
        np.testing.assert_allclose(quantile, np.quantile(kept.astype(np.float64), percent / 100), rtol=1e-6, atol=atol)
        if not between:
            np.testing.assert_allclose(quantile, kept[rank], rtol=0, atol=TINY)


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: rng.random(SHAPE),
        lambda rng: rng.lognormal(sigma=20, size=SHAPE),
        lambda rng: rng.integers(0, 4, SHAPE) / 4,
        lambda rng: np.minimum(1, rng.uniform(0.5, 1.5, SHAPE)),
        lambda rng: np.ones(SHAPE),
        lambda rng: np.zeros(SHAPE),
        lambda rng: rng.choice([0.0, -0.0, 1e-40, TINY, 3.4e38], SHAPE),
        lambda rng: rng.normal(size=SHAPE),
        lambda rng: rng.choice([-1, 1], SHAPE) * rng.lognormal(sigma=20, size=SHAPE),
        lambda rng: rng.choice([-0.5, -0.25, 0.0, 0.25], SHAPE),
    ],
    ids=[
        "uniform",
        "all-magnitudes",
        "duplicates",
        "many-ones",
        "ones",
        "zeros",
        "extremes",
        "both-signs",
        "all-magnitudes-of-both-signs",
        "duplicates-of-both-signs",
    ],
)
def test_quantile_matches_numpy(draw):
    rng = np.random.default_rng(1)
    for mask in masks():
        values = draw(rng).astype(np.float32)
        values[~mask] = rng.choice([np.nan, np.inf, -1.0, 0.0, 7.0], np.sum(~mask))  # has no effect
        assert_quantiles(values, mask)


def test_quantile_of_nothing_is_zero():
    assert compiled_quantile(np.full(SHAPE, np.nan, np.float32), np.zeros(SHAPE, bool), np.int32(50)) == 0


def test_nan_counts_as_infinity_in_a_quantile():
    values = np.array([np.nan, -np.nan, 1.0, -2.0, 3.0, 4.0] + [0.0] * 14, np.float32).reshape(SHAPE)
    mask = np.arange(20).reshape(SHAPE) < 6
    assert compiled_quantile(values, mask, np.int32(60)) == 4.0  # the fourth of six
    assert not np.isfinite(compiled_quantile(values, mask, np.int32(80)))


def of_batch(values, mask):
    """One statistic of each kind."""
    return {
        "mean": statistics.masked_mean(values, mask),
        "sum": statistics.Sum(jnp.sum(jnp.where(mask, values, 0))),
        "maximum": statistics.Maximum(jnp.max(jnp.where(mask, values, -jnp.inf))),
        "minimum": statistics.Minimum(jnp.min(jnp.where(mask, values, jnp.inf))),
        "p10": statistics.Quantile(values, mask, jnp.int32(10)),
        "quantiles": statistics.Quantiles(values, mask, jnp.asarray([10, 50, 90], jnp.int32)),
        "sums": statistics.Sums(jnp.sum(jnp.where(mask, values, 0), axis=tuple(range(values.ndim - 1)))),
        "means": means(values, mask, axes=1),
        "table": means(jnp.stack([values, -values], -2), jnp.stack([mask, mask], -2), axes=2),
        "histogram": statistics.histogram(values, mask, EDGES),
        "size": statistics.effective_sample_size(jnp.log(values), mask),
    }


EDGES = (0.25, 0.5, 1.0, 2.0)


def means(values, mask, axes):
    """Return the means over all axes but the last ones."""
    values, mask = (array.reshape(-1, *array.shape[-axes:]) for array in (values, mask))
    weight = jnp.sum(mask, axis=0, dtype=values.dtype)
    return statistics.Means(jnp.sum(jnp.where(mask, values, 0), axis=0), weight, axes)


@jax.jit
def whole(values, mask):
    return statistics.reduce(of_batch(values, mask))


@jax.jit
def by_micro_batch(values, mask):
    _, stacked = jax.lax.scan(lambda carry, batch: (carry, of_batch(*batch)), 0, (values, mask))
    return statistics.reduce(stacked)


@jax.jit
def by_two_axes(values, mask):
    return statistics.reduce(jax.vmap(jax.vmap(of_batch))(values, mask))


def test_stacking_merges_exactly():
    rng = np.random.default_rng(2)
    values = rng.lognormal(size=(6, 4)).astype(np.float32)
    mask = rng.random((6, 4)) < 0.5
    mask[1] = False  # a micro-batch of nothing
    values[~mask] = np.nan
    kept = values[mask].astype(np.float64)
    column_means = np.array([values[mask[:, at], at].astype(np.float64).mean() for at in range(4)])
    expected = {
        "mean": kept.mean(),
        "sum": kept.sum(),
        "maximum": kept.max(),
        "minimum": kept.min(),
        "p10": np.quantile(kept, 0.1),
        "quantiles": np.quantile(kept, [0.1, 0.5, 0.9]),
        "sums": np.nansum(values.astype(np.float64), axis=0),
        "means": column_means,
        "table": [column_means, -column_means],
        "histogram": np.histogram(kept, [-np.inf, *EDGES, np.inf])[0],
        "size": kept.sum() ** 2 / (kept.size * (kept**2).sum()),
    }
    stacks = (by_micro_batch(values, mask), by_two_axes(values.reshape(2, 3, 4), mask.reshape(2, 3, 4)))
    for reduced in (whole(values, mask), *stacks):
        assert reduced.keys() == expected.keys()
        for name, value in expected.items():
            assert reduced[name].shape == np.shape(value)
            assert reduced[name].dtype == (jnp.int32 if name == "histogram" else jnp.float32)
            np.testing.assert_allclose(reduced[name], value, rtol=1e-6, err_msg=name)


def test_a_mean_is_weighted_by_its_parts():
    parts = statistics.Mean(np.array([1.0, 9.0], np.float32), np.array([1.0, 3.0], np.float32))
    assert compiled_reduce({"mean": parts})["mean"] == 2.5


def test_a_mean_of_nothing_is_zero():
    nothing = statistics.masked_mean(jnp.full(SHAPE, jnp.nan), jnp.zeros(SHAPE, bool))
    assert compiled_reduce({"mean": nothing})["mean"] == 0


def test_extremes_of_nothing_mark_it():
    reduced = whole(np.ones((6, 4), np.float32), np.zeros((6, 4), bool))
    for name in ("means", "table", "histogram", "quantiles", "size"):
        np.testing.assert_array_equal(reduced[name], 0, err_msg=name)
    assert reduced["maximum"] == -np.inf and reduced["minimum"] == np.inf and reduced["sum"] == 0


def test_the_gradient_of_a_masked_mean_ignores_nan_where_masked():
    def mean(values, mask):
        return statistics.masked_mean(values, mask).reduce()

    values = np.array([[1.0, np.nan], [3.0, np.inf]], np.float32)
    mask = np.array([[True, False], [True, False]])
    value, gradient = jax.jit(jax.value_and_grad(mean))(values, mask)
    assert value == 2
    np.testing.assert_array_equal(gradient, [[0.5, 0], [0.5, 0]])


def test_a_bin_holds_its_lower_edge_and_nan_is_in_none():
    values = np.array([-np.inf, 0.2, 0.25, 0.5, 0.75, 2.0, np.inf, np.nan, 1.0], np.float32)
    mask = np.array([True] * 8 + [False])
    counts = jax.jit(lambda values, mask: statistics.histogram(values, mask, EDGES).reduce())(values, mask)
    np.testing.assert_array_equal(counts, [2, 1, 2, 0, 2])


def test_effective_sample_size_is_that_of_equal_or_single_weights():
    size = jax.jit(lambda weights, mask: statistics.effective_sample_size(jnp.log(weights), mask).reduce())
    mask = np.arange(20) < 8
    for weights, expected in ((np.full(20, 3.0), 1), (np.eye(20)[3], 1 / 8), (np.eye(20)[3] + np.eye(20)[4], 2 / 8)):
        np.testing.assert_allclose(size(weights.astype(np.float32), mask), expected, rtol=1e-6)
