"""What TPU chips have, from public sources, and pods of them by size. This file must never know a model."""

from dataclasses import dataclass

from experiments.bench.measure import PEAKS

GIBIBYTE = 2**30
_SOURCE = "published HBM a chip, docs.cloud.google.com/tpu/docs"


@dataclass(frozen=True)
class Chip:
    """A generation of TPUs, by JAX device."""

    device_kind: str
    """As in `experiments.bench.measure.PEAKS`."""
    hbm_bytes: int
    """Of one JAX device. The runtime keeps a little for itself, so that the compiler allows less (or, on v5p, more, as
    the published number is rounded down)."""
    devices: int = 1
    """JAX devices of a chip."""
    pods: tuple[str, ...] = ()
    """Topologies of 16, 32, 64, … chips."""
    source: str = _SOURCE

    @property
    def flops_per_second(self) -> float:
        """Dense bfloat16 products, of one JAX device."""
        return PEAKS[self.device_kind].flops_per_second


_CUBES = ("2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_SQUARES = ("4x4", "4x8", "8x8", "8x16", "16x16")
CHIPS = {
    "v4": Chip("TPU v4", 32 * GIBIBYTE, pods=_CUBES),
    "v5e": Chip("TPU v5e", 16 * GIBIBYTE, pods=_SQUARES),
    "v5p": Chip("TPU v5p", 95 * GIBIBYTE, pods=_CUBES),
    "v6e": Chip("TPU v6e", 32 * GIBIBYTE, pods=_SQUARES),
    "tpu7x": Chip("TPU7x", 96 * GIBIBYTE, devices=2, pods=_CUBES, source=_SOURCE + "; 192 a chip, for two devices"),
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as "v5p:4x4x4".

    Raises:
      ValueError: if the generation is not in the table.
    """
    generation = topology.partition(":")[0]
    if generation not in CHIPS:
        raise ValueError(f"unknown TPU generation {generation!r} in {topology!r}; choose one of {', '.join(CHIPS)}")
    return CHIPS[generation]


def pods_of(generation: str, fewest: int = 16, most: int = 512) -> list[str]:
    """Topologies with `fewest` to `most` chips, each twice as large as the one before.

    Raises:
      ValueError: if the generation is not in the table.
    """
    pods = [f"{generation}:{pod}" for pod in chip_of(generation).pods]
    return [pod for number, pod in enumerate(pods) if fewest <= 16 << number <= most]
