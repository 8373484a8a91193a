"""The program of `test_expert_parallel.py`, for four devices: experts on a mesh against a dense sum over all experts in
float64 NumPy. Prints the largest difference of each case, as JSON."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np

from models import expert_parallel
from models.expert_parallel import Layout, mix_experts
from rspo_jax.sharding import MeshConfig, make_mesh

ROWS, TOKENS, HIDDEN, EXPERTS, CHOSEN, WIDTH = 4, 6, 8, 8, 3, 4
ROUTES = ("even", "skewed", "all to the first device")


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


def make_arguments(route):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(ROWS, TOKENS, EXPERTS))
    if route == "skewed":
        scores[..., 0] += 3
    if route == "all to the first device":
        scores[..., :CHOSEN] += 100
    ids = np.argsort(-scores, axis=-1)[..., :CHOSEN].astype(np.int32)
    return (
        rng.normal(size=(ROWS, TOKENS, HIDDEN)),
        rng.uniform(0.1, 1, (ROWS, TOKENS, CHOSEN)),
        ids,
        rng.normal(size=(EXPERTS, HIDDEN, 2, WIDTH)),
        rng.normal(size=(EXPERTS, WIDTH, HIDDEN)),
        rng.normal(size=(ROWS, TOKENS, HIDDEN)),
    )


def oracle(x, weights, ids, gate_up, down, output_gradient):
    """Output and gradients, expert by expert, by the rules of calculus."""
    output, gradients = np.zeros_like(x), [np.zeros_like(array) for array in (x, weights, gate_up, down)]
    for place in itertools.product(range(ROWS), range(TOKENS), range(CHOSEN)):
        token, e, weight = place[:2], ids[place], weights[place]
        gate, up = x[token] @ gate_up[e, :, 0], x[token] @ gate_up[e, :, 1]
        sigmoid = 1 / (1 + np.exp(-gate))
        hidden = gate * sigmoid * up
        output[token] += weight * (hidden @ down[e])
        of_hidden = weight * (down[e] @ output_gradient[token])
        of_gate = of_hidden * up * sigmoid * (1 + gate * (1 - sigmoid))
        of_up = of_hidden * gate * sigmoid
        gradients[0][token] += gate_up[e, :, 0] @ of_gate + gate_up[e, :, 1] @ of_up
        gradients[1][place] += hidden @ down[e] @ output_gradient[token]
        gradients[2][e] += np.stack([np.outer(x[token], of_gate), np.outer(x[token], of_up)], axis=1)
        gradients[3][e] += weight * np.outer(hidden, output_gradient[token])
    return output, *gradients


def run(sizes, arguments):
    x, weights, ids, gate_up, down, output_gradient = (
        jnp.asarray(array, jnp.int32 if array.dtype == np.int32 else jnp.float32) for array in arguments
    )

    def mixed(x, weights, gate_up, down):
        return mix_experts(x, weights, ids, gate_up, down)

    @jax.jit
    def forward_and_backward(*inputs):
        output, vjp = jax.vjp(mixed, *inputs)
        return output, *vjp(output_gradient)

    with jax.set_mesh(make_mesh(MeshConfig(**sizes))):
        return forward_and_backward(x, weights, gate_up, down)


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

    def compare(name, sizes, routes):
        for route in routes:
            arguments = make_arguments(route)
            found, expected = run(sizes, arguments), oracle(*arguments)
            report[f"{name}, {route}"] = [
                float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in zip(found, expected, strict=True)
            ]

    for name, (sizes, exchange) in cases.items():
        expert_parallel.Layout.in_use = classmethod(
            lambda cls, *sizes, exchange=exchange: in_use(*sizes)._replace(exchange=exchange)
        )
        compare(name, sizes, ROUTES if name == "exchanged" else ROUTES[1:2])
    # The way of TPUs, with the operation that CPUs lack written out.
    jax.lax.ragged_all_to_all = ragged_all_to_all
    jax.lax.platform_dependent = lambda *arguments, **ways: ways.get("tpu" if "tpu" in ways else "cpu")(*arguments)
    expert_parallel.Layout.in_use = classmethod(lambda cls, *sizes: in_use(*sizes)._replace(exchange=True))
    compare("ragged", {"fsdp": 1, "expert": 4}, ROUTES[1:2])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
