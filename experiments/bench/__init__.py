"""Benchmarks: everything that times programs, and what they are compared with."""
