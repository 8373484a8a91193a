"""The state of a run, where on the mesh it lies, and how it begins: all that a later process needs to go on exactly.

This file must never know what happens in a step.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rspo_jax.rollouts import ResponseLengths
from rspo_jax.sharding import RULES, Rules, shardings_of
from rspo_jax.training.config import OptimizerConfig, TrainerConfig
from rspo_jax.types import Array, Params, Policy


class TrainState(NamedTuple):
    """What an update changes."""

    params: Params
    opt_state: optax.OptState
    updates: Array
    """int32 scalar: updates made."""
    skipped: Array
    """int32 scalar: updates skipped because something was not finite."""


def init_train_state(params: Params, optimizer: OptimizerConfig) -> TrainState:
    """A state before its first update."""
    return TrainState(params, optimizer.build().init(params), jnp.int32(0), jnp.int32(0))


def train_state_shardings(
    policy: Policy, optimizer: OptimizerConfig, state: TrainState, mesh: Mesh, rules: Rules = RULES
) -> Any:
    """Where everything of a state lies: parameters by the table, the optimizer's copies of them beside them.

    Args:
      policy: knows the logical axes of its parameters.
      optimizer: that of the state.
      state: of arrays or `jax.ShapeDtypeStruct`s.
      mesh: from `rspo_jax.sharding.make_mesh`.
      rules: the table.

    Returns:
      A `TrainState` of `jax.sharding.NamedSharding`s.

    Raises:
      ValueError: if the mesh does not divide a parameter, or splits two axes of one, with its name.
    """
    params = shardings_of(mesh, state.params, policy.param_axes(), rules)
    whole = NamedSharding(mesh, PartitionSpec())
    opt_state = optax.tree.map_params(
        optimizer.build(), lambda _, sharding: sharding, state.opt_state, params, transform_non_params=lambda _: whole
    )
    return TrainState(params, opt_state, whole, whole)  # pyright: ignore[reportArgumentType]


class RunState(NamedTuple):
    """All that a run needs to go on exactly; a checkpoint holds nothing else but its metadata."""

    train: TrainState
    key: Array
    """PRNG key data; split once a step."""
    cursor: Array
    """int32 scalar: problems taken from the stream of the present phase."""
    warm_start_step: Array
    """int32 scalar: supervised steps made."""
    step: Array
    """int32 scalar: steps of reinforcement learning made."""
    lengths: ResponseLengths
    """Of the last rollout: they decide how the next is drawn."""
    shift_log_scale: Array
    """float32 scalar, of an adaptive router shift (`rspo_jax.routing.adaptive`); 0 elsewhere."""
    reference: Params | None = None
    """Parameters that reinforcement learning began with, where a KL penalty holds on to them."""


def fresh_state(
    init_params: Callable[[Array], Params], config: TrainerConfig, with_reference: bool = False
) -> RunState:
    """The state before the first step; `with_reference` it keeps a copy of the parameters."""
    key, params_key = jax.random.split(jax.random.key(config.seed))
    zero = jnp.int32(0)
    params = init_params(params_key)
    reference = copy_params(params) if with_reference else None
    train_state = init_train_state(params, config.first_optimizer)
    no_lengths = ResponseLengths(jnp.float32(0), jnp.float32(0))
    return RunState(train_state, jax.random.key_data(key), zero, zero, zero, no_lengths, jnp.float32(0), reference)


def copy_params(params: Params) -> Params:
    """Parameters in memory of their own: an update takes that of those it changes."""
    return jax.tree.map(jnp.copy, params)


def first_state(
    init_params: Callable[[Array], Params], params: Params | None, config: TrainerConfig, template: RunState
) -> RunState:
    """The state before the first step, where the template of `state_on_mesh` has it.

    Args:
      init_params: makes fresh parameters, if there are none.
      params: those to begin with, which are donated.
      config: of the run.
      template: shapes and shardings.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, template)
    fresh = functools.partial(fresh_state, config=config, with_reference=template.reference is not None)
    if params is None:
        return jax.jit(functools.partial(fresh, init_params), out_shardings=shardings)()
    chex.assert_trees_all_equal_shapes_and_dtypes(params, template.train.params)
    begin = jax.jit(lambda params: fresh(lambda _: params), out_shardings=shardings, donate_argnums=0)
    return begin(params)


def state_on_mesh(
    policy: Policy,
    init_params: Callable[[Array], Params],
    config: TrainerConfig,
    mesh: Mesh,
    with_reference: bool = False,
) -> RunState:
    """The shapes of a run's state, each with its sharding: parameters and optimizer by the table, the rest whole.

    Raises:
      ValueError: if the mesh does not divide a parameter, with its name.
    """
    state = jax.eval_shape(functools.partial(fresh_state, init_params, config, with_reference))
    whole = NamedSharding(mesh, PartitionSpec())
    train = train_state_shardings(policy, config.first_optimizer, state.train, mesh, config.mesh.parameter_rules)
    reference = train.params if with_reference else None
    shardings = jax.tree.map(lambda _: whole, state)._replace(train=train, reference=reference)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, shardings
    )


def sampling_params(policy: Policy, params: Params, config: TrainerConfig) -> Params:
    """Parameters as the sampler wants them on the mesh in use: in the dtypes that it reads, and gathered once, not
    layer by layer for every token."""
    params = policy.cast_params(params)
    rules = config.mesh.sampling_rules
    return jax.device_put(params, shardings_of(jax.sharding.get_mesh(), params, policy.param_axes(), rules))
