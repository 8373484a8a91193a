"""Rotary positions against float64 NumPy written from the papers: scaled frequencies, angles, both orders of pairs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.rope import RopeScaling, inverse_frequencies, logit_scale, rotary_angles, rotate, rotate_pairs

YARN = {"kind": "yarn", "factor": 40.0, "original_max_positions": 4096}
LLAMA3 = {
    "kind": "llama3",
    "factor": 8.0,
    "original_max_positions": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def plain_frequencies(dim, theta):
    return np.asarray([theta ** (-2 * pair / dim) for pair in range(dim // 2)])


def yarn_frequencies(dim, theta, factor, length, fast, slow, truncate):
    """Section 3.2 of arXiv 2309.00071, but with the ramp over the pairs, as every implementation has it."""
    ends = [dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta)) for turns in (fast, slow)]
    if truncate:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    first, last = max(ends[0], 0), min(ends[1], dim - 1)
    frequencies = []
    for pair, frequency in enumerate(plain_frequencies(dim, theta)):
        divided = min(max((pair - first) / (last - first), 0), 1)
        frequencies.append(divided * frequency / factor + (1 - divided) * frequency)
    return np.asarray(frequencies)


def llama3_frequencies(dim, theta, factor, length, low, high):
    frequencies = []
    for frequency in plain_frequencies(dim, theta):
        wave = 2 * math.pi / frequency
        if wave < length / high:
            frequencies.append(frequency)
        elif wave > length / low:
            frequencies.append(frequency / factor)
        else:
            smooth = (length / wave - low) / (high - low)
            frequencies.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.asarray(frequencies)


CASES = {
    "none": (24, 1e4, None, plain_frequencies(24, 1e4), 1.0),
    "linear": (64, 1e4, {"kind": "linear", "factor": 4.0}, plain_frequencies(64, 1e4) / 4, 1.0),
    "yarn": (64, 1e4, YARN, yarn_frequencies(64, 1e4, 40, 4096, 32, 1, True), 1 + math.log(40) / 10),
    "yarn of gpt-oss": (
        64,
        1.5e5,
        YARN | {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
        yarn_frequencies(64, 1.5e5, 32, 4096, 32, 1, False),
        1 + math.log(32) / 10,
    ),
    "yarn of DeepSeek-V2-Lite": (
        64,
        1e4,
        YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        yarn_frequencies(64, 1e4, 40, 4096, 32, 1, True),
        1.0,
    ),
    "yarn with two mscales": (
        32,
        1e4,
        YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.5},
        yarn_frequencies(32, 1e4, 40, 4096, 16, 2, True),
        (1 + math.log(40) / 10) / (1 + math.log(40) / 20),
    ),
    "yarn with an mscale alone": (
        32,
        1e4,
        YARN | {"mscale": 0.5, "mscale_all_dim": 0.0},
        yarn_frequencies(32, 1e4, 40, 4096, 32, 1, True),
        1 + math.log(40) / 10,
    ),
    "yarn with its own attention factor": (
        32,
        1e6,
        YARN | {"factor": 4.0, "attention_factor": 0.75, "mscale": 1.0, "mscale_all_dim": 0.5},
        yarn_frequencies(32, 1e6, 4, 4096, 32, 1, True),
        0.75,
    ),
    "llama3": (128, 5e5, LLAMA3, llama3_frequencies(128, 5e5, 8, 8192, 1, 4), 1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_angles_match_the_papers(name):
    dim, theta, fields, expected, expected_factor = CASES[name]
    scaling, factors = fields and RopeScaling(**fields), []
    positions = np.asarray([[0, 1, 2, 500], [7, 3, 3, 40]], np.int32)

    @jax.jit
    def run(positions):
        frequencies, factor = inverse_frequencies(dim, theta, scaling)
        factors.append(factor)
        return frequencies, rotary_angles(positions, dim, theta, scaling)

    frequencies, (cosine, sine) = run(positions)
    assert frequencies.dtype == jnp.float32 and frequencies.shape == (dim // 2,)
    np.testing.assert_allclose(np.asarray(frequencies, np.float64), expected, rtol=1e-6)
    assert factors == [pytest.approx(expected_factor, rel=1e-12)]
    angles = positions[:, :, None, None] * expected
    for actual, function in ((cosine, np.cos), (sine, np.sin)):
        assert actual.dtype == jnp.float32 and actual.shape == (2, 4, 1, dim // 2)
        np.testing.assert_allclose(actual, expected_factor * function(angles), atol=500 * 5e-7)


def test_the_stretch_keeps_the_first_pairs_and_divides_the_last():
    for fields in (YARN, LLAMA3):
        stretched = jax.jit(lambda scaling=RopeScaling(**fields): inverse_frequencies(128, 5e5, scaling)[0])()
        ratios = np.asarray(stretched) / plain_frequencies(128, 5e5)
        np.testing.assert_allclose(ratios[0], 1, rtol=1e-6)
        np.testing.assert_allclose(ratios[-1], 1 / fields["factor"], rtol=1e-6)
        assert np.all(np.diff(ratios) < 1e-6) and np.sum(np.abs(np.diff(ratios)) > 1e-3) > 5


def complex_of(x, pairs_of):
    """Return [..., R] as complex numbers [..., R/2]; pairs_of(x) gives both halves of the pairs."""
    first, second = pairs_of(np.asarray(x, np.float64))
    return first + 1j * second


def halves(x):
    return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]


def evens_and_odds(x):
    return x[..., 0::2], x[..., 1::2]


@pytest.mark.parametrize(("turn", "pairs_of"), [(rotate, halves), (rotate_pairs, evens_and_odds)])
def test_rotation_multiplies_each_pair_as_a_complex_number(turn, pairs_of):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = rng.integers(0, 50, size=(2, 5)).astype(np.int32)
    rotated = jax.jit(lambda x, positions: turn(x, *rotary_angles(positions, 8, 100.0)))(x, positions)
    expected = complex_of(x, pairs_of) * np.exp(1j * positions[:, :, None, None] * plain_frequencies(8, 100.0))
    np.testing.assert_allclose(rotated, np.concatenate([expected.real, expected.imag], axis=-1), atol=2e-5)


@pytest.mark.parametrize("turn", [rotate, rotate_pairs])
def test_products_depend_on_the_distance_alone_and_scale_with_the_attention_factor(turn):
    query_and_key = np.random.default_rng(1).normal(size=(2, 1, 16)).astype(np.float32)

    def products(scaling, *positions):
        """Return query · key for each pair of their positions."""
        angles = rotary_angles(jnp.asarray(positions, jnp.int32), 16, 1e4, scaling)
        turned = turn(jnp.tile(query_and_key, (len(positions), 1, 1, 1)), *angles)
        return jnp.sum(turned[:, 0] * turned[:, 1], axis=(1, 2))

    run = jax.jit(products, static_argnums=range(4))
    near, far, other = run(RopeScaling(**YARN), (12, 5), (107, 100), (12, 6)).tolist()
    assert near == pytest.approx(far, rel=1e-4)
    assert abs(near - other) > 1e-2
    plain = float(np.sum(query_and_key[0] * query_and_key[1]))
    unstretched, *_ = run(None, (3, 3), (3, 3), (3, 3)).tolist()
    stretched, *_ = run(RopeScaling(**YARN), (3, 3), (3, 3), (3, 3)).tolist()
    assert unstretched == pytest.approx(plain, rel=1e-5)
    assert stretched == pytest.approx((1 + math.log(40) / 10) ** 2 * plain, rel=1e-5)


@pytest.mark.parametrize("turn", [rotate, rotate_pairs])
def test_rotation_keeps_the_dtype(turn):
    x, angles = jax.ShapeDtypeStruct((1, 2, 1, 4), jnp.bfloat16), jax.ShapeDtypeStruct((1, 2, 1, 2), jnp.float32)
    turned = jax.eval_shape(turn, x, angles, angles)
    assert (turned.shape, turned.dtype) == (x.shape, jnp.bfloat16)


def test_logits_are_scaled_by_mscale_all_dim_alone():
    assert logit_scale(192) == 192**-0.5
    assert logit_scale(64, RopeScaling(**LLAMA3)) == logit_scale(64, RopeScaling(**YARN, mscale=1.0)) == 0.125
    both = RopeScaling(**YARN, mscale=1.0, mscale_all_dim=0.5)
    assert logit_scale(64, both) == pytest.approx(0.125 * (1 + math.log(40) / 20) ** 2)
    assert logit_scale(64, RopeScaling(**YARN, mscale_all_dim=0.0)) == 0.125


REFUSED = [
    ({"kind": "dynamic", "factor": 2.0}, "must be one of .* got 'dynamic'"),
    ({"kind": "linear", "factor": 0.5}, "at least 1, got 0.5"),
    ({"kind": "linear", "factor": math.nan}, "at least 1, got nan"),
    ({"kind": "linear", "factor": math.inf}, "at least 1, got inf"),
    (
        {"kind": "linear", "factor": 2.0, "original_max_positions": 8},
        "original_max_positions is not for .*'linear'",
    ),
    ({"kind": "linear", "factor": 2.0, "truncate": False}, "truncate is not for .*'linear'"),
    (YARN | {"low_freq_factor": 1.0}, "low_freq_factor is not for .*'yarn'"),
    (LLAMA3 | {"mscale": 1.0}, "mscale is not for .*'llama3'"),
    (YARN | {"original_max_positions": None}, "'yarn' needs original_max_positions"),
    (YARN | {"original_max_positions": 0}, "original_max_positions .* above 0, got 0"),
    (LLAMA3 | {"high_freq_factor": None}, "'llama3' needs high_freq_factor"),
    (YARN | {"beta_fast": 0.0}, "beta_fast .* above 0, got 0.0"),
    (YARN | {"mscale": -1.0}, "mscale .* 0 or more, got -1.0"),
    (YARN | {"attention_factor": math.nan}, "attention_factor .* above 0, got nan"),
    (YARN | {"beta_slow": 32.0}, "beta_fast must be above beta_slow, got 32.0 and 32.0"),
    (LLAMA3 | {"low_freq_factor": 4.0}, "high_freq_factor must be above low_freq_factor, got 4.0 and 4.0"),
]


def test_scalings_that_make_no_sense_are_refused():
    for fields, message in REFUSED:
        with pytest.raises(ValueError, match=message):
            RopeScaling(**fields)
