"""Parameters from a run's folder, for evaluation, export and runs that start from another."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

from rspo_jax.hosts import say
from rspo_jax.records.checkpoint import Checkpoints
from rspo_jax.records.files import FilePath, as_path
from rspo_jax.training.config import TrainerConfig
from rspo_jax.training.state import fresh_state, state_on_mesh
from rspo_jax.types import Array, Params, Policy


class RestoredParams(NamedTuple):
    """Parameters from a run's folder."""

    params: Params
    step: int
    """Steps of reinforcement learning that they have seen."""
    index: int
    """Index of the checkpoint."""


def restore_params(
    policy: Policy,
    init_params: Callable[[Array], Params],
    config: TrainerConfig,
    run_dir: FilePath,
    with_reference: bool = False,
) -> RestoredParams:
    """Read the parameters of the newest sound checkpoint of a run straight to their place on the mesh in use.

    Args:
      policy: the model.
      init_params: makes its parameters from a PRNG key; only their shapes are used.
      config: the trainer's settings of that run.
      run_dir: folder or address of the run.
      with_reference: True if the run keeps the parameters of a reference (`RegularizerConfig.needs_reference`).

    Raises:
      ValueError: if there is no checkpoint, or it does not fit the model or the mesh.
      CheckpointError: if all checkpoints are damaged.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        template = jax.eval_shape(functools.partial(fresh_state, init_params, config, with_reference))
    else:
        template = state_on_mesh(policy, init_params, config, mesh, with_reference)
    with Checkpoints(as_path(run_dir) / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
        restored = checkpoints.restore_newest(template, say=say)
    if restored is None:
        raise ValueError(f"{run_dir} has no checkpoint yet")
    return RestoredParams(restored.state.train.params, int(restored.state.step), restored.index)
