"""Candidates of the level "step": score a rollout and update on it, with a whole model, on one packed batch.

An objective that uses γ is given the old route, and its scoring pass keeps one; the others have no route at all, as in
a trainer without RSPO.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import models
from experiments.bench.loss_programs import METRICS, Candidate, Shape, no_call
from experiments.compilers import tpu
from experiments.compilers.costs import read_costs
from experiments.pod.presets import MODELS
from experiments.pod.programs import OPTIMIZER, SCORE, UPDATE, different_objectives, uses_route
from models.config import Remat
from rspo_jax.rollouts import Packing, pack
from rspo_jax.training import LearnerConfig, TrainState, init_train_state, score, update
from rspo_jax.types import Array, PackedBatch, Params, RolloutBatch, RouterTrace, ScoredBatch

StepDirection = Literal["update", "score"]
CONTROL = "again, as a control"
ROUTE_BYTES_A_SLOT = 3  # as meant by the library: one byte for an id, two for a log-probability


@dataclass(frozen=True)
class StepSettings:
    """The level "step": a model and its batch."""

    model: Literal["small", "qwen3-30b-a3b"] = "small"
    """Level "step": source of the sizes that are not given. The larger one is for --platform tpu."""
    rows: int = 32
    """Level "step": rows of the batch. Each holds two sequences, a quarter of them prompt."""
    row_length: int = 256
    """Level "step": tokens of a row."""
    layers: tuple[int, ...] = ()
    """Level "step": depths of the model, one case each; the model's own when absent."""
    hidden_size: int | None = None
    """Level "step": width of the model."""
    experts: int | None = None
    """Level "step": experts of a layer."""
    experts_per_token: int | None = None
    """Level "step": experts that a token activates."""
    expert_size: int | None = None
    """Level "step": hidden width of one expert."""
    vocab_size: int | None = None
    """Level "step": entries of the vocabulary."""
    remat: Remat | None = None
    """Level "step": activations that the backward pass computes again."""

    def configs(self) -> list[models.TransformerConfig]:
        """Return a model of each depth.

        Raises:
          ValueError: if the sizes make no model or no batch.
        """
        for name, least in (("rows", 1), ("row_length", 8)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        given = {
            "hidden_size": self.hidden_size,
            "num_experts": self.experts,
            "num_experts_per_token": self.experts_per_token,
            "expert_size": self.expert_size,
            "vocab_size": self.vocab_size,
            "remat": self.remat,
        }
        config = replace(MODELS[self.model], **{name: value for name, value in given.items() if value is not None})
        return [replace(config, num_layers=depth) for depth in self.layers or (config.num_layers,)]


def make_batch(settings: StepSettings, vocab_size: int, seed: int) -> PackedBatch:
    """Return one part of random tokens: two sequences of equal length a row, packed as the trainer packs them."""
    rng = np.random.default_rng(seed)
    responses, prompt_width = 2 * settings.rows, max(1, settings.row_length // 8)
    response_width = settings.row_length // 2 - prompt_width + 1  # the last token is only ever a target
    width = prompt_width + response_width
    mask = np.broadcast_to(np.arange(1, width) >= prompt_width, (responses, width - 1))
    rollout = RolloutBatch(
        tokens=jnp.asarray(rng.integers(0, vocab_size, (responses, width)), jnp.int32),
        segment_ids=jnp.ones((responses, width), jnp.int32),
        mask=jnp.asarray(mask),
        sampler_log_probs=jnp.asarray(np.where(mask, -np.log(vocab_size), 0), jnp.float32),
        advantages=jnp.asarray(rng.normal(size=responses), jnp.float32),
    )
    packing = Packing(row_length=settings.row_length)
    return pack(rollout, response_width, np.arange(responses), packing)[0]


class Inputs(NamedTuple):
    """Arguments of a case's candidates, with data or without."""

    config: models.TransformerConfig
    state: Any  # TrainState
    scored: Any  # ScoredBatch, with the route

    def batch_for(self, objective: str) -> ScoredBatch:
        """Return the scored batch, without the route if the objective has no use for it."""
        return self.scored if uses_route(objective) else self.scored._replace(old_route=None)


def shape_of(inputs: Inputs) -> Shape:
    """Return the sizes of a case in the letters of the other levels; B counts the rows that the packing made."""
    _, rows, tokens = inputs.scored.batch.rows.inputs.shape
    c = inputs.config
    return Shape(rows, tokens, c.num_layers, c.num_experts_per_token, c.num_experts)


def make_inputs(config: models.TransformerConfig, settings: StepSettings, seed: int) -> Inputs:
    """Return a scored batch, and parameters that have moved a little since, so that γ is below 1."""
    batch = make_batch(settings, config.vocab_size, seed)
    old_params = models.init_params(config, jax.random.key(seed))
    scored, _ = score(models.Transformer(config), old_params, batch, LearnerConfig())
    return Inputs(config, init_train_state(_perturb(old_params, seed + 1), OPTIMIZER), scored)


@jax.jit
def _perturb(params: Params, seed: int | Array) -> Params:
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    small = [jnp.asarray(0.05, leaf.dtype) for leaf in leaves]
    moved = [
        leaf + leaf * size * jax.random.normal(key, leaf.shape, leaf.dtype)
        for leaf, size, key in zip(leaves, small, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)


def abstract_inputs(config: models.TransformerConfig, settings: StepSettings, mesh: jax.sharding.Mesh) -> Inputs:
    """Return the inputs without data; the mesh axis "data" splits the rows and every parameter's largest axis."""
    batch = make_batch(settings, config.vocab_size, 0)  # only its shapes count, and those depend on the packing
    policy = models.Transformer(config)
    params = jax.eval_shape(lambda: models.init_params(config, jax.random.key(0)))
    state = jax.eval_shape(lambda params: init_train_state(params, OPTIMIZER), params)
    scored, _ = jax.eval_shape(lambda params, batch: score(policy, params, batch, LearnerConfig()), params, batch)

    def split(leaf: Any, axis: int) -> jax.ShapeDtypeStruct:
        return tpu.shape_on(mesh, leaf.shape, leaf.dtype, *(None,) * axis, "data")

    def split_largest(leaf: Any) -> jax.ShapeDtypeStruct:
        fitting = [i for i, size in enumerate(leaf.shape) if size % mesh.size == 0]
        if leaf.ndim < 2 or not fitting:  # vectors, and arrays that the mesh does not divide, stay whole
            return tpu.shape_on(mesh, leaf.shape, leaf.dtype)
        return split(leaf, max(fitting, key=lambda i: leaf.shape[i]))

    by_row = functools.partial(split, axis=1)  # the first axis counts the parts
    return Inputs(config, jax.tree.map(split_largest, state), jax.tree.map(by_row, scored))


def step_function(direction: StepDirection, objective: str, config: models.TransformerConfig) -> Callable[..., Any]:
    """Return `update` or `score` as a function of arrays."""
    policy, learner = models.Transformer(config), LearnerConfig(objective=objective)

    def run_update(state: TrainState, batch: ScoredBatch) -> Any:
        return update(policy, OPTIMIZER, state, batch, learner)

    def run_score(params: Params, batch: PackedBatch) -> Any:
        scored, statistics = score(policy, params, batch, learner)
        keeps_route = uses_route(objective)  # XLA drops values that are not returned
        return scored.old_log_probs, scored.old_route if keeps_route else None, statistics

    return run_update if direction == UPDATE else run_score


def timed_candidates(direction: StepDirection, objectives: tuple[str, ...], inputs: Inputs) -> list[Candidate]:
    """Compile candidates that can run again and again.

    The last one is the first once more, as a control: a difference within the spread of its ratio to itself means
    nothing.
    """
    names = different_objectives(direction, objectives)
    made = [_timed_candidate(direction, name, inputs) for name in names]
    first, call_first_again = made[0]
    return [candidate for candidate, _ in made] + [replace(first, returns=CONTROL, call=call_first_again())]


def _timed_candidate(
    direction: StepDirection, objective: str, inputs: Inputs
) -> tuple[Candidate, Callable[[], Callable[[], Any]]]:
    """Return a candidate, and a function that makes another call of its program."""
    function, batch = step_function(direction, objective, inputs.config), inputs.batch_for(objective)
    arguments: tuple[Any, Any] = (inputs.state, batch) if direction == UPDATE else (inputs.state.params, batch.batch)
    donated = ("state",) if direction == UPDATE else ()
    started = time.perf_counter()
    compiled = jax.jit(function, donate_argnames=donated).lower(*arguments).compile()
    seconds = time.perf_counter() - started

    def new_call() -> Callable[[], Any]:
        return follow_updates(compiled, *arguments) if direction == UPDATE else functools.partial(compiled, *arguments)

    call = new_call()

    def result() -> tuple[np.ndarray, None]:
        return np.asarray(call()[-1]["loss" if direction == UPDATE else "entropy"].reduce()), None

    shift = uses_route(objective)
    candidate = Candidate("rspo_jax", objective, shift, METRICS, call, seconds, read_costs(compiled), result)
    return candidate, new_call


def follow_updates(compiled: Callable[..., Any], state: TrainState, batch: ScoredBatch) -> Callable[[], Any]:
    """Return a call that makes the next update, from a copy of the state on: each donates the state it is given."""
    state = jax.tree.map(jnp.copy, state)

    def call() -> tuple[TrainState, Any]:
        nonlocal state
        state, statistics = compiled(state, batch)
        return state, statistics

    return call


def compile_candidate(direction: StepDirection, objective: str, inputs: Inputs, mesh: jax.sharding.Mesh) -> Candidate:
    """Compile one candidate for devices that need not exist."""
    function, batch = step_function(direction, objective, inputs.config), inputs.batch_for(objective)
    started = time.perf_counter()
    with jax.set_mesh(mesh):  # the kernels look up there how the rows are split
        if direction == SCORE:
            compiled = tpu.compile_for(function, inputs.state.params, batch.batch)
        else:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, inputs.state)
            compiled = tpu.compile_for(
                function, inputs.state, batch, donate_argnames=("state",), out_shardings=(shardings, None)
            )
    seconds, shift = time.perf_counter() - started, uses_route(objective)
    return Candidate("rspo_jax", objective, shift, METRICS, no_call, seconds, read_costs(compiled), no_call)


def route_report(inputs: Inputs, shape: Shape, devices: int) -> dict[str, Any]:
    """Return the bytes of the route: as meant, and as the compiler lays them out for a program of nothing else."""
    route: RouterTrace = inputs.scored.old_route
    program = jax.jit(lambda route: jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), route))
    slots_a_token, places = shape.layers * shape.experts_per_token, shape.batch * shape.tokens
    return {
        "bytes_a_token": ROUTE_BYTES_A_SLOT * slots_a_token,
        "places": places,
        "devices": devices,
        "meant_bytes": ROUTE_BYTES_A_SLOT * slots_a_token * places // devices,
        "compiled_bytes": read_costs(program.lower(route).compile()).argument_bytes,
    }
