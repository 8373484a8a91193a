"""Readers of compiled programs: the statements of XLA, the TPU compiler and NVIDIA's about them. Nothing is timed."""
