"""The numbers that the objectives report beside the loss: clip fractions by sign, ratios,
divergence, router shift. Knows the public functions only; the loss itself is checked elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import rspo_jax

NAMES = ["rspo", "gmpo", "gspo", "grpo", "gspo_rs", "grpo_rs"]
CASES = [(name, {}) for name in NAMES] + [
    ("rspo", {"position": "post_clip"}),
    ("rspo", {"position": "post_clip_literal"}),
    ("grpo", {"aggregation": "token_mean"}),
]
ALWAYS = {
    "clip_fraction",
    "clip_fraction_positive",
    "clip_fraction_negative",
    "ratio_mean",
    "ratio_max",
    "approx_kl",
}
WITH_ROUTER_SHIFT = {"gamma_mean", "gamma_min", "gamma_p10"}
CLIP_FRACTIONS = ("clip_fraction", "clip_fraction_positive", "clip_fraction_negative")


def case_id(value):
    return "-".join(value.values()) or "default" if isinstance(value, dict) else None


def pad(array):
    """All batches run in one shape, so that each configuration is compiled once."""
    return np.pad(array, [(0, most - size) for size, most in zip(array.shape, (6, 7), strict=False)])


def report(name, batch, settings=None, **overrides):
    """The metrics as floats."""
    arrays = {key: value for key, value in (batch.arrays() | overrides).items() if value is not None}
    arrays = {key: jnp.asarray(pad(np.asarray(value))) for key, value in arrays.items()}
    config = rspo_jax.OBJECTIVES[name].config_type(**(settings or {}))
    _, metrics = rspo_jax.OBJECTIVES[name].loss(**arrays, config=config)
    return {key: float(value) for key, value in metrics.items()}


def clip_fractions(metrics):
    return tuple(metrics[key] for key in CLIP_FRACTIONS)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=case_id)
@pytest.mark.parametrize("drift", [3e-4, 0.6, 5.0, 50.0])
def test_metrics_match_oracle(name, settings, drift):
    for seed in range(6):
        batch = oracles.random_batch(seed, drift)
        metrics = report(name, batch, settings)
        expected = oracles.metrics(name, batch, **settings)
        for key, value in expected.items():
            assert metrics[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("name", NAMES)
def test_metrics_match_oracle_under_vmap(name):
    batches = [oracles.random_batch(seed, 0.6) for seed in (10, 11)]
    arrays = jax.tree.map(lambda *leaves: np.stack(leaves), *[batch.arrays() for batch in batches])
    _, metrics = jax.vmap(lambda arrays: rspo_jax.OBJECTIVES[name].loss(**arrays))(arrays)
    for index, batch in enumerate(batches):
        for key, value in oracles.metrics(name, batch).items():
            assert float(metrics[key][index]) == pytest.approx(value, rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("name", NAMES)
def test_metrics_are_float32_scalars(name):
    batch = oracles.random_batch(seed=20)
    arrays = {key: jnp.asarray(value) for key, value in batch.arrays().items()}
    _, metrics = rspo_jax.OBJECTIVES[name].loss(**arrays, entropy=jnp.ones(batch.mask.shape))
    for key, value in metrics.items():
        assert value.shape == () and value.dtype == jnp.float32, key
        assert np.isfinite(value), key


@pytest.mark.parametrize("name", NAMES)
def test_router_shift_and_entropy_are_reported_only_where_given(name):
    batch = oracles.random_batch(seed=21)
    plain = set(report(name, batch, router_shift=None))
    assert plain >= ALWAYS
    assert not [key for key in plain if key.startswith("gamma") or key == "entropy"]
    shifted = set(report(name, batch))
    assert shifted >= ALWAYS | WITH_ROUTER_SHIFT and "entropy" not in shifted
    assert ("gamma_floor_fraction" in shifted) == (name in oracles.USES_ROUTER_SHIFT)
    full = set(report(name, batch, entropy=jnp.ones(batch.mask.shape)))
    assert full == shifted | {"entropy"}


def test_clip_fractions_are_split_by_the_sign_of_the_advantage():
    batch = oracles.batch_from_log_ratios(
        [[1.0, 1.0, 1.0, 0.0], [-1.0, 0.0, 0.0, 9.0], [1.0, -1.0, 1.0, -1.0]],
        advantages=[2.0, -1.0, 0.0],
        mask=[[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]],
    )
    # Three of four good tokens, one of two bad ones, none of the four with a zero advantage.
    for name in ("rspo", "gmpo", "grpo", "grpo_rs"):
        np.testing.assert_allclose(clip_fractions(report(name, batch)), (0.4, 0.75, 0.5), rtol=1e-6)


@pytest.mark.parametrize("name", ["gspo", "gspo_rs"])
def test_clipped_sequence_counts_with_all_its_tokens(name):
    batch = oracles.batch_from_log_ratios(
        [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, -1.0, 0.0], [0.0, 0.0, 0.0, 0.0]],
        advantages=[1.0, -1.0, 1.0],
        mask=[[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]],
    )
    np.testing.assert_allclose(clip_fractions(report(name, batch)), (7 / 8, 4 / 5, 1.0), rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_tie_at_the_clip_bound_is_not_clipped(name):
    tie = 0.5 if name in ("rspo", "gmpo") else 0.0
    batch = oracles.batch_from_log_ratios([[tie, tie], [-tie, -tie]], advantages=[1.0, -1.0])
    assert clip_fractions(report(name, batch, {"clip_low": tie, "clip_high": tie})) == (
        0.0,
        0.0,
        0.0,
    )
    batch = oracles.batch_from_log_ratios([[tie + 1e-3] * 2, [-tie - 1e-3] * 2], advantages=[1.0, -1.0])
    assert clip_fractions(report(name, batch, {"clip_low": tie, "clip_high": tie})) == (
        1.0,
        1.0,
        1.0,
    )


@pytest.mark.parametrize("name", NAMES)
def test_clip_fraction_counts_the_tokens_whose_gradient_is_zero(name):
    batch = oracles.random_batch(seed=22, drift=0.8)
    arrays = {key: jnp.asarray(value) for key, value in batch.arrays().items()}
    log_probs = arrays.pop("log_probs")
    loss = rspo_jax.OBJECTIVES[name].loss
    differentiated = jax.jit(jax.grad(lambda values: loss(values, **arrays), has_aux=True))
    gradient, metrics = differentiated(log_probs)
    cut = (np.asarray(gradient) == 0) & batch.mask & (batch.advantages != 0)[:, None]
    assert 0 < cut.sum() < batch.mask.sum()
    np.testing.assert_allclose(metrics["clip_fraction"], cut.sum() / batch.mask.sum(), rtol=1e-6)


def test_gspo_router_shift_clips_bad_responses_only_when_on_policy():
    # The published clip of GSPO is so tight that any router shift closes it for every bad response.
    batch = oracles.batch_from_log_ratios(np.zeros((2, 3)), advantages=[1.0, -1.0], router_shift=0.9996)
    assert clip_fractions(report("gspo_rs", batch)) == (0.5, 0.0, 1.0)
    assert clip_fractions(report("gspo", batch)) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("advantage", "absent"), [(1.0, "negative"), (-1.0, "positive"), (0.0, "both")])
def test_clip_fraction_of_an_absent_sign_is_zero(name, advantage, absent):
    batch = oracles.batch_from_log_ratios([[2.0, -2.0, 0.0]] * 2, advantages=[advantage] * 2)
    metrics = report(name, batch)
    for sign in ("positive", "negative"):
        if absent in (sign, "both"):
            assert metrics[f"clip_fraction_{sign}"] == 0.0


def test_router_shift_metrics_are_of_the_raw_shift():
    gamma = [[0.1, 0.2, 0.9, 1.0], [0.7, 0.95, 0.3, 0.3]]
    batch = oracles.batch_from_log_ratios(
        np.zeros((2, 4)),
        advantages=[1.0, -1.0],
        mask=[[1, 1, 1, 1], [1, 1, 0, 0]],
        router_shift=gamma,
    )
    seen = np.array([0.1, 0.2, 0.9, 1.0, 0.7, 0.95])
    for name in NAMES:
        metrics = report(name, batch)
        assert metrics["gamma_mean"] == pytest.approx(seen.mean(), rel=1e-6)
        assert metrics["gamma_min"] == pytest.approx(0.1, rel=1e-6)
        assert metrics["gamma_p10"] == pytest.approx(np.quantile(seen, 0.1), abs=1e-6)
    # On the floored shift this fraction would always be zero.
    for name in ("rspo", "gspo_rs", "grpo_rs"):
        assert report(name, batch)["gamma_floor_fraction"] == pytest.approx(3 / 6)


@pytest.mark.parametrize("name", ["rspo", "gspo_rs", "grpo_rs"])
def test_router_shift_exactly_at_the_floor_is_not_below_it(name):
    below = np.nextafter(np.float32(0.75), np.float32(0))
    gamma = np.array([[0.75, 0.75, below, 1.0]], np.float32)
    batch = oracles.batch_from_log_ratios(np.zeros((1, 4)), advantages=[1.0], router_shift=gamma)
    assert report(name, batch, {"gamma_min": 0.75})["gamma_floor_fraction"] == 0.25
    # 0.8 has no exact float32; the default floor must be compared in the dtype of the shift.
    gamma = np.full((1, 4), 0.8, np.float32)
    batch = batch.replace(router_shift=gamma)
    assert report(name, batch)["gamma_floor_fraction"] == 0.0
    batch = batch.replace(router_shift=np.nextafter(gamma, np.float32(0)))
    assert report(name, batch)["gamma_floor_fraction"] == 1.0


def test_tenth_percentile_is_the_linear_quantile_of_the_response_tokens():
    rng = np.random.default_rng(0)
    for count in range(1, 43):
        mask = np.zeros(42, bool)
        mask[rng.permutation(42)[:count]] = True
        batch = oracles.random_batch(seed=count).replace(
            mask=mask.reshape(6, 7), router_shift=rng.uniform(0.01, 1.0, (6, 7)).astype(np.float32)
        )
        expected = np.quantile(batch.router_shift[batch.mask].astype(np.float64), 0.1, method="linear")
        assert report("rspo", batch)["gamma_p10"] == pytest.approx(expected, abs=1e-6), count


def test_tenth_percentile_stays_exact_for_thousands_of_tokens():
    # The quantile lies 0.6 of the way across a wide gap, so a rank held in float32 shows.
    shape = (17, 241)
    gamma = np.where(np.arange(4097) < 410, 0.1, 1.0).astype(np.float32)
    gamma = np.random.default_rng(2).permutation(gamma).reshape(shape)
    zeros, mask = jnp.zeros(shape), jnp.ones(shape, bool)
    _, metrics = rspo_jax.rspo_loss(zeros, zeros, jnp.ones(17), mask, router_shift=jnp.asarray(gamma))
    expected = np.quantile(gamma.astype(np.float64), 0.1)
    assert float(metrics["gamma_p10"]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_padding_has_no_effect_on_metrics(name, garbage):
    batch = oracles.random_batch(seed=23, drift=0.6)
    entropy = np.linspace(0.0, 2.0, 42, dtype=np.float32).reshape(6, 7)
    clean = report(name, batch, entropy=entropy)
    fields = {"log_probs", "old_log_probs", "router_shift"}
    dirty = {field: np.where(batch.mask, getattr(batch, field), np.float32(garbage)) for field in fields}
    dirty["entropy"] = np.where(batch.mask, entropy, np.float32(garbage))
    assert report(name, batch, **dirty) == clean


def test_entropy_is_the_mean_over_response_tokens():
    batch = oracles.random_batch(seed=24)
    entropy = np.random.default_rng(1).uniform(0.0, 5.0, (6, 7)).astype(np.float32)
    for name in NAMES:
        metrics = report(name, batch, entropy=entropy)
        assert metrics["entropy"] == pytest.approx(entropy[batch.mask].mean(dtype=np.float64), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_on_policy_metrics(name):
    batch = oracles.random_batch(seed=25)
    batch = batch.replace(log_probs=batch.old_log_probs, router_shift=np.ones_like(batch.router_shift))
    metrics = report(name, batch)
    assert clip_fractions(metrics) == (0.0, 0.0, 0.0)
    assert (metrics["ratio_mean"], metrics["ratio_max"], metrics["approx_kl"]) == (1.0, 1.0, 0.0)
    assert (metrics["gamma_mean"], metrics["gamma_min"], metrics["gamma_p10"]) == (1.0, 1.0, 1.0)
    assert metrics.get("gamma_floor_fraction", 0.0) == 0.0


def test_ratios_and_divergence_leave_the_router_shift_out():
    batch = oracles.random_batch(seed=26, drift=0.6)
    keys = ("ratio_mean", "ratio_max", "approx_kl")
    for name in NAMES:
        plain, shifted = report(name, batch, router_shift=None), report(name, batch)
        assert [plain[key] for key in keys] == [shifted[key] for key in keys]


@pytest.mark.parametrize("name", NAMES)
def test_metrics_of_a_batch_without_response_tokens_are_finite(name):
    batch = oracles.random_batch(seed=27)
    padding = np.full_like(batch.log_probs, np.nan)
    empty = batch.replace(mask=np.zeros_like(batch.mask), log_probs=padding, router_shift=padding)
    metrics = report(name, empty, entropy=padding)
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert clip_fractions(metrics) == (0.0, 0.0, 0.0)
