"""Parts of the benchmark commands: timing, rooflines, the TPU compiler, and other libraries' losses."""
