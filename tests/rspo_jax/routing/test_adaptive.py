"""The rules that set the scale of the router shift, on numbers made for them."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from rspo_jax.routing import AdaptiveShiftConfig, next_log_scale, scaled
from rspo_jax.routing.diagnostics import PERCENTS
from rspo_jax.training import LearnerConfig

QUANTILES = jnp.asarray([0.0, 0.001, 0.01, 0.05, 0.2])
assert len(PERCENTS) == len(QUANTILES)


def following(config, log_scale=0.0, quantiles=QUANTILES, sample_size=0.5):
    arrays = (jnp.asarray(value, jnp.float32) for value in (log_scale, quantiles, sample_size))
    return float(next_log_scale(*arrays, 0.8, config))


def test_a_scale_of_one_changes_nothing_and_what_did_not_drift_stays_at_one():
    gamma = jnp.asarray([1.0, 0.99, 0.5])
    np.testing.assert_array_equal(scaled(gamma, jnp.float32(0)), gamma)
    actual = scaled(gamma, jnp.float32(math.log(3)))
    assert actual[0] == 1
    np.testing.assert_allclose(actual, np.asarray(gamma, np.float64) ** 3, rtol=1e-6)


def test_a_fixed_scale_stays():
    assert following(AdaptiveShiftConfig(), log_scale=0.7) == pytest.approx(0.7)


@pytest.mark.parametrize(("percent", "drift"), [(50, 0.01), (90, 0.05), (99, 0.2)])
def test_the_drift_at_the_percentile_is_taken_to_the_floor(percent, drift):
    log_scale = following(AdaptiveShiftConfig("quantile", percent, rate=1.0), log_scale=2.0)
    assert math.exp(-drift * math.exp(log_scale)) == pytest.approx(0.8, rel=1e-5)


def test_the_quantile_rule_goes_part_of_the_way():
    config = AdaptiveShiftConfig("quantile", rate=0.25)
    goal = math.log(-math.log(0.8) / 0.05)
    assert following(config, log_scale=1.0) == pytest.approx(0.75 + 0.25 * goal, rel=1e-5)


def test_the_scale_grows_where_ratios_degenerate_and_falls_where_they_do_not():
    config = AdaptiveShiftConfig("sample_size", sample_size=0.9, rate=0.5)
    assert following(config, log_scale=0.1, sample_size=0.5) == pytest.approx(0.1 + 0.5 * 0.4, rel=1e-5)
    assert following(config, log_scale=0.1, sample_size=1.0) == pytest.approx(0.1 - 0.5 * 0.1, rel=1e-5)


@pytest.mark.parametrize(
    ("rule", "given"),
    [
        ("quantile", {"quantiles": QUANTILES * 0}),
        ("quantile", {"quantiles": QUANTILES * np.inf}),
        ("quantile", {"quantiles": QUANTILES * np.nan}),
        ("sample_size", {"sample_size": np.nan}),
    ],
)
def test_what_says_nothing_changes_nothing(rule, given):
    assert following(AdaptiveShiftConfig(rule), log_scale=0.3, **given) == pytest.approx(0.3)


def test_the_scale_is_bounded():
    config = AdaptiveShiftConfig("quantile", rate=1.0, most=10.0)
    assert following(config, quantiles=QUANTILES * 1e-6) == pytest.approx(math.log(10))
    assert following(config, quantiles=QUANTILES * 1e6) == pytest.approx(-math.log(10))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "entropy"}, "adaptive_shift.rule must be one of fixed, quantile, sample_size; got 'entropy'"),
        ({"percent": 95}, "percent must be one of"),
        ({"sample_size": 0.0}, "sample_size is a share"),
        ({"rate": 0.0}, "rate must be positive"),
        ({"rule": "quantile", "rate": 1.5}, "at most 1 for quantile"),
        ({"most": 1.0}, "most must be above 1"),
    ],
)
def test_configs_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveShiftConfig(**changes)


def test_learners_that_have_nothing_to_adapt():
    adaptive = AdaptiveShiftConfig("quantile")
    assert LearnerConfig(adaptive_shift=adaptive).gamma_min == 0.8
    with pytest.raises(ValueError, match="gmpo has none: give it a gamma_min below 1"):
        LearnerConfig("gmpo", adaptive_shift=adaptive)
    with pytest.raises(ValueError, match="switch diagnostics on"):
        LearnerConfig(adaptive_shift=adaptive, diagnostics=False)
