"""Fingerprints of arrays, against their formula in plain integers."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rspo_jax.records.manifest import fingerprints


def mixed(word: int) -> int:
    """Return the finalizer of MurmurHash3, written from its published constants."""
    word = (word ^ (word >> 16)) * 0x85EBCA6B % 2**32
    word = (word ^ (word >> 13)) * 0xC2B2AE35 % 2**32
    return word ^ (word >> 16)


def fingerprint_oracle(array: np.ndarray) -> int:
    size = min(array.dtype.itemsize, 4)
    words = np.frombuffer(array.tobytes(), f"<u{size}").tolist()
    return sum(mixed(word ^ mixed(position)) for position, word in enumerate(words)) % 2**32


DTYPES = [bool, "uint8", "int8", "uint16", "bfloat16", "float16", "int32", "uint32", "float32", "float8_e4m3fn"]


def random_array(dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return random bits of any kind, NaNs included."""
    dtype = jnp.dtype(dtype)
    content = np.random.default_rng(0).bytes(math.prod(shape) * dtype.itemsize)
    if dtype == np.bool_:
        return np.frombuffer(content, np.uint8).reshape(shape) > 127
    return np.frombuffer(content, dtype).reshape(shape)


@pytest.mark.parametrize("shape", [(), (0,), (1, 1), (3, 5, 7)], ids=str)
def test_fingerprints_are_those_of_the_formula(shape: tuple[int, ...]) -> None:
    arrays = [random_array(dtype, shape) for dtype in DTYPES]
    found = fingerprints([jnp.asarray(array) for array in arrays])
    assert (found.dtype, found.shape) == (jnp.uint32, (len(DTYPES),))
    assert found.tolist() == [fingerprint_oracle(array) for array in arrays]


def test_fingerprints_of_64_bits() -> None:
    arrays = [random_array(dtype, (3, 5)) for dtype in ("float64", "int64", "uint64")]
    with jax.enable_x64(True):
        found = fingerprints([jnp.asarray(array) for array in arrays])
        assert found.dtype == jnp.uint32
    assert found.tolist() == [fingerprint_oracle(array) for array in arrays]


def test_every_bit_and_the_order_count() -> None:
    array = np.array([[0.0, -0.0, 1.5], [-1.5, 1.5, np.nan]], np.float32)
    variants = [
        array,
        *(array.reshape(-1)[list(order)].reshape(2, 3) for order in ((1, 0, 2, 3, 4, 5), (0, 1, 3, 2, 4, 5))),
    ]
    for element, bit in itertools.product(range(array.size), range(32)):
        words = array.copy().view(np.uint32).reshape(-1)
        words[element] ^= np.uint32(1 << bit)
        variants.append(words.view(np.float32).reshape(2, 3))
    found = jax.lax.map(lambda variant: fingerprints([variant]), jnp.asarray(np.stack(variants)))  # compiled once
    assert len(set(found.reshape(-1).tolist())) == len(variants)
