"""The program of `test_expert_parallel.py`, for four devices: experts on a mesh against a dense sum over all experts in
float64 NumPy, of plain SwiGLU experts and of those with biases, the clamped activation and assignments to no expert.
Prints the largest difference of each case, as JSON."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np

from models import expert_parallel
from models.expert_parallel import Layout, mix_experts, mix_experts_of_layer
from models.experts import Experts
from rspo_jax.sharding import MeshConfig, make_mesh

ROWS, TOKENS, HIDDEN, EXPERTS, CHOSEN, WIDTH = 4, 6, 8, 8, 3, 4


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, axis_name):
    """What the documentation of `jax.lax.ragged_all_to_all` says, by all-gather: CPUs do not have the operation."""
    gather = functools.partial(jax.lax.all_gather, axis_name=axis_name)
    me = jax.lax.axis_index(axis_name)
    operands, inputs, sends, outputs = (gather(a) for a in (operand, input_offsets, send_sizes, output_offsets))
    at = jnp.arange(output.shape[0])
    output = jnp.full_like(output, 1e3)  # it may hold anything before
    for source in range(operands.shape[0]):
        first, size = outputs[source, me], sends[source, me]
        taken = operands[source][jnp.clip(at - first + inputs[source, me], 0, operand.shape[0] - 1)]
        here = (at >= first) & (at < first + jnp.minimum(size, recv_sizes[source]))
        output = jnp.where(here.reshape(-1, *(1,) * (output.ndim - 1)), taken, output)
    return output


def make_arguments(route, form):
    """x, weights, ids, the experts' parameters, and the gradient of the output. Id EXPERTS stands for no expert."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(ROWS, TOKENS, EXPERTS))
    if route == "skewed":
        scores[..., 0] += 3
    if route == "all to the first device":
        scores[..., :CHOSEN] += 100
    ids = np.argsort(-scores, axis=-1)[..., :CHOSEN].astype(np.int32)
    x, weights = rng.normal(size=(ROWS, TOKENS, HIDDEN)), rng.uniform(0.1, 1, (ROWS, TOKENS, CHOSEN))
    gate_up, down = rng.normal(size=(EXPERTS, HIDDEN, 2, WIDTH)), rng.normal(size=(EXPERTS, WIDTH, HIDDEN))
    experts, output_gradient = Experts(gate_up, down), rng.normal(size=x.shape)
    if form == "clamped":
        ids = np.where(rng.uniform(size=ids.shape) < 0.2, EXPERTS, ids).astype(np.int32)
        experts = Experts(2 * gate_up, down, rng.normal(size=(EXPERTS, 2, WIDTH)), rng.normal(size=(EXPERTS, HIDDEN)))
    return x, weights, ids, experts, output_gradient


def one_expert(x, expert, form):
    """The output of one expert for one token, and, as a function of the output's gradient, the gradients of both."""
    gate_up, down, gate_up_bias, down_bias = expert
    gate, up = x @ gate_up[:, 0] + gate_up_bias[0], x @ gate_up[:, 1] + gate_up_bias[1]
    slope, free_gate, free_up = 1, 1, 1
    if form == "clamped":
        slope, free_gate, free_up = 1.702, gate <= 7, np.abs(up) <= 7
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7) + 1
    sigmoid = 1 / (1 + np.exp(-slope * gate))
    hidden = gate * sigmoid * up

    def backward(of_output):
        of_hidden = down @ of_output
        of_gate = free_gate * of_hidden * up * sigmoid * (1 + slope * gate * (1 - sigmoid))
        both = np.stack([of_gate, free_up * of_hidden * gate * sigmoid])
        of_x = gate_up[:, 0] @ both[0] + gate_up[:, 1] @ both[1]
        return of_x, Experts(np.einsum("d,cf->dcf", x, both), np.outer(hidden, of_output), both, of_output)

    return hidden @ down + down_bias, backward


def oracle(x, weights, ids, experts, output_gradient, form):
    """Output and gradients, assignment by assignment."""
    filled = experts
    if experts.gate_up_bias is None:
        filled = Experts(*experts[:2], np.zeros((EXPERTS, 2, WIDTH)), np.zeros((EXPERTS, HIDDEN)))
    output, gradients = np.zeros_like(x), (np.zeros_like(x), np.zeros_like(weights))
    of_experts = Experts(*map(np.zeros_like, filled))
    for place in itertools.product(range(ROWS), range(TOKENS), range(CHOSEN)):
        token, e, weight = place[:2], ids[place], weights[place]
        if e == EXPERTS:
            continue
        result, backward = one_expert(x[token], [parameter[e] for parameter in filled], form)
        output[token] += weight * result
        of_x, of_expert = backward(weight * output_gradient[token])
        gradients[0][token] += of_x
        gradients[1][place] += result @ output_gradient[token]
        for total, part in zip(of_experts, of_expert, strict=True):
            total[e] += part
    return output, *gradients, *of_experts[: len(jax.tree.leaves(experts))]


def run(sizes, arguments, form):
    """Output and gradients, and the output once more as decoding finds it in a stack."""
    x, weights, ids, experts, output_gradient = jax.tree.map(
        lambda array: jnp.asarray(array, jnp.int32 if array.dtype == np.int32 else jnp.float32), arguments
    )

    def mixed(x, weights, experts):
        return mix_experts(x, weights, ids, experts, form)

    @jax.jit
    def forward_and_backward(x, weights, experts):
        output, vjp = jax.vjp(mixed, x, weights, experts)
        stacks = jax.tree.map(lambda parameter: jnp.stack([jnp.zeros_like(parameter), parameter]), experts)
        decoded = mix_experts_of_layer(x, weights, ids, stacks, jnp.int32(1), form)
        return decoded, *jax.tree.leaves((output, vjp(output_gradient)))

    with jax.set_mesh(make_mesh(MeshConfig(**sizes))):
        return forward_and_backward(x, weights, experts)


def main():
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    in_use = Layout.in_use
    cases = {
        "gathered": ({"fsdp": 1, "expert": 4}, False),
        "exchanged": ({"fsdp": 1, "expert": 4}, True),
        "exchanged in pairs, with tensor": ({"fsdp": 1, "expert": 2, "tensor": 2}, True),
        "gathered, with context": ({"fsdp": 1, "expert": 2, "context": 2}, False),
        "no expert axis": ({"fsdp": 2, "tensor": 2}, None),
    }
    report = {}

    def compare(name, sizes, route, form):
        arguments = make_arguments(route, form)
        (decoded, *found), expected = run(sizes, arguments, form), oracle(*arguments, form)
        report[f"{name}, {route}, {form}"] = [
            float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
            for a, b in zip((decoded, *found), (expected[0], *expected), strict=True)
        ]

    for name, (sizes, exchange) in cases.items():
        expert_parallel.Layout.in_use = classmethod(
            lambda cls, *sizes, exchange=exchange: in_use(*sizes)._replace(exchange=exchange)
        )
        compare(name, sizes, "skewed", "clamped")
        if name == "exchanged":
            for route in ("even", "all to the first device"):
                compare(name, sizes, route, "silu")
        if name == "no expert axis":
            compare(name, sizes, "skewed", "silu")
    # The way of TPUs, with the operation that CPUs lack written out.
    jax.lax.ragged_all_to_all = ragged_all_to_all
    expert_parallel.platform = lambda: "tpu"
    expert_parallel.Layout.in_use = classmethod(lambda cls, *sizes: in_use(*sizes)._replace(exchange=True))
    compare("ragged", {"fsdp": 1, "expert": 4}, "skewed", "clamped")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
