"""Experts that lie on several devices: each device sends its tokens to them and gets the results back.

The tokens of a batch and the experts of a layer are both split over the mesh axis `expert`. There are two ways to bring
them together. All-to-all sends each assignment (token, expert) to the device of its expert. Shapes being static, it
goes in rounds of a little more than an even share, as many as the fullest device needs, so that nothing is ever
dropped. All-gather brings all tokens of the group to all of its devices, which is faster for few tokens or two devices.
Both compute what `models.experts.run_experts` computes on one device.

Letters: n tokens of a device, D hidden size, K experts of a token, P devices along `expert`, e experts of a device,
F hidden width of an expert (or a device's part of it), C places that a round has for each pair of devices.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from models.experts import Activation, Experts, add_down_bias, run_experts, run_experts_of_layer
from rspo_jax.sharding import axes_of, check_split, constrain, free_axes, on_each_device, parts_of, platform, split_axes

Array = jax.Array

GATHER_UP_TO_DEVICES = 2
"""Largest P for which all-gather is used. It moves (P − 1) · n rows to a device, all-to-all about K · n · (P − 1) / P;
but its products have P · n · K places for rows, of which one in P is filled."""
GATHER_UP_TO_TOKENS = 64
"""Largest n for which all-gather is used: so few tokens, as in decoding, are not worth sorting by where they go."""
SLACK = 4
"""A round has room for 1 + 1/SLACK of an even share."""


class Layout(NamedTuple):
    """The mesh axes that split tokens and experts; empty tuples where nothing is split. Known while tracing."""

    rows: tuple[str, ...]
    tokens: tuple[str, ...]
    experts: tuple[str, ...]
    hidden: tuple[str, ...]
    embed: tuple[str, ...]
    """Axes that split the hidden size of the experts' gradients; the parameters themselves are whole along it."""
    num_groups: int
    """P."""
    exchange: bool | None = None
    """True for all-to-all, False for all-gather; None for the faster one."""

    @classmethod
    def in_use(cls, tokens: int, hidden_size: int, exchange: bool | None = None) -> "Layout":
        """Return the layout on the mesh in use.

        Args:
          tokens: tokens of a row; they stay whole if the mesh does not divide them.
          hidden_size: D, of which the same holds.
          exchange: the field of this name.
        """
        return cls(
            rows=axes_of("rows"),
            tokens=split_axes("tokens", tokens),
            experts=axes_of("experts"),
            hidden=axes_of("expert_hidden"),
            embed=split_axes("expert_embed", hidden_size),
            num_groups=parts_of("experts"),
            exchange=exchange,
        )

    def activations(self) -> PartitionSpec:
        """Return the spec of arrays [B, T, …]."""
        return PartitionSpec(self.rows or None, self.tokens or None, None)

    def parameters(self, experts: Experts, embed: tuple[str, ...] = ()) -> Any:
        """Return a tree of specs like `experts`; with `embed`, those of gradients that these axes split along D."""
        first, hidden, split = self.experts or None, self.hidden or None, embed or None
        specs = {
            "gate_up": PartitionSpec(first, split, None, hidden),
            "down": PartitionSpec(first, hidden, split),
            "gate_up_bias": PartitionSpec(first, None, hidden),
        }
        return experts._replace(**{name: spec for name, spec in specs.items() if getattr(experts, name) is not None})

    def sum_experts(self, gradients: Experts) -> Experts:
        """Sum gradients over the devices that had tokens of their own for these experts.

        Where the hidden size of a projection is split, each device gets its own part of the sum.
        """
        bias = gradients.gate_up_bias
        return Experts(
            gate_up=self._sum_rows(gradients.gate_up, 1),
            down=self._sum_rows(gradients.down, 2),
            gate_up_bias=None if bias is None else self._sum_rows(bias),
        )

    def _sum_rows(self, gradient: Array, embed_axis: int | None = None) -> Array:
        axes = tuple(axis for axis in (*self.rows, *self.tokens) if axis not in self.experts)
        if embed_axis is not None:
            scattered = tuple(axis for axis in self.embed if axis in axes)
            if scattered:
                gradient = jax.lax.psum_scatter(gradient, scattered, scatter_dimension=embed_axis, tiled=True)
            axes = tuple(axis for axis in axes if axis not in scattered)
        return jax.lax.psum(gradient, axes) if axes else gradient

    def sum_hidden(self, partial: Array) -> Array:
        """Sum over the parts of the experts' hidden layer."""
        return jax.lax.psum(partial, self.hidden) if self.hidden else partial


def mix_experts(
    x: Array, weights: Array, expert_ids: Array, experts: Experts, activation: Activation = "silu"
) -> Array:
    """Run the chosen experts of rows of tokens, split over the mesh in use if there is one.

    Args:
      x: float [B, T, D].
      weights: float [B, T, K], in the dtype of x.
      expert_ids: int [B, T, K], in [0, E], where E stands for no expert.
      experts: the parameters, in the dtype of x.
      activation: as for `models.experts.activate`.

    Returns:
      float [B, T, D]. Differentiable (reverse mode) in x, weights and experts.

    Raises:
      ValueError: if the mesh does not divide rows, experts or their hidden width.
    """
    if not free_axes():
        return run_experts(*_flatten(x, weights, expert_ids), experts, activation).reshape(x.shape)
    layout = Layout.in_use(x.shape[1], x.shape[2])
    check_split("the batch", x.shape, ("rows", None, None))
    check_split("gate_up", experts.gate_up.shape, ("experts", None, None, "expert_hidden"))
    mixed: Any = _mix_spread(x, weights, expert_ids, experts._replace(down_bias=None), layout, activation)
    return _add_down_bias(mixed, weights, expert_ids, experts.down_bias)


def mix_experts_of_layer(
    x: Array, weights: Array, expert_ids: Array, experts: Experts, layer: Array, activation: Activation = "silu"
) -> Array:
    """Run the chosen experts of one layer of a stack, for decoding; there is no gradient.

    Arguments and errors are those of `mix_experts`, except that `experts` have a leading axis L and may be of any
    floating dtype, and that `layer`, an int32 scalar, is the index of the layer.
    """
    if not free_axes():
        flat = _flatten(x, weights, expert_ids)
        return run_experts_of_layer(*flat, experts, layer, activation).reshape(x.shape)
    layout = Layout.in_use(x.shape[1], x.shape[2])
    check_split("the batch", x.shape, ("rows", None, None))
    check_split("gate_up", experts.gate_up.shape[1:], ("experts", None, None, "expert_hidden"))

    def local(x: Array, weights: Array, expert_ids: Array, experts: Experts, layer: Array) -> Array:
        flat = _flatten(x, weights, expert_ids)
        run = functools.partial(run_experts_of_layer, layer=layer, activation=activation)
        transport = _Gathered(layout, *flat, experts.down.shape[1]) if layout.experts else _AtHome(*flat)
        return layout.sum_hidden(transport.forward(run, experts)).reshape(x.shape)

    spec, rest = layout.activations(), experts._replace(down_bias=None)
    stacks = jax.tree.map(lambda spec: PartitionSpec(None, *spec), layout.parameters(rest))
    mixed = on_each_device(local, (spec, spec, spec, stacks, PartitionSpec()), spec)(
        x, weights, expert_ids, rest, layer
    )
    down_bias = None if experts.down_bias is None else experts.down_bias[layer].astype(x.dtype)
    return _add_down_bias(mixed, weights, expert_ids, down_bias)


def _add_down_bias(mixed: Array, weights: Array, expert_ids: Array, down_bias: Array | None) -> Array:
    """Add the bias where the tokens are: small as it is, it comes whole to each device."""
    if down_bias is not None:
        down_bias = constrain(down_bias, None, None)
    return add_down_bias(mixed, weights, expert_ids, down_bias)


def _flatten(x: Array, weights: Array, expert_ids: Array) -> tuple[Array, Array, Array]:
    """Turn [B, T, …] into [B·T, …]."""
    x, weights, expert_ids = (array.reshape(-1, array.shape[-1]) for array in (x, weights, expert_ids))
    return x, weights, expert_ids


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _mix_spread(
    x: Array, weights: Array, expert_ids: Array, experts: Experts, layout: Layout, activation: Activation
) -> Array:
    return _forward(x, weights, expert_ids, experts, layout, activation)[0]


def _forward(
    x: Array, weights: Array, expert_ids: Array, experts: Experts, layout: Layout, activation: Activation
) -> tuple[Array, tuple]:
    def local(x: Array, weights: Array, expert_ids: Array, experts: Experts) -> Array:
        transport = _transport(layout, *_flatten(x, weights, expert_ids), experts.down.shape[0])
        mixed = transport.forward(functools.partial(run_experts, activation=activation), experts)
        return layout.sum_hidden(mixed).reshape(x.shape)

    spec = layout.activations()
    inputs = (x, weights, expert_ids, experts)
    return on_each_device(local, (spec, spec, spec, layout.parameters(experts)), spec)(*inputs), inputs


def _backward(layout: Layout, activation: Activation, residuals: tuple, output_gradient: Array) -> tuple:
    def local(
        x: Array, weights: Array, expert_ids: Array, experts: Experts, output_gradient: Array
    ) -> tuple[Array, Array, Experts]:
        flat = _flatten(x, weights, expert_ids)
        run = functools.partial(run_experts, activation=activation)
        transport = _transport(layout, *flat, experts.down.shape[0])
        of_x, of_weights, of_experts = transport.backward(run, experts, output_gradient.reshape(flat[0].shape))
        of_experts = jax.tree.map(lambda gradient, parameter: gradient.astype(parameter.dtype), of_experts, experts)
        of_x, of_weights = layout.sum_hidden(of_x), layout.sum_hidden(of_weights)
        return of_x.reshape(x.shape), of_weights.reshape(weights.shape), layout.sum_experts(of_experts)

    spec, experts = layout.activations(), residuals[3]
    inputs = (spec, spec, spec, layout.parameters(experts), spec)
    spread = on_each_device(local, inputs, (spec, spec, layout.parameters(experts, layout.embed)))
    of_x, of_weights, of_experts = spread(*residuals, output_gradient)
    return of_x, of_weights, None, of_experts


_mix_spread.defvjp(_forward, _backward)


def _transport(layout: Layout, x: Array, weights: Array, expert_ids: Array, own_experts: int) -> Any:
    """Return the way in which these tokens get to their experts."""
    if not layout.experts:
        return _AtHome(x, weights, expert_ids)
    few = layout.num_groups <= GATHER_UP_TO_DEVICES or x.shape[0] <= GATHER_UP_TO_TOKENS
    exchange = layout.exchange if layout.exchange is not None else not few
    return (_Exchanged if exchange else _Gathered)(layout, x, weights, expert_ids, own_experts)


class _AtHome(NamedTuple):
    """Tokens of a device that has all experts."""

    x: Array
    weights: Array
    expert_ids: Array

    def forward(self, run: Callable[..., Array], experts: Experts) -> Array:
        return run(*self, experts)

    def backward(self, run: Callable[..., Array], experts: Experts, output_gradient: Array) -> tuple:
        return _gradients(run, *self, experts, output_gradient)


def _gradients(
    run: Callable[..., Array], x: Array, weights: Array, expert_ids: Array, experts: Experts, output_gradient: Array
) -> tuple[Array, Array, Experts]:
    """Return the gradients of x, weights and experts; what they need of the forward pass is computed again."""

    def mixed(x: Array, weights: Array, experts: Experts) -> Array:
        return run(x, weights, expert_ids, experts)

    return jax.vjp(mixed, x, weights, experts)[1](output_gradient)


class _Gathered(NamedTuple):
    """Tokens that every device of the group gets, for its own experts; the results are summed over the devices."""

    layout: Layout
    x: Array
    weights: Array
    expert_ids: Array
    own_experts: int

    def _all(self) -> tuple[Array, Array, Array]:
        """Return x, weights and own ids of all tokens of the group; the id `own_experts` is an expert elsewhere."""
        gather = functools.partial(jax.lax.all_gather, axis_name=self.layout.experts, tiled=True)
        own = gather(self.expert_ids) - jax.lax.axis_index(self.layout.experts) * self.own_experts
        own = jnp.where((own >= 0) & (own < self.own_experts), own, self.own_experts)
        return gather(self.x), gather(self.weights), own

    def forward(self, run: Callable[..., Array], experts: Experts) -> Array:
        return jax.lax.psum_scatter(run(*self._all(), experts), self.layout.experts, scatter_dimension=0, tiled=True)

    def backward(self, run: Callable[..., Array], experts: Experts, output_gradient: Array) -> tuple:
        output_gradient = jax.lax.all_gather(output_gradient, self.layout.experts, tiled=True)
        of_x, of_weights, of_experts = _gradients(run, *self._all(), experts, output_gradient)
        of_x, of_weights = (
            jax.lax.psum_scatter(rows, self.layout.experts, scatter_dimension=0, tiled=True)
            for rows in (of_x, of_weights)
        )
        return of_x, of_weights, of_experts


class _Round(NamedTuple):
    """The assignments that one round moves: C places for each of the P devices, in the order of the devices."""

    tokens: Array
    """int32 [P·C]: the token of each place; some token where a place is empty."""
    assignments: Array
    """int32 [P·C]."""
    used: Array
    """bool [P·C]."""
    places: Array
    """int32 [n·K]: the place of each assignment."""
    moved: Array
    """bool [n·K]: True if this round moves it."""


class _Filled(NamedTuple):
    """Numbers of the C places for each device that are in use, int32 [P] each."""

    sent: Array
    came: Array


def _swap_all(axes: tuple[str, ...], rows: Array) -> Array:
    """Send the places for each device to it, the empty ones too, [P·C, …]."""
    return jax.lax.all_to_all(rows, axes, split_axis=0, concat_axis=0, tiled=True)


def swap_filled(rows: Array, sent: Array, came: Array, axes: tuple[str, ...]) -> Array:
    """Send the places for each device that are in use to it; what the others hold then is unspecified.

    Only TPUs have this operation.

    Args:
      rows: [P·C, …].
      sent: int32 [P], the number of places for each device that are in use, which are the first ones.
      came: int32 [P], the number that comes from each device.
      axes: mesh axes, with P devices.
    """
    places = rows.shape[0] // sent.size
    nothing = jax.lax.empty(rows.shape, rows.dtype)  # the compiler takes 9 ms for 640 MiB of zeros in this layout
    theirs = jnp.arange(sent.size, dtype=jnp.int32) * places
    mine = jnp.full(sent.shape, jax.lax.axis_index(axes) * places, jnp.int32)
    return jax.lax.ragged_all_to_all(rows, nothing, theirs, sent, mine, came, axis_name=axes)


class _Exchanged(NamedTuple):
    """Tokens that go to the devices of their experts, and whose results come back, in rounds."""

    layout: Layout
    x: Array
    weights: Array
    expert_ids: Array
    own_experts: int

    @property
    def capacity(self) -> int:
        """C: an even share with its slack, in multiples of 8, but no more than a pair of devices can need."""
        tokens, per_token = self.expert_ids.shape
        share = -(-tokens * per_token // self.layout.num_groups)
        return min(-(-(share + share // SLACK) // 8) * 8, tokens * min(per_token, self.own_experts))

    def _rounds(self) -> tuple[Array, Callable[[Array], _Round]]:
        """Return the number of rounds, the same on all devices, and a function that makes a round from its index."""
        flat, per_token = self.expert_ids.reshape(-1).astype(jnp.int32), self.expert_ids.shape[1]
        device = flat // self.own_experts
        order = jnp.argsort(device, stable=True).astype(jnp.int32)
        bounds = jnp.searchsorted(device[order], jnp.arange(self.layout.num_groups + 1, dtype=jnp.int32))
        bounds = bounds.astype(jnp.int32)
        row = jnp.zeros_like(flat).at[order].set(jnp.arange(flat.size, dtype=jnp.int32), unique_indices=True)
        rank = row - bounds[device]
        fullest = jax.lax.pmax(jnp.max(jnp.diff(bounds)), tuple({*self.layout.rows, *self.layout.tokens}))

        def round_of(index: Array) -> _Round:
            first = index * self.capacity
            place = first + jnp.arange(self.capacity, dtype=jnp.int32)
            rows = bounds[:-1, None] + place[None, :]
            used = (rows < bounds[1:, None]).reshape(-1)
            assignments = order[jnp.minimum(rows, flat.size - 1).reshape(-1)]
            moved = (rank >= first) & (rank < first + self.capacity) & (device < self.layout.num_groups)
            places = jnp.where(moved, device * self.capacity + rank - first, 0)
            return _Round(assignments // per_token, assignments, used, places, moved)

        return -(-fullest // self.capacity), round_of

    def _swap(self, rows: Array, filled: _Filled) -> Array:
        """Send each place p·C + c of [P·C, …] to device p, where it takes the place of the device that sent it."""
        axes = self.layout.experts
        return swap_filled(rows, *filled, axes) if platform() == "tpu" else _swap_all(axes, rows)

    def _send(self, round_: _Round) -> tuple[Array, Array, Array, _Filled]:
        """Return the tokens, weights and ids that came, one assignment a row, and how many places are in use.

        Returns:
          [P·C, D], [P·C, 1], [P·C, 1] and the numbers of places.
        """
        ids = self.expert_ids.reshape(-1)[round_.assignments] % self.own_experts
        ids = jnp.where(round_.used, ids, self.own_experts).astype(jnp.int32)
        weights = self.weights.reshape(-1)[round_.assignments]
        sent = jnp.sum(round_.used.reshape(self.layout.num_groups, -1), axis=1, dtype=jnp.int32)
        filled = _Filled(sent, _swap_all(self.layout.experts, sent))
        ids, weights = (_swap_all(self.layout.experts, array[:, None]) for array in (ids, weights))
        return self._swap(self.x[round_.tokens], filled), weights, ids, filled

    def _back(self, rows: Array, round_: _Round, filled: _Filled) -> Array:
        """Send results back: [P·C, …] -> [n, K, …], 0 for assignments that this round has not moved.

        `filled` is that of the way there.
        """
        returned = self._swap(rows, _Filled(sent=filled.came, came=filled.sent))[round_.places]
        moved = round_.moved.reshape(-1, *(1,) * (rows.ndim - 1))
        return jnp.where(moved, returned, 0).reshape(*self.expert_ids.shape, *rows.shape[1:])

    def forward(self, run: Callable[..., Array], experts: Experts) -> Array:
        num_rounds, round_of = self._rounds()

        def step(index: Array, mixed: Array) -> Array:
            round_ = round_of(index)
            x, weights, ids, filled = self._send(round_)
            return mixed + jnp.sum(self._back(run(x, weights, ids, experts), round_, filled), axis=1)

        return jax.lax.fori_loop(0, num_rounds, step, jnp.zeros_like(self.x))

    def backward(self, run: Callable[..., Array], experts: Experts, output_gradient: Array) -> tuple:
        num_rounds, round_of = self._rounds()

        def step(index: Array, sums: tuple) -> tuple:
            round_ = round_of(index)
            x, weights, ids, filled = self._send(round_)
            came_back = self._swap(output_gradient[round_.tokens], filled)
            of_x, of_weights, of_experts = _gradients(run, x, weights, ids, experts, came_back)
            of_x, of_weights = (self._back(rows, round_, filled) for rows in (of_x, of_weights))
            parts = (jnp.sum(of_x, axis=1), of_weights[..., 0], of_experts)
            return jax.tree.map(lambda total, part: total + part.astype(total.dtype), sums, parts)

        zeros = jax.tree.map(lambda parameter: jnp.zeros(parameter.shape, jnp.float32), experts)
        start = (jnp.zeros_like(self.x), jnp.zeros_like(self.weights), zeros)
        return jax.lax.fori_loop(0, num_rounds, step, start)
