"""The contract that every objective keeps in every form.

Value and gradient against float64 oracles, penalties, masks, micro-batches, compilation, dtypes, sources and refusals.
The peculiarities of single objectives have files of their own.
"""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles
from support.objective_cases import (
    CASES,
    DUAL,
    NAMES,
    SHIFTED,
    assert_matches_oracle,
    assert_same_bits,
    case_id,
    function_of,
    make_config,
    run,
    run_eagerly,
)

import rspo_jax
from rspo_jax.objectives import ADVANTAGES, AGGREGATIONS

EACH_CASE = pytest.mark.parametrize(("name", "settings"), CASES, ids=case_id)


def random_penalty(seed):
    return np.random.default_rng(seed).uniform(-0.5, 1.0, (6, 7)).astype(np.float32)


# The oracle itself


@EACH_CASE
@pytest.mark.parametrize("drift", [3e-4, 0.6])
def test_closed_form_gradient_is_the_derivative_of_the_value_oracle(name, settings, drift):
    batch = oracles.random_batch(seed=11, drift=drift)
    batch = batch.replace(log_probs=batch.log_probs.astype(np.float64))
    expected = oracles.gradient(name, batch, **settings)
    assert np.all(expected[~batch.mask] == 0)
    # Rows do not depend on each other, so that one difference serves a column of tokens.
    step, differences = 1e-6, np.zeros(expected.shape)
    for column in range(expected.shape[1]):
        shift = np.where(np.arange(expected.shape[1]) == column, step, 0.0)
        above, below = (
            oracles.row_losses(name, batch.replace(log_probs=batch.log_probs + s), fixed=batch, **settings)
            for s in (shift, -shift)
        )
        differences[:, column] = (above - below) / (2 * step)
    assert differences == pytest.approx(expected, rel=1e-6, abs=1e-8)


# Against the oracle


@EACH_CASE
def test_value_and_gradient_match_the_oracle(name, settings):
    for drift in (3e-4, 0.05, 0.6, 5.0, 50.0):
        for seed in range(4):
            batch = oracles.random_batch(seed, drift)
            assert_matches_oracle(run(name, batch, settings), name, batch, settings)


@pytest.mark.parametrize(
    ("name", "settings"), [("rspo", {}), ("gspo_token", {}), ("cispo", {}), ("sapo", {}), DUAL], ids=case_id
)
def test_value_and_gradient_are_the_same_without_compilation(name, settings):
    batch, penalty = oracles.random_batch(seed=21, drift=0.6), random_penalty(21)
    eager = run_eagerly(name, batch, settings, penalty=penalty)
    assert_matches_oracle(eager, name, batch, settings, penalty)
    for eagerly, compiled in zip(eager, run(name, batch, settings, penalty=penalty), strict=True):
        np.testing.assert_allclose(eagerly, compiled, rtol=2e-6, atol=1e-8)


@EACH_CASE
def test_a_penalty_is_averaged_as_the_objective_averages_its_tokens(name, settings):
    batch, penalty = oracles.random_batch(seed=22, drift=0.6), random_penalty(22)
    result, plain = run(name, batch, settings, penalty=penalty), run(name, batch, settings)
    assert_matches_oracle(result, name, batch, settings, penalty)
    assert_same_bits(result.gradient, plain.gradient)
    np.testing.assert_allclose(result.by_penalty, oracles.token_shares(name, batch, **settings), rtol=1e-6, atol=0)
    dirty = np.where(batch.mask, penalty, np.nan)
    assert_same_bits(result, run(name, batch, settings, penalty=dirty))


def test_values_and_gradients_match_the_oracle_under_vmap():
    names = ("rspo", "gspo_token")
    batches = [oracles.random_batch(seed, drift) for seed, drift in enumerate((3e-4, 0.6, 5.0))]
    arrays = jax.tree.map(lambda *leaves: np.stack(leaves), *[batch.arrays() for batch in batches])
    log_probs = arrays.pop("log_probs")
    functions = [jax.vmap(function_of(name, make_config(name, {}))) for name in names]
    outputs = jax.jit(lambda *arguments: [function(*arguments) for function in functions])(
        log_probs, np.zeros_like(log_probs), arrays
    )
    for name, ((losses, _), (gradients, _)) in zip(names, outputs, strict=True):
        for index, batch in enumerate(batches):
            np.testing.assert_allclose(losses[index], oracles.loss(name, batch), rtol=1e-5)
            np.testing.assert_allclose(gradients[index], oracles.gradient(name, batch), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("rspo", {"gamma_min": 0.7, "clip_low": 0.1, "clip_high": 0.25}),
        ("rspo", {"gamma_min": 0.9, "clip_low": 0.3, "clip_high": 0.05, "position": "post_clip"}),
        ("gmpo", {"clip_low": 0.05, "clip_high": 0.3}),
        ("gspo", {"clip_low": 0.15, "clip_high": 0.01, "gamma_min": 0.9}),
        ("gspo_token", {"clip_low": 0.15, "clip_high": 0.01, "gamma_min": 0.9, "gamma_use": "mask"}),
        ("grpo", {"clip_low": 0.05, "clip_high": 0.28, "gamma_min": 0.65, "dual_clip": 1.3}),
        ("dapo", {"aggregation": "constant_length", "constant_length": 3}),
        ("cispo", {"clip_low": 0.05, "clip_high": 0.1, "gamma_min": 0.65}),
        ("sapo", {"tau_positive": 2.0, "tau_negative": 0.5, "gamma_min": 0.65}),
    ],
)
def test_every_config_field_reaches_the_loss(name, settings):
    batches = [oracles.random_batch(seed, drift=0.6) for seed in range(41, 47)]
    assert_matches_oracle(run_eagerly(name, batches[0], settings), name, batches[0], settings)

    def losses(options):
        return [oracles.loss(name, batch, **options) for batch in batches]

    for field in settings:
        others = {key: value for key, value in settings.items() if key != field}
        if field != "aggregation":  # the length would be refused
            assert losses(others) != losses(settings), field


# The table


def test_every_objective_names_its_source():
    for name, objective in rspo_jax.OBJECTIVES.items():
        assert re.search(r"arXiv\s+\d{4}\.\d{5}", objective.config_type.__doc__), name
        assert re.search(r"https://arxiv\.org/abs/\d{4}\.\d{5}", objective.formula.__doc__), name
        assert "J = mean" in objective.formula.__doc__ and objective.summary, name


@pytest.mark.parametrize("name", NAMES)
def test_default_config_is_the_published_one(name):
    config = rspo_jax.OBJECTIVES[name].config_type()
    assert {key: getattr(config, key) for key in oracles.DEFAULTS[name]} == oracles.DEFAULTS[name]
    assert rspo_jax.OBJECTIVES[name].checked_config(None) == config


def test_every_config_has_the_settings_of_all():
    for name, objective in rspo_jax.OBJECTIVES.items():
        config, defaults = objective.config_type(), oracles.DEFAULTS[name]
        assert config.gamma_min == defaults.get("gamma_min") and config.gamma_gradient is False
        assert config.gamma_use == "weight" and config.constant_length is None
        assert config.aggregation in AGGREGATIONS
        if "aggregation" not in defaults:
            assert config.aggregation == ("token_mean" if name == "cispo" else "sequence_mean")


def test_table_holds_exactly_the_named_objectives_with_one_signature():
    assert list(rspo_jax.OBJECTIVES) == NAMES
    expected = ["log_probs", "old_log_probs", "advantages", "mask", "router_shift", "config", "penalty"]
    for name, objective in rspo_jax.OBJECTIVES.items():
        assert objective.name == name and objective.advantages in ADVANTAGES
        for function in (objective.loss, objective.terms):
            assert list(inspect.signature(function).parameters) == expected


def test_each_objective_names_the_advantages_of_its_source():
    others = {"dr_grpo": "group_centred", "rloo": "leave_one_out", "reinforce_pp": "batch"}
    assert {name: objective.advantages for name, objective in rspo_jax.OBJECTIVES.items()} == {
        name: others.get(name, "group") for name in NAMES
    }


def test_rspo_loss_is_the_table_entry():
    entry = rspo_jax.OBJECTIVES["rspo"]
    expected = ["log_probs", "old_log_probs", "advantages", "mask", "router_shift", "config"]
    assert list(inspect.signature(rspo_jax.rspo_loss).parameters) == expected
    assert entry.config_type is rspo_jax.RSPOConfig
    arrays = oracles.random_batch(seed=44).arrays()
    for options in ({}, {"config": rspo_jax.RSPOConfig(position="post_clip")}):
        ours, table = (
            jax.make_jaxpr(functools.partial(function, **options))(**arrays)
            for function in (rspo_jax.rspo_loss, entry.loss)
        )
        assert str(ours) == str(table)
    with pytest.raises(TypeError, match="rspo takes a RSPOConfig, got a GMPOConfig"):
        rspo_jax.rspo_loss(**arrays, config=rspo_jax.GMPOConfig())


@pytest.mark.parametrize("name", NAMES)
def test_configs_are_frozen_and_hashable_and_of_one_objective(name):
    config = rspo_jax.OBJECTIVES[name].config_type()
    with pytest.raises(AttributeError):
        config.clip_low = 0.1
    assert hash(config) == hash(rspo_jax.OBJECTIVES[name].config_type())
    for other, objective in rspo_jax.OBJECTIVES.items():
        if other != name:
            with pytest.raises(TypeError, match=f"{other} takes a {objective.config_type.__name__}"):
                objective.uses_router_shift(config)


@EACH_CASE
def test_whether_the_shift_is_used_is_a_question_to_the_config(name, settings):
    objective, config = rspo_jax.OBJECTIVES[name], make_config(name, settings)
    assert objective.uses_router_shift() == (name == "rspo")
    assert objective.uses_router_shift(config) == (name == "rspo" or "gamma_min" in settings)
    # The answer is true of the gradient.
    batch = oracles.random_batch(seed=45, drift=0.05)
    other = batch.replace(router_shift=np.full_like(batch.router_shift, 0.9))
    moved = np.any(run(name, batch, settings).gradient != run(name, other, settings).gradient)
    assert moved == objective.uses_router_shift(config)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_inputs_are_computed_in_float32(name):
    batch = oracles.random_batch(seed=46, drift=0.6)
    rounded = {key: jnp.asarray(value) for key, value in batch.arrays().items()}
    rounded |= {key: value.astype(jnp.bfloat16) for key, value in rounded.items() if key != "mask"}
    exact = batch.replace(
        **{key: np.asarray(value.astype(jnp.float32)) for key, value in rounded.items() if key != "mask"}
    )
    result = run_eagerly(name, batch, **rounded)
    assert result.loss.shape == () and result.loss.dtype == result.weight.dtype == np.float32
    np.testing.assert_allclose(result.loss, oracles.loss(name, exact), rtol=1e-5)
    # The gradient has the dtype of its argument: only its last rounding is to bfloat16.
    assert result.gradient.dtype == jnp.bfloat16
    expected = oracles.gradient(name, exact)
    np.testing.assert_allclose(result.gradient.astype(np.float32), expected, rtol=2**-8, atol=0)
    in_float32 = run(name, exact)
    assert in_float32.loss.dtype == in_float32.gradient.dtype == np.float32


# Masks, empty rows, zero advantages


@EACH_CASE
def test_padding_has_no_effect_whatever_it_holds(name, settings):
    batch = oracles.random_batch(seed=71, drift=0.6)
    clean = run(name, batch, settings)
    fields = ("log_probs", "old_log_probs", "router_shift")
    for garbage in (np.nan, np.inf, -np.inf, 1e30, -1e30, 0.0):
        for changed in [*[(field,) for field in fields], fields]:
            dirty = {field: np.where(batch.mask, getattr(batch, field), np.float32(garbage)) for field in changed}
            assert_same_bits(clean, run(name, batch.replace(**dirty), settings))


@EACH_CASE
def test_masked_rows_are_as_if_absent(name, settings):
    batch = oracles.random_batch(seed=73, drift=0.6)
    present = batch.mask.any(axis=1)
    assert not present.all()
    result, filtered = run(name, batch, settings), batch.rows(present)
    np.testing.assert_array_equal(result.gradient[~present], 0.0)
    assert_matches_oracle(result._replace(gradient=result.gradient[present]), name, filtered, settings)


def test_masked_rows_are_as_if_absent_in_a_shape_of_their_own():
    batch = oracles.random_batch(seed=73, drift=0.6)
    filtered = batch.rows(batch.mask.any(axis=1)).arrays()
    loss = jax.jit(function_of("rspo", make_config("rspo", {})))
    log_probs = filtered.pop("log_probs")
    (result, _), _ = loss(log_probs, np.zeros_like(log_probs), filtered)
    np.testing.assert_allclose(result, run("rspo", batch).loss, rtol=1e-6)


@EACH_CASE
def test_zero_advantage_rows_count_in_the_denominator_and_nowhere_else(name, settings):
    batch = oracles.random_batch(seed=74, drift=0.6)
    assert batch.advantages[3] == 0.0 and batch.mask[3].any()
    result, without = run(name, batch, settings), run(name, batch.rows(np.array([0, 1, 2, 4, 5])), settings)
    np.testing.assert_array_equal(result.gradient[3], 0.0)
    assert without.weight < result.weight
    np.testing.assert_allclose(result.total, without.total, rtol=1e-5)


@EACH_CASE
def test_zero_advantages_everywhere_give_zero(name, settings):
    batch = oracles.random_batch(seed=75, drift=50.0)
    result = run(name, batch.replace(advantages=np.zeros_like(batch.advantages)), settings)
    assert result.loss == 0.0
    np.testing.assert_array_equal(result.gradient, np.zeros_like(batch.log_probs))


@EACH_CASE
def test_batch_without_response_tokens_gives_zero(name, settings):
    batch = oracles.random_batch(seed=76)
    for filler in (0.0, np.nan):
        padding = np.full_like(batch.log_probs, filler)
        empty = batch.replace(
            mask=np.zeros_like(batch.mask), log_probs=padding, old_log_probs=padding, router_shift=padding
        )
        result = run(name, empty, settings, penalty=padding)
        assert result.loss == result.weight == 0.0
        np.testing.assert_array_equal(result.gradient, np.zeros_like(batch.log_probs))
        np.testing.assert_array_equal(result.by_penalty, np.zeros_like(batch.log_probs))


@EACH_CASE
def test_order_of_responses_and_tokens_is_irrelevant(name, settings):
    batch = oracles.random_batch(seed=77, drift=0.6)
    rng = np.random.default_rng(0)
    rows, columns = rng.permutation(6), rng.permutation(7)
    shuffled = batch.rows(rows)
    shuffled = shuffled.replace(
        **{key: value[:, columns] for key, value in shuffled.arrays().items() if key != "advantages"}
    )
    plain, other = run(name, batch, settings), run(name, shuffled, settings)
    np.testing.assert_allclose(plain.loss, other.loss, rtol=1e-6)
    np.testing.assert_allclose(plain.gradient[rows][:, columns], other.gradient, rtol=1e-6, atol=1e-9)


# Terms and micro-batches


@EACH_CASE
def test_the_weight_is_known_without_parameters(name, settings):
    batch = oracles.random_batch(seed=81, drift=0.6)
    result = run(name, batch, settings)
    weight = rspo_jax.OBJECTIVES[name].weight(jnp.asarray(batch.mask), make_config(name, settings))
    assert weight.dtype == jnp.float32 and weight == result.weight == oracles.weight(name, batch, **settings)
    np.testing.assert_allclose(result.total / result.weight, result.loss, rtol=1e-6)
    in_parts = jnp.asarray(batch.mask.reshape(3, 2, 7))
    assert rspo_jax.OBJECTIVES[name].weight(in_parts, make_config(name, settings)) == weight


@EACH_CASE
def test_micro_batches_share_one_denominator(name, settings):
    batch, penalty = oracles.random_batch(seed=82, drift=0.6), random_penalty(82)
    whole = run(name, batch, settings, penalty=penalty)
    order = np.random.default_rng(3).permutation(6)
    pieces = order.reshape(3, 2)
    results = [run(name, batch.rows(piece), settings, penalty=penalty[piece]) for piece in pieces]
    weight = sum(part.weight for part in results)
    np.testing.assert_allclose(sum(part.total for part in results) / weight, whole.loss, rtol=1e-5)
    rebuilt = np.concatenate([part.gradient * max(part.weight, 1) for part in results]) / weight
    np.testing.assert_allclose(rebuilt, whole.gradient[order], rtol=1e-5, atol=1e-8)
    # The mean of the micro-batches' own means, which some trainers use, is another number.
    assert not np.isclose(np.mean([part.loss for part in results]), whole.loss, rtol=1e-3)


# Bad inputs

GOOD = oracles.batch_from_log_ratios(np.full((2, 3), 0.1), advantages=[1.0, -1.0]).arrays()
BAD = [
    ("log_probs", np.zeros(3, np.float32)),
    ("log_probs", np.zeros((2, 3, 1), np.float32)),
    ("log_probs", np.zeros((2, 3), np.int32)),
    ("old_log_probs", np.zeros((2, 4), np.float32)),
    ("old_log_probs", np.zeros((1, 3), np.float32)),
    ("advantages", np.zeros(3, np.float32)),
    ("advantages", np.zeros((3, 2), np.float32)),
    ("advantages", np.zeros((2, 1), np.float32)),
    ("advantages", np.float32(1.0)),
    ("mask", np.ones((2, 4), bool)),
    ("mask", np.ones(2, bool)),
    ("mask", np.ones((2, 3), np.float32)),
    ("router_shift", np.ones((2, 4), np.float32)),
    ("router_shift", np.ones((3, 2, 3), np.float32)),
    ("penalty", np.ones(2, np.float32)),
    ("penalty", np.ones((2, 4), np.float32)),
    ("penalty", np.ones((2, 3), np.int32)),
]


def test_bad_arrays_are_refused_by_name():
    """`terms` of every objective refuses them; `loss`, which all objectives share, hands the error on."""
    functions = [objective.terms for objective in rspo_jax.OBJECTIVES.values()] + [rspo_jax.OBJECTIVES["rspo"].loss]
    for argument, value in BAD:
        for function in functions:
            with pytest.raises((ValueError, TypeError), match=rf"\b{argument}\b"):
                function(**(GOOD | {argument: value}))
    for name, objective in rspo_jax.OBJECTIVES.items():
        if not objective.takes_token_advantages:
            with pytest.raises(ValueError, match="advantages must have one entry a row"):
                objective.terms(**(GOOD | {"advantages": np.ones((2, 3), np.float32)}))
        assert objective.takes_token_advantages == (name == "gspo_token")


CLIPPED = [name for name in NAMES if "clip_low" in oracles.DEFAULTS[name]]


def test_bad_configs_are_refused_by_name():
    for name, field, value in [
        *[(name, field, -1e-3) for name in CLIPPED for field in ("clip_low", "clip_high")],
        *[(name, "gamma_min", value) for name in SHIFTED for value in (0.0, -0.1, 1.01)],
        *[(name, "gamma_use", "drop") for name in SHIFTED],
        ("gmpo", "gamma_min", 0.8),
        ("rspo", "position", "after_clip"),
        ("rspo", "position", None),
        *[(name, "aggregation", "mean") for name in oracles.GRPO_FAMILY],
        ("grpo", "constant_length", 0),
        ("grpo", "constant_length", 8),
        ("grpo", "dual_clip", 1.0),
        ("grpo", "dual_clip", float("nan")),
        ("sapo", "tau_positive", 0.0),
        ("sapo", "tau_negative", float("inf")),
    ]:
        with pytest.raises((ValueError, TypeError), match=field):
            make_config(name, {field: value})
    with pytest.raises(ValueError, match="gamma_gradient needs gamma_use 'weight'"):
        rspo_jax.RSPOConfig(gamma_use="mask", gamma_gradient=True)


@pytest.mark.parametrize("name", CLIPPED)
def test_clips_of_zero_and_a_floor_of_one_are_legal(name):
    settings = {"clip_low": 0.0, "clip_high": 0.0} | ({"gamma_min": 1.0} if name in SHIFTED else {})
    batch = oracles.random_batch(seed=92, drift=0.6)
    assert_matches_oracle(run_eagerly(name, batch, settings), name, batch, settings)
