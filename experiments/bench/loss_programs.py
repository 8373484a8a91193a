"""Candidates of the loss benchmark: our programs at each level, Tunix's and PyTorch's, on the same arrays.

Each is ready to run and comes with the loss and gradient that it computes, so that candidates can be checked against
each other before any is timed.
"""

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.cores import cpu_threads
from experiments.bench.timing import Direction
from experiments.compilers import tpu
from experiments.compilers.costs import Costs, read_costs
from models.config import Dtype
from rspo_jax import OBJECTIVES, RouterTrace, router_shift, trace_router
from rspo_jax.types import Array

ArraysLevel = Literal["arrays", "router"]
"""Input of a candidate: γ, or the router logits and the old policy's trace that γ is computed from."""
Returns = Literal["loss", "loss + metrics"]
LOSS, METRICS = get_args(Returns)


class Shape(NamedTuple):
    """Sizes of a case: B, T, L, K and E."""

    batch: int
    tokens: int
    layers: int
    experts_per_token: int
    experts: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Read a shape such as "64x1024x48x8x128".

        Raises:
          ValueError: if the text is no such shape.
        """
        parts = text.split("x")
        if len(parts) != 5 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f"a shape is BxTxLxKxE in positive whole numbers, as 64x1024x48x8x128; got {text!r}")
        shape = cls(*map(int, parts))
        if shape.experts_per_token > shape.experts:
            raise ValueError(f"the shape {text} has more experts a token than experts (BxTxLxKxE)")
        return shape

    def __str__(self) -> str:
        return "x".join(map(str, self))


class LossArrays(NamedTuple):
    """Arguments of the candidates."""

    log_probs: Any  # [B, T]
    old_log_probs: Any  # [B, T]
    advantages: Any  # [B]
    mask: Any  # bool [B, T]
    gamma: Any = None  # [B, T], at the level "arrays"
    router_logits: Any = None  # [L, B, T, E], at the level "router"
    trace: RouterTrace | None = None  # of the old policy, at the level "router"


class OldRouter(NamedTuple):
    """The old policy's routing as PyTorch's candidates are given it, in place of our trace."""

    expert_ids: Array  # int32 [L, B, T, K]
    log_probs: Array  # float32 [L, B, T, K]


@functools.partial(jax.jit, static_argnames=("shape", "level", "dtype"))
def make_arrays(shape: Shape, level: ArraysLevel, dtype: Dtype, seed: int | Array) -> LossArrays:
    """Draw arrays in which some ratios are clipped, some γ lie below the floor, and lengths run from T/4 to T."""
    keys = jax.random.split(jax.random.key(seed), 6)
    size = (shape.batch, shape.tokens)
    log_probs = -jax.random.exponential(keys[0], size)
    # Drift is mostly small, with a few tokens beyond every clip bound.
    drift = jnp.where(jax.random.bernoulli(keys[1], 0.1, size), 0.4, 0.02) * jax.random.normal(keys[2], size)
    lengths = jax.random.randint(keys[3], (shape.batch, 1), max(1, shape.tokens // 4), shape.tokens + 1)
    arrays = LossArrays(
        log_probs.astype(dtype),
        (log_probs + drift).astype(dtype),
        jax.random.normal(keys[4], (shape.batch,)),
        jnp.arange(shape.tokens)[None, :] < lengths,
    )
    if level == "arrays":
        return arrays._replace(gamma=jnp.exp(-0.1 * jax.random.exponential(keys[5], size)).astype(dtype))
    router_logits, old_router_logits = _router_logits(shape, dtype, seed)
    return arrays._replace(router_logits=router_logits, trace=trace_router(old_router_logits, shape.experts_per_token))


def _router_logits(shape: Shape, dtype: Dtype, seed: int | Array) -> tuple[Array, Array]:
    """Draw router logits [L, B, T, E] of the current policy and of the old one."""
    current, noise = jax.random.split(jax.random.key(seed + 1))
    size = (shape.layers, shape.batch, shape.tokens, shape.experts)
    router_logits = jax.random.normal(current, size, dtype)
    return router_logits, router_logits + jnp.asarray(0.1, dtype) * jax.random.normal(noise, size, dtype)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def make_old_router(shape: Shape, dtype: Dtype, seed: int | Array) -> OldRouter:
    """Return the old router of `make_arrays`, without our trace's packing."""
    old_router_logits = _router_logits(shape, dtype, seed)[1].astype(jnp.float32)
    log_probs, expert_ids = jax.lax.top_k(jax.nn.log_softmax(old_router_logits), shape.experts_per_token)
    return OldRouter(expert_ids, log_probs)


def abstract_arrays(shape: Shape, level: ArraysLevel, dtype: Dtype, mesh: jax.sharding.Mesh) -> LossArrays:
    """Return the arrays of `make_arrays` without data, their rows sharded over the mesh axis "data"."""
    shapes: LossArrays = jax.eval_shape(functools.partial(make_arrays, shape, level, dtype, 0))

    def shard(leaf: jax.ShapeDtypeStruct, *axes: str | None) -> jax.ShapeDtypeStruct:
        return tpu.shape_on(mesh, leaf.shape, leaf.dtype, *axes)

    router_logits = shapes.router_logits and shard(shapes.router_logits, None, "data")
    rest = shapes._replace(router_logits=None)
    return jax.tree.map(lambda leaf: shard(leaf, "data"), rest)._replace(router_logits=router_logits)


@dataclass(frozen=True)
class Candidate:
    """A program to time, or one that was only compiled."""

    library: str
    objective: str
    shift: bool
    """True if the objective is given γ, or router logits and trace to compute it from."""
    returns: str
    """`LOSS` or `METRICS`, or `step_programs.CONTROL`."""
    call: Callable[[], Any]
    compile_seconds: float
    costs: Costs | None
    """None if the compiler is not XLA."""
    result: Callable[[], tuple[np.ndarray, np.ndarray | None]]
    """Returns the loss, and its gradient with respect to `log_probs` if that is computed, else None."""

    @property
    def name(self) -> str:
        return f"{self.library}: {self.objective}{' with γ' if self.shift else ''}, {self.returns}"


def no_call() -> Any:
    """Stand in for the calls of a program that was only compiled, and refuse them."""
    raise RuntimeError("this program was compiled for devices that are not there")


LossFunction = Callable[[Array, LossArrays], tuple[Array, Any]]


def our_loss(objective: str, shift: bool, returns: Returns) -> LossFunction:
    """Return `OBJECTIVES[objective].loss` as a function of `log_probs` and the other arrays."""

    def loss(log_probs: Array, arrays: LossArrays) -> tuple[Array, Any]:
        gamma = None
        if shift:
            gamma = arrays.gamma
            if arrays.trace is not None:
                gamma = router_shift(jax.lax.stop_gradient(arrays.router_logits), arrays.trace)
        value, metrics = OBJECTIVES[objective].loss(
            log_probs, arrays.old_log_probs, arrays.advantages, arrays.mask, gamma
        )
        return value, metrics if returns == METRICS else {}

    return loss


def least_loss(log_probs: Array, arrays: LossArrays) -> tuple[Array, Any]:
    """Return Σ log π · advantage over the mask: one multiplication and one sum, the floor under every jitted loss."""
    terms = log_probs.astype(jnp.float32) * arrays.advantages[:, None]
    return jnp.sum(jnp.where(arrays.mask, terms, 0)), {}


def jax_function(loss: LossFunction, direction: Direction) -> Callable[[LossArrays], Any]:
    """Return a function of the arrays that returns ((loss, metrics), gradient); forward, the gradient is None."""

    def forward(arrays: LossArrays) -> Any:
        return loss(arrays.log_probs, arrays), None

    def forward_and_backward(arrays: LossArrays) -> Any:
        return jax.value_and_grad(loss, has_aux=True)(arrays.log_probs, arrays)

    return forward if direction == "forward" else forward_and_backward


def jax_candidate(
    library: str,
    objective: str,
    shift: bool,
    returns: Returns,
    loss: LossFunction,
    direction: Direction,
    arrays: LossArrays,
) -> Candidate:
    """Compile a JAX loss; tracing and compilation are timed together."""
    started = time.perf_counter()
    compiled = jax.jit(jax_function(loss, direction)).lower(arrays).compile()
    seconds = time.perf_counter() - started

    def result() -> tuple[np.ndarray, np.ndarray | None]:
        (value, _), gradient = compiled(arrays)
        return np.asarray(value), None if gradient is None else np.asarray(gradient, np.float32)

    costs = read_costs(compiled)
    return Candidate(library, objective, shift, returns, lambda: compiled(arrays), seconds, costs, result)


def tunix_candidates(
    objectives: tuple[str, ...], direction: Direction, arrays: LossArrays, old_router: OldRouter | None
) -> Iterator[Candidate]:
    """Yield Tunix's losses of the objectives that it has."""
    from experiments.bench import tunix_losses

    for objective in objectives:
        if objective in tunix_losses.OBJECTIVES:

            def loss(log_probs: Array, arrays: LossArrays, objective: str = objective) -> tuple[Array, Any]:
                others = arrays.old_log_probs, arrays.advantages, arrays.mask
                return tunix_losses.loss(objective, log_probs, *others)

            yield jax_candidate("tunix", objective, False, LOSS, loss, direction, arrays)


def torch_candidates(
    objectives: tuple[str, ...], direction: Direction, arrays: LossArrays, old_router: OldRouter | None
) -> Iterator[Candidate]:
    """Yield PyTorch's losses of the objectives that are written in it, eager and compiled."""
    from experiments.bench import torch_losses

    torch_losses.prepare(cpu_threads())
    log_probs, *base = (torch_losses.tensor(np.asarray(array)) for array in arrays[:4])
    shift_inputs = [arrays.gamma] if old_router is None else [arrays.router_logits, *old_router]
    shift_inputs = [torch_losses.tensor(np.asarray(array)) for array in shift_inputs]
    for objective in (name for name in objectives if name in torch_losses.LOSSES):
        shift = OBJECTIVES[objective].uses_router_shift()
        loss = torch_losses.with_router(objective) if shift and old_router else torch_losses.LOSSES[objective]
        for library in ("torch eager", "torch compile"):
            inputs = (*base, *shift_inputs) if shift else base
            run = torch_losses.runner(loss, library == "torch compile", direction, log_probs, *inputs)
            started = time.perf_counter()
            run()
            seconds = time.perf_counter() - started if library == "torch compile" else 0.0
            result = functools.partial(torch_losses.to_numpy, run)
            yield Candidate(library, objective, shift, LOSS, run, seconds, None, result)


RivalName = Literal["tunix", "torch"]
RIVAL_LOSSES = {"tunix": tunix_candidates, "torch": torch_candidates}
PACKAGES = {"tunix": ("tunix", "google-tunix"), "torch": ("torch", "torch")}
"""Rival -> the module that it needs, and the package that holds it."""
