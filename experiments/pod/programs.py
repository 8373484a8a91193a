"""The four programs of a step on a pod that need not exist: score, update, prefill and decode, on arrays without data.

They are the library's own functions, on the shapes and shardings that a training run gives them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

import models
from rspo_jax import OBJECTIVES
from rspo_jax.routing import ROUTE_AXES
from rspo_jax.sharding import RULES, MeshConfig, shardings_of
from rspo_jax.training import (
    LearnerConfig,
    OptimizerConfig,
    TrainState,
    init_train_state,
    score,
    train_state_shardings,
    update,
)
from rspo_jax.types import Array, PackedBatch, PackedRows, Params, RouterTrace, ScoredBatch

ProgramName = Literal["score", "update", "prefill", "decode"]
PROGRAMS: tuple[ProgramName, ...] = get_args(ProgramName)
SCORE, UPDATE, PREFILL, DECODE = PROGRAMS
OPTIMIZER = OptimizerConfig(learning_rate=1e-6)
"""AdamW with GMPO's rate, so small that the routing, and with it the work, does not change while updates are timed."""


@dataclass(frozen=True)
class Setting:
    """A model, its batch and its mesh."""

    model: models.TransformerConfig
    mesh: MeshConfig
    batch: int
    """Number of responses, each of which fills a row."""
    row_length: int
    """Tokens of a row, prompt and response together."""
    prompt_length: int
    micro_batches: int = 1

    def check_batch(self, mesh: Mapping[str, int]) -> None:
        """Refuse a mesh that does not divide the batch.

        Raises:
          ValueError: naming the sizes and the way out.
        """
        rows, ways = self.part, math.prod(mesh[axis] for axis in RULES["rows"])
        if rows % ways:
            raise ValueError(
                f"{rows} rows of a micro-batch cannot be split into {ways} equal parts (data x fsdp x expert): change "
                "batch, micro_batches or the mesh"
            )
        token_ways = math.prod(mesh[axis] for axis in RULES["tokens"])
        if self.row_length % token_ways:
            raise ValueError(
                f"{self.row_length} tokens of a row cannot be split into {token_ways} equal parts (context)"
            )

    @property
    def policy(self) -> models.Transformer:
        return models.Transformer(self.model)

    @property
    def part(self) -> int:
        """Rows of a micro-batch."""
        return self.batch // self.micro_batches


def uses_route(objective: str) -> bool:
    """Return whether an objective's update takes the old route, which scoring then keeps."""
    return OBJECTIVES[objective].uses_router_shift()


def different_objectives(program: ProgramName, objectives: Sequence[str]) -> list[str]:
    """Return the objectives whose programs differ.

    All differ in the update. Scoring differs only by whether it keeps the route, so that the first objective with one
    and the first without stand for all. Prefill and decode have no objective, so that the first stands for all.
    """
    if program == UPDATE:
        return list(objectives)
    first_by_route: dict[bool, str] = {}
    for objective in objectives:
        first_by_route.setdefault(uses_route(objective), objective)
    return list(first_by_route.values())[: None if program == SCORE else 1]


def lower(program: ProgramName, setting: Setting, objective: str, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """Lower one of `PROGRAMS` for a mesh of devices that need not exist.

    Raises:
      ValueError: if the mesh does not divide an array, naming it.
    """
    return _LOWER[program](setting, objective, mesh)


def check_mesh(setting: Setting, mesh: jax.sharding.Mesh) -> None:
    """Refuse a mesh that does not divide the batch or the model, before anything is compiled.

    Raises:
      ValueError: naming the array that it does not divide.
    """
    setting.check_batch(dict(mesh.shape))
    state_shapes(setting, mesh)
    sampling_shapes(setting, mesh)
    batch_shapes(setting, mesh)


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def state_shapes(setting: Setting, mesh: jax.sharding.Mesh) -> TrainState:
    """Return a training state without data, each array with its sharding."""
    state = jax.eval_shape(lambda: init_train_state(models.init_params(setting.model, jax.random.key(0)), OPTIMIZER))
    rules = setting.mesh.parameter_rules
    return _with_shardings(state, train_state_shardings(setting.policy, OPTIMIZER, state, mesh, rules))


def sampling_shapes(setting: Setting, mesh: jax.sharding.Mesh) -> Params:
    """Return the sampler's parameters without data: in the dtypes that it reads, gathered once for all tokens."""
    policy = setting.policy
    params = jax.eval_shape(lambda: policy.cast_params(models.init_params(setting.model, jax.random.key(0))))
    rules = setting.mesh.sampling_rules
    return _with_shardings(params, shardings_of(mesh, params, policy.param_axes(), rules))


def batch_shapes(setting: Setting, mesh: jax.sharding.Mesh) -> ScoredBatch:
    """Return the parts of a mini-batch without data, every row full, sharded as packing and scoring leave them."""
    parts, rows, tokens = setting.micro_batches, setting.part, setting.row_length
    responses = tokens - setting.prompt_length + 1  # the last token is only ever a target
    c = setting.model

    def array(dtype: Any, axes: tuple[str | None, ...], *sizes: int) -> Any:
        shape = jax.ShapeDtypeStruct((parts, rows, *sizes), dtype)
        return _with_shardings(shape, shardings_of(mesh, shape, (None, *axes)))

    by_token, by_response = ("rows", "tokens"), ("rows", None)
    expert_ids = jnp.uint8 if c.num_experts <= 256 else jnp.uint16
    slots = (c.num_sparse_layers, c.num_experts_per_token, tokens)
    batch = PackedBatch(
        rows=PackedRows(*(array(jnp.int32, by_token, tokens) for _ in PackedRows._fields)),
        places=array(jnp.int32, (None, None), responses),
        mask=array(jnp.bool_, by_response, responses),
        sampler_log_probs=array(jnp.float32, by_response, responses),
        advantages=array(jnp.float32, ("rows",)),
    )
    route = RouterTrace(array(expert_ids, ROUTE_AXES, *slots), array(jnp.uint16, ROUTE_AXES, *slots))
    return ScoredBatch(batch, array(jnp.float32, by_response, responses), route)


def _lower_score(setting: Setting, objective: str, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    policy, learner, keeps_route = setting.policy, LearnerConfig(objective=objective), uses_route(objective)

    def run_score(params: Params, batch: PackedBatch) -> Any:
        scored, statistics = score(policy, params, batch, learner)
        return scored.old_log_probs, scored.old_route if keeps_route else None, statistics

    arguments = state_shapes(setting, mesh).params, batch_shapes(setting, mesh).batch
    with jax.set_mesh(mesh):
        return jax.jit(run_score).lower(*arguments)


def _lower_update(setting: Setting, objective: str, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    batch = batch_shapes(setting, mesh)
    batch = batch if uses_route(objective) else batch._replace(old_route=None)
    learner = LearnerConfig(objective=objective, micro_batches=setting.micro_batches)
    state = state_shapes(setting, mesh)
    with jax.set_mesh(mesh):
        return update.lower(setting.policy, OPTIMIZER, state, batch, learner, setting.mesh)


def _token_rows(setting: Setting, mesh: jax.sharding.Mesh, tokens: int) -> jax.ShapeDtypeStruct:
    shape = jax.ShapeDtypeStruct((setting.batch, tokens), jnp.int32)
    return _with_shardings(shape, shardings_of(mesh, shape, ("rows", None)))


def _lower_prefill(setting: Setting, objective: str, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    del objective
    policy = setting.policy

    def run_prefill(params: Params, tokens: Array, segment_ids: Array) -> Any:
        cache = policy.init_cache(setting.batch, setting.row_length)
        output = policy.apply({"params": params}, tokens, segment_ids=segment_ids, cache=cache)
        return output.logits[:, -1], output.cache  # pyright: ignore

    params, tokens = sampling_shapes(setting, mesh), _token_rows(setting, mesh, setting.prompt_length)
    with jax.set_mesh(mesh):
        return jax.jit(run_prefill).lower(params, tokens, tokens)


def _lower_decode(setting: Setting, objective: str, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    del objective
    policy = setting.policy

    def init_cache() -> models.Cache:
        return policy.init_cache(setting.batch, setting.row_length)

    def run_decode(params: Params, cache: models.Cache, tokens: Array, segment_ids: Array) -> Any:
        output = policy.apply({"params": params}, tokens, segment_ids=segment_ids, cache=cache)
        return output.logits[:, -1], output.cache  # pyright: ignore

    params, tokens = sampling_shapes(setting, mesh), _token_rows(setting, mesh, 1)
    cache = jax.eval_shape(init_cache)
    with jax.set_mesh(mesh):
        cache = _with_shardings(cache, jax.jit(init_cache).lower().compile().output_shardings)
        return jax.jit(run_decode, donate_argnames="cache").lower(params, cache, tokens, tokens)


_LOWER: dict[ProgramName, Callable[[Setting, str, jax.sharding.Mesh], jax.stages.Lowered]] = {
    SCORE: _lower_score,
    UPDATE: _lower_update,
    PREFILL: _lower_prefill,
    DECODE: _lower_decode,
}
