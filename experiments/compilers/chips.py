"""Accelerators that programs are compiled for or timed on: peak rates and memory of one JAX device, as published."""

from dataclasses import dataclass

GIBIBYTE, MEBIBYTE = 2**30, 2**20


@dataclass(frozen=True)
class Chip:
    """An accelerator, as one JAX device."""

    device_kinds: tuple[str, ...]
    """Values of `jax.Device.device_kind`; the first one is the compiler's."""
    flops_per_second: float
    """Peak rate of dense bfloat16 matrix products."""
    bytes_per_second: float
    """Peak bandwidth of the HBM."""
    hbm_bytes: int
    """Size of the HBM. The runtime of a TPU keeps a little for itself, so that the compiler allows less (or more on
    v5p, whose published size is rounded down)."""
    source: str
    """Origin of the two rates."""
    devices: int = 1
    """Number of JAX devices on the chip; all other fields are those of one."""


_GOOGLE = "published: dense bfloat16 matrix products and HBM, docs.cloud.google.com/tpu/docs"
_NVIDIA = "published: dense bfloat16 matrix products, SXM, nvidia.com data sheet; HBM as in XLA's target_config/specs"

TPUS = {
    "v4": Chip(("TPU v4",), 275e12, 1228e9, 32 * GIBIBYTE, _GOOGLE),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 819e9, 16 * GIBIBYTE, _GOOGLE),
    "v5p": Chip(("TPU v5", "TPU v5p"), 459e12, 2765e9, 95 * GIBIBYTE, _GOOGLE),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 1638e9, 32 * GIBIBYTE, _GOOGLE),
    "tpu7x": Chip(
        ("TPU7x",),
        2307e12 / 2,
        7380e9 / 2,
        192 * GIBIBYTE // 2,
        _GOOGLE + ", half a chip, as JAX sees two devices in one",
        devices=2,
    ),
}
"""Generation, as in the names of topologies -> chip."""

GPUS = {
    "a100": Chip(("NVIDIA A100-SXM4-80GB",), 312e12, 2_039e9, 84_987_740_160, _NVIDIA),
    "h100": Chip(("NVIDIA H100 80GB HBM3",), 989.4e12, 3_352.32e9, 84_942_979_072, _NVIDIA),
    "h200": Chip(("NVIDIA H200",), 989.4e12, 4_800e9, 151_397_597_184, _NVIDIA),
}


def find_chip(device_kind: str) -> Chip | None:
    """Return the chip that JAX calls `device_kind`, or None if the tables do not have it."""
    chips = (*TPUS.values(), *GPUS.values())
    return next((chip for chip in chips if device_kind in chip.device_kinds), None)
