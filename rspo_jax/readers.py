"""Several router readers as one. It must never know what they read."""

from typing import Any

import jax

from rspo_jax.types import Array, RouterReader


def join_readers(*readers: RouterReader) -> RouterReader:
    """One reader that reads what all of them do; its carry and its reading are tuples in their order."""
    reads = tuple(reader.read for reader in readers)
    return RouterReader(jax.tree_util.Partial(_read_all, reads), tuple(reader.carry for reader in readers))


def _read_all(
    reads: tuple[Any, ...], carries: tuple[Any, ...], router_logits: Array, expert_ids: Array
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    results = [read(carry, router_logits, expert_ids) for read, carry in zip(reads, carries, strict=True)]
    return tuple(carry for carry, _ in results), tuple(reading for _, reading in results)
