"""The state of a run, its place on the mesh, and its beginning: all that a later process needs to go on bit for bit."""

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
    """The arrays that an update changes."""

    params: Params
    opt_state: optax.OptState
    updates: Array
    """int32 scalar: updates made."""
    skipped: Array
    """int32 scalar: updates skipped because their loss or gradient was not finite."""


class RunState(NamedTuple):
    """The whole state of a run; a checkpoint holds nothing else but its metadata."""

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
    """Response lengths of the last rollout, which decide whether the next one refills its slots."""
    shift_log_scale: Array
    """float32 scalar: log scale of an adaptive router shift (`rspo_jax.routing.adaptive`); 0 without one."""
    reference: Params | None = None
    """The parameters that reinforcement learning began with, if a KL penalty needs them."""


def init_train_state(params: Params, optimizer: OptimizerConfig) -> TrainState:
    """Return the state before the first update.

    Raises:
      ValueError: if a parameter is of a dtype that small updates would be lost in.
    """
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(params)} - {"float32", "float64", "bfloat16"}
    if dtypes:
        raise ValueError(
            f"parameters are trained in float32 or bfloat16, not in {', '.join(sorted(dtypes))}: cast them"
        )
    return TrainState(params, optimizer.build().init(params), jnp.int32(0), jnp.int32(0))


def fresh_state(
    init_params: Callable[[Array], Params], config: TrainerConfig, with_reference: bool = False
) -> RunState:
    """Return the state before the first step; `with_reference` adds a copy of the parameters."""
    key, params_key = jax.random.split(jax.random.key(config.seed))
    zero = jnp.int32(0)
    params = init_params(params_key)
    reference = copy_params(params) if with_reference else None
    train_state = init_train_state(params, config.first_optimizer)
    no_lengths = ResponseLengths(jnp.float32(0), jnp.float32(0))
    return RunState(train_state, jax.random.key_data(key), zero, zero, zero, no_lengths, jnp.float32(0), reference)


def copy_params(params: Params) -> Params:
    """Copy parameters into memory of their own, because an update donates the memory of those it changes."""
    return jax.tree.map(jnp.copy, params)


def first_state(
    init_params: Callable[[Array], Params], params: Params | None, config: TrainerConfig, template: RunState
) -> RunState:
    """Return the state before the first step, placed on the mesh as the template says.

    Args:
      init_params: makes fresh parameters, used if `params` is None.
      params: parameters to begin with, which are donated.
      config: the trainer's configuration.
      template: shapes and shardings from `state_on_mesh`.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, template)
    with_reference = template.reference is not None
    if params is None:
        fresh = jax.jit(fresh_state, static_argnums=(0, 1, 2), out_shardings=shardings)
        return fresh(init_params, config, with_reference)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, template.train.params)
    begin = jax.jit(_state_from, static_argnums=(1, 2), out_shardings=shardings, donate_argnums=0)
    return begin(params, config, with_reference)


def _state_from(params: Params, config: TrainerConfig, with_reference: bool) -> RunState:
    return fresh_state(lambda _: params, config, with_reference)


def state_on_mesh(
    policy: Policy,
    init_params: Callable[[Array], Params],
    config: TrainerConfig,
    mesh: Mesh,
    with_reference: bool = False,
) -> RunState:
    """Return the shapes of a run's state with their shardings: parameters and optimizer by the table, the rest whole.

    Raises:
      ValueError: naming the parameter that the mesh does not divide.
    """
    # By the same function as `first_state`, which then finds it traced.
    state = jax.jit(fresh_state, static_argnums=(0, 1, 2)).eval_shape(init_params, config, with_reference)
    whole = NamedSharding(mesh, PartitionSpec())
    train = train_state_shardings(policy, config.first_optimizer, state.train, mesh, config.mesh.parameter_rules)
    reference = train.params if with_reference else None
    shardings = jax.tree.map(lambda _: whole, state)._replace(train=train, reference=reference)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, shardings
    )


def train_state_shardings(
    policy: Policy, optimizer: OptimizerConfig, state: TrainState, mesh: Mesh, rules: Rules = RULES
) -> Any:
    """Return the sharding of every array: parameters by the table, the optimizer's moments beside their parameters.

    Args:
      policy: knows the logical axes of its parameters.
      optimizer: the configuration that the state was made with.
      state: of arrays or `jax.ShapeDtypeStruct`s.
      mesh: from `rspo_jax.sharding.make_mesh`.
      rules: logical axis -> mesh axes.

    Returns:
      A `TrainState` of `jax.sharding.NamedSharding`s.

    Raises:
      ValueError: naming the parameter that the mesh does not divide, or of which it would split two axes by one.
    """
    params = shardings_of(mesh, state.params, policy.param_axes(), rules)
    whole = NamedSharding(mesh, PartitionSpec())
    opt_state = optax.tree.map_params(
        optimizer.build(), lambda _, sharding: sharding, state.opt_state, params, transform_non_params=lambda _: whole
    )
    return TrainState(params, opt_state, whole, whole)  # pyright: ignore[reportArgumentType]


def sampling_params(policy: Policy, params: Params, config: TrainerConfig) -> Params:
    """Return the parameters as the sampler reads them: cast, and gathered once on the mesh in use.

    Left where training has them, they would be gathered layer by layer for every token.
    """
    params = policy.cast_params(params)
    rules = config.mesh.sampling_rules
    return jax.device_put(params, shardings_of(jax.sharding.get_mesh(), params, policy.param_axes(), rules))
