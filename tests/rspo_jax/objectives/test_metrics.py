"""The metrics that objectives report beside the loss: clip fractions by sign, ratios, divergence, router shift."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles
from support.objective_cases import DUAL, SHIFT, case_id, make_config, pad

import rspo_jax

NAMES = ["rspo", "gmpo", "gspo", "grpo", "cispo", "sapo"]
"""One objective for each kind of clip."""
CASES = [
    *[(name, {}) for name in NAMES],
    ("gspo", SHIFT),
    ("grpo", SHIFT | {"gamma_use": "mask"}),
    DUAL,
]
FLOORED = [("rspo", {}), *CASES[-3:-1]]
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


@jax.jit
def compiled(arrays):
    """The metrics of all forms in one program, which is much faster to compile than one program a form."""
    return [rspo_jax.OBJECTIVES[name].loss(**arrays, config=make_config(name, settings))[1] for name, settings in CASES]


def reports(batch, **overrides):
    """Return the metrics of every form as floats, by (name, id of the settings)."""
    arrays = {key: pad(value) for key, value in (batch.arrays() | overrides).items()}
    return {
        (name, case_id(settings)): {key: float(value) for key, value in metrics.items()}
        for (name, settings), metrics in zip(CASES, jax.device_get(compiled(arrays)), strict=True)
    }


def clip_fractions(metrics):
    return tuple(metrics[key] for key in CLIP_FRACTIONS)


def test_metrics_match_oracle():
    for drift in (3e-4, 0.6, 5.0, 50.0):
        for seed in range(4):
            batch = oracles.random_batch(seed, drift)
            found = reports(batch)
            for name, settings in CASES:
                metrics = found[name, case_id(settings)]
                for key, value in oracles.metrics(name, batch, **settings).items():
                    assert metrics[key] == pytest.approx(value, rel=1e-5, abs=1e-6), (name, settings, key)


def test_metrics_match_oracle_under_vmap():
    batches = [oracles.random_batch(seed, 0.6) for seed in (10, 11)]
    arrays = jax.tree.map(lambda *leaves: np.stack(leaves), *[batch.arrays() for batch in batches])
    _, metrics = jax.vmap(lambda arrays: rspo_jax.OBJECTIVES["rspo"].loss(**arrays))(arrays)
    for index, batch in enumerate(batches):
        for key, value in oracles.metrics("rspo", batch).items():
            assert float(metrics[key][index]) == pytest.approx(value, rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("name", rspo_jax.OBJECTIVES)
def test_the_router_shift_is_reported_only_where_given(name):
    array, rows = jax.ShapeDtypeStruct((6, 7), jnp.float32), jax.ShapeDtypeStruct((6,), jnp.float32)
    arrays = {"log_probs": array, "old_log_probs": array, "advantages": rows}
    arrays["mask"] = jax.ShapeDtypeStruct((6, 7), jnp.bool_)

    def keys(**more):
        _, metrics = jax.eval_shape(lambda arrays: rspo_jax.OBJECTIVES[name].loss(**arrays), arrays | more)
        assert {(value.shape, value.dtype) for value in metrics.values()} == {((), np.dtype("float32"))}
        return set(metrics)

    assert keys() == ALWAYS
    shifted = ALWAYS | WITH_ROUTER_SHIFT | ({"gamma_floor_fraction"} if name == "rspo" else set())
    assert keys(router_shift=array) == shifted
    assert keys(router_shift=array, penalty=array) == shifted


def test_clip_fractions_are_split_by_the_sign_of_the_advantage():
    batch = oracles.batch_from_log_ratios(
        [[1.0, 1.0, 1.0, 0.0], [-1.0, 0.0, 0.0, 9.0], [1.0, -1.0, 1.0, -1.0]],
        advantages=[2.0, -1.0, 0.0],
        mask=[[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]],
    )
    found = reports(batch)
    # Three of four good tokens, one of two bad ones, none of the four with a zero advantage.
    for name in ("rspo", "gmpo", "grpo"):
        np.testing.assert_allclose(clip_fractions(found[name, "default"]), (0.4, 0.75, 0.5), rtol=1e-6)
    # CISPO clips the weights of all tokens from above and, by default, those of none from below.
    np.testing.assert_allclose(clip_fractions(found["cispo", "default"]), (0.3, 0.75, 0.0), rtol=1e-6)
    assert clip_fractions(found["sapo", "default"]) == (0.0, 0.0, 0.0)


def test_clipped_sequence_counts_with_all_its_tokens():
    batch = oracles.batch_from_log_ratios(
        [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, -1.0, 0.0], [0.0, 0.0, 0.0, 0.0]],
        advantages=[1.0, -1.0, 1.0],
        mask=[[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]],
    )
    np.testing.assert_allclose(clip_fractions(reports(batch)["gspo", "default"]), (7 / 8, 4 / 5, 1.0), rtol=1e-6)


def test_clip_fraction_counts_the_tokens_whose_gradient_is_zero():
    batch = oracles.random_batch(seed=22, drift=0.8)
    found = reports(batch)
    for name in ("rspo", "gmpo", "gspo", "grpo"):
        cut = (oracles.gradient(name, batch) == 0) & batch.mask & (batch.advantages != 0)[:, None]
        assert 0 < cut.sum() < batch.mask.sum()
        metrics = found[name, "default"]
        np.testing.assert_allclose(metrics["clip_fraction"], cut.sum() / batch.mask.sum(), rtol=1e-6)


def test_learned_tokens_are_those_with_an_advantage_that_no_clip_cuts():
    for drift in (3e-4, 0.6, 50.0):
        batch = oracles.random_batch(7, drift)
        with_advantage = batch.mask & (batch.advantages != 0)[:, None]
        for name, settings in CASES:
            row, arrays = rspo_jax.OBJECTIVES[name], {key: jnp.asarray(value) for key, value in batch.arrays().items()}
            _, statistics = row.terms(**arrays, config=make_config(name, settings))
            learned = with_advantage if name == "cispo" else with_advantage & oracles.kept(name, batch, **settings)
            assert float(row.learned_tokens(statistics)) == learned.sum(), (name, settings)


def test_gspo_router_shift_clips_bad_responses_only_when_on_policy():
    """GSPO's published clip is so tight that any router shift closes it for every bad response."""
    found = reports(oracles.batch_from_log_ratios(np.zeros((2, 3)), advantages=[1.0, -1.0], router_shift=0.9996))
    assert clip_fractions(found["gspo", case_id(SHIFT)]) == (0.5, 0.0, 1.0)
    assert clip_fractions(found["gspo", "default"]) == (0.0, 0.0, 0.0)


def test_clip_fraction_of_an_absent_sign_is_zero():
    for advantage, absent in ((1.0, ["negative"]), (-1.0, ["positive"]), (0.0, ["positive", "negative"])):
        batch = oracles.batch_from_log_ratios([[2.0, -2.0, 0.0]] * 2, advantages=[advantage] * 2)
        for form, metrics in reports(batch).items():
            assert [metrics[f"clip_fraction_{sign}"] for sign in absent] == [0.0] * len(absent), form


def test_router_shift_metrics_are_of_the_raw_shift():
    gamma = [[0.1, 0.2, 0.9, 1.0], [0.7, 0.95, 0.3, 0.3]]
    batch = oracles.batch_from_log_ratios(
        np.zeros((2, 4)),
        advantages=[1.0, -1.0],
        mask=[[1, 1, 1, 1], [1, 1, 0, 0]],
        router_shift=gamma,
    )
    seen = np.array([0.1, 0.2, 0.9, 1.0, 0.7, 0.95])
    found = reports(batch)
    for metrics in found.values():
        assert metrics["gamma_mean"] == pytest.approx(seen.mean(), rel=1e-6)
        assert metrics["gamma_min"] == pytest.approx(0.1, rel=1e-6)
        assert metrics["gamma_p10"] == pytest.approx(np.quantile(seen, 0.1), abs=1e-6)
    # On the floored shift this fraction would always be zero.
    for name, settings in FLOORED:
        assert found[name, case_id(settings)]["gamma_floor_fraction"] == pytest.approx(3 / 6)


def test_router_shift_exactly_at_the_floor_is_not_below_it():
    """0.8 has no exact float32; the floor must be compared in the dtype of the shift."""
    gamma = np.full((1, 4), 0.8, np.float32)
    below = np.nextafter(gamma, np.float32(0))
    mixed = gamma.copy()
    mixed[0, 2] = below[0, 2]
    for shift, expected in ((gamma, 0.0), (below, 1.0), (mixed, 0.25)):
        found = reports(oracles.batch_from_log_ratios(np.zeros((1, 4)), advantages=[1.0], router_shift=shift))
        for name, settings in FLOORED:
            assert found[name, case_id(settings)]["gamma_floor_fraction"] == expected


def test_tenth_percentile_is_the_linear_quantile_of_the_response_tokens():
    rng = np.random.default_rng(0)
    for count in range(1, 43):
        mask = np.zeros(42, bool)
        mask[rng.permutation(42)[:count]] = True
        batch = oracles.random_batch(seed=count).replace(
            mask=mask.reshape(6, 7), router_shift=rng.uniform(0.01, 1.0, (6, 7)).astype(np.float32)
        )
        expected = np.quantile(batch.router_shift[batch.mask].astype(np.float64), 0.1, method="linear")
        assert reports(batch)["rspo", "default"]["gamma_p10"] == pytest.approx(expected, abs=1e-6), count


def test_tenth_percentile_stays_exact_for_thousands_of_tokens():
    """The quantile lies 0.6 of the way across a wide gap, so that a rank held in float32 shows."""
    shape = (17, 241)
    gamma = np.where(np.arange(4097) < 410, 0.1, 1.0).astype(np.float32)
    gamma = np.random.default_rng(2).permutation(gamma).reshape(shape)
    zeros, mask = np.zeros(shape, np.float32), np.ones(shape, bool)
    _, metrics = rspo_jax.rspo_loss(zeros, zeros, np.ones(17, np.float32), mask, router_shift=gamma)
    expected = np.quantile(gamma.astype(np.float64), 0.1)
    assert float(metrics["gamma_p10"]) == pytest.approx(expected, abs=1e-6)


def test_padding_has_no_effect_on_metrics():
    batch = oracles.random_batch(seed=23, drift=0.6)
    clean = reports(batch)
    for garbage in (np.nan, np.inf, -np.inf, 1e30):
        fields = ("log_probs", "old_log_probs", "router_shift")
        dirty = {field: np.where(batch.mask, getattr(batch, field), np.float32(garbage)) for field in fields}
        assert reports(batch, **dirty) == clean


def test_on_policy_metrics():
    batch = oracles.random_batch(seed=25)
    batch = batch.replace(log_probs=batch.old_log_probs, router_shift=np.ones_like(batch.router_shift))
    for metrics in reports(batch).values():
        assert clip_fractions(metrics) == (0.0, 0.0, 0.0)
        assert (metrics["ratio_mean"], metrics["ratio_max"], metrics["approx_kl"]) == (1.0, 1.0, 0.0)
        assert (metrics["gamma_mean"], metrics["gamma_min"], metrics["gamma_p10"]) == (1.0, 1.0, 1.0)
        assert metrics.get("gamma_floor_fraction", 0.0) == 0.0


def test_ratios_and_divergence_leave_the_router_shift_out():
    batch = oracles.random_batch(seed=26, drift=0.6)
    plain, shifted = reports(batch, router_shift=np.ones_like(batch.router_shift)), reports(batch)
    for form in plain:
        for key in ("ratio_mean", "ratio_max", "approx_kl"):
            assert plain[form][key] == shifted[form][key], form


def test_metrics_of_a_batch_without_response_tokens_are_finite():
    batch = oracles.random_batch(seed=27)
    padding = np.full_like(batch.log_probs, np.nan)
    empty = batch.replace(mask=np.zeros_like(batch.mask), log_probs=padding, router_shift=padding)
    for metrics in reports(empty).values():
        assert all(np.isfinite(value) for value in metrics.values()), metrics
        assert clip_fractions(metrics) == (0.0, 0.0, 0.0)
