"""Scripts that start a run on Cloud TPUs, GKE and SLURM, and start it again until it is done."""
