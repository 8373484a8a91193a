"""Commands, configs, tasks and studies built on top of `rspo_jax` and `models`."""
