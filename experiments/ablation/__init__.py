"""Parts of `python -m experiments.ablate`: declared grids of runs, their processes, their table and their results."""
