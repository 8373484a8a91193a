"""Comparison of our models with outputs of transformers: padded, packed, and through a cache. Torch is not needed."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import models
from support import hf_cases

TOLERANCE = 1e-4
QUICKLY = {"xla_backend_optimization_level": 0}
"""XLA's options for programs that run once."""


def compare(
    config: models.TransformerConfig,
    params: dict[str, Any],
    expected: list[tuple[np.ndarray, np.ndarray | None]],
    at_once: int = 1,
) -> None:
    """Run a model on the sequences of `hf_cases`, and check its logits and router logits.

    Args:
      config: the model's configuration.
      params: the model's parameters.
      expected: logits [T, V] and router logits [L, T, E] of each sequence.
      at_once: number of tokens that go through the cache together at first; the others follow one by one.
    """
    tokens, segments, places = layout()
    model = models.Transformer(config)

    def run(params: Any, cache: Any, tokens: np.ndarray, segments: np.ndarray) -> Any:
        return model.apply({"params": params}, tokens, None, segments, cache)

    step = jax.jit(run, compiler_options=QUICKLY)
    longest = max(hf_cases.LENGTHS)
    # NumPy from here on: each slice of a JAX array would be a program of its own.
    whole = jax.tree.map(np.asarray, step(params, None, tokens, segments))
    outputs, cache = [], model.init_cache(2, longest)
    for start, stop in itertools.pairwise([0, *range(at_once, longest + 1)]):
        part = slice(tokens.shape[1] - longest + start, tokens.shape[1] - longest + stop)
        outputs.append(step(params, cache, tokens[1:, part], segments[1:, part]))
        cache = outputs[-1].cache
    logits = np.concatenate([output.logits for output in outputs], axis=1)
    for number, (expected_logits, expected_router_logits) in enumerate(expected):
        for name, place in places[number].items():
            check(name, whole.logits[place], expected_logits)
        length = len(expected_logits)
        check("cached", logits[number, -length:], expected_logits)
        assert (whole.router_logits is None) == (expected_router_logits is None)
        if expected_router_logits is not None:
            for name, place in places[number].items():
                check(name, whole.router_logits[:, *place], expected_router_logits)
            cached = np.concatenate([output.router_logits for output in outputs], axis=2)
            check("cached", cached[:, number, -length:], expected_router_logits)


def layout() -> tuple[np.ndarray, np.ndarray, list[dict[str, tuple[int, slice]]]]:
    """Lay out the sequences packed in one row, and each in a row of its own after padding.

    Returns:
      Tokens and segment ids, int32 [3, T], and for each sequence its row and columns in both forms.
    """
    sequences = hf_cases.sequences()
    total = sum(hf_cases.LENGTHS)
    tokens = np.zeros((1 + len(sequences), total + 2), np.int32)  # the packed row ends with padding
    segments = np.zeros_like(tokens)
    places = []
    for number, sequence in enumerate(sequences):
        start = sum(hf_cases.LENGTHS[:number])
        packed = (0, slice(start, start + len(sequence)))
        padded = (1 + number, slice(total + 2 - len(sequence), total + 2))
        places.append({"packed": packed, "padded": padded})
        for place, segment in ((packed, number + 1), (padded, 1)):
            tokens[place], segments[place] = sequence, segment
    return tokens, segments, places


def check(name: str, found: Any, expected: np.ndarray) -> None:
    assert found.shape == expected.shape, name
    assert np.max(np.abs(found - expected)) <= TOLERANCE, name


def same_bits(one: Any, other: Any) -> bool:
    """Return whether two trees of arrays agree in structure, shapes, dtypes and bits."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(
        a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() and jnp.shape(a) == jnp.shape(b)
        for a, b in pairs
    )
