"""Readers of compiled programs: what XLA, the TPU compiler and NVIDIA's say of them."""
