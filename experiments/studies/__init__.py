"""Studies for `python -m experiments.ablate`: one short file each, with a `STUDY`."""
