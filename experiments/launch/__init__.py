"""Scripts that start a run on Cloud TPUs, GKE and SLURM, and restart it until it is done."""
