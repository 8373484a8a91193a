"""The chosen experts against a dense mixture in float64: every expert on every token, combined by the weights, with
the gradients written out by hand. Knows no router and no model."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import experts
from models.grouped_matmul import block_matmul

HIDDEN, EXPERT_SIZE = 6, 5
NAMES = ("x", "weights", "gate_up", "down")


def combine_matrix(weights, expert_ids, num_experts):
    """The weight of each expert for each token, float64 [N, E]."""
    combine = np.zeros((len(weights), num_experts))
    for token, (row, ids) in enumerate(zip(weights, expert_ids, strict=True)):
        for weight, expert in zip(row, ids, strict=True):
            combine[token, expert] += weight
    return combine


def dense_experts(x, weights, expert_ids, gate_up, down, cotangent=None):
    """The mixture, and the gradients of sum(mixture * cotangent) in the order of NAMES; all in float64."""
    x, weights, gate_up, down = (np.asarray(array, np.float64) for array in (x, weights, gate_up, down))
    combine = combine_matrix(weights, expert_ids, len(down))
    gate_kernel, up_kernel = gate_up[:, :, 0], gate_up[:, :, 1]
    gate, up = np.einsum("nd,edf->enf", x, gate_kernel), np.einsum("nd,edf->enf", x, up_kernel)
    sigmoid = 1 / (1 + np.exp(-gate))
    hidden = gate * sigmoid * up
    outputs = np.einsum("enf,efd->end", hidden, down)
    mixture = np.einsum("ne,end->nd", combine, outputs)
    if cotangent is None:
        return mixture
    d_combine = np.einsum("nd,end->ne", cotangent, outputs)
    d_outputs = combine.T[:, :, None] * cotangent[None]
    d_hidden = np.einsum("end,efd->enf", d_outputs, down)
    d_gate = d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_up = d_hidden * gate * sigmoid
    gradients = (
        np.einsum("enf,edf->nd", d_gate, gate_kernel) + np.einsum("enf,edf->nd", d_up, up_kernel),
        np.take_along_axis(d_combine, np.asarray(expert_ids), axis=1),
        np.stack([np.einsum("nd,enf->edf", x, d_gate), np.einsum("nd,enf->edf", x, d_up)], axis=2),
        np.einsum("enf,end->efd", hidden, d_outputs),
    )
    return mixture, gradients


def random_inputs(n, k, e, seed=0):
    """x, weights, distinct expert ids of each token, gate_up, down, and a cotangent of the output."""
    rng = np.random.default_rng([n, k, e, seed])
    expert_ids = rng.permuted(np.tile(np.arange(e, dtype=np.int32), (n, 1)), axis=1)[:, :k]
    shapes = ((n, HIDDEN), (n, k), (e, HIDDEN, 2, EXPERT_SIZE), (e, EXPERT_SIZE, HIDDEN), (n, HIDDEN))
    scales = (1, 1, HIDDEN**-0.5, EXPERT_SIZE**-0.5, 1)
    x, weights, gate_up, down, cotangent = (
        (scale * rng.normal(size=shape)).astype(np.float32) for shape, scale in zip(shapes, scales, strict=True)
    )
    return x, weights, expert_ids, gate_up, down, cotangent


def value_and_gradients(x, weights, expert_ids, gate_up, down, cotangent):
    def run(x, weights, gate_up, down):
        return experts.run_experts(x, weights, expert_ids, gate_up, down)

    value, vjp = jax.vjp(run, x, weights, gate_up, down)
    return value, vjp(cotangent)


compiled_value_and_gradients = jax.jit(value_and_gradients)
SORTS = {
    "sorted": jax.jit(experts.sort_assignments, static_argnames="num_experts"),
    "counted": jax.jit(experts._rank_assignments, static_argnames="num_experts"),
}


def assert_near(actual, expected, tolerance=1e-5):
    """The largest error, relative to the largest entry."""
    assert actual.shape == expected.shape
    error = np.max(np.abs(np.asarray(actual, np.float64) - expected))
    assert error <= tolerance * np.max(np.abs(expected)), error


def assert_matches_oracle(actual, inputs, tolerance=1e-5):
    value, gradients = actual
    expected_value, expected_gradients = dense_experts(*inputs)
    assert_near(value, expected_value, tolerance)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert_near(gradient, expected, tolerance)


def test_oracle_gradients_agree_with_differences():
    x, weights, expert_ids, gate_up, down, cotangent = random_inputs(4, 2, 3)
    arrays = {"x": x, "weights": weights, "gate_up": gate_up, "down": down}
    _, gradients = dense_experts(x, weights, expert_ids, gate_up, down, cotangent)
    for name, gradient in zip(NAMES, gradients, strict=True):
        direction = np.random.default_rng(1).normal(size=gradient.shape)
        values = []
        for step in (1e-5, -1e-5):
            moved = {**arrays, name: arrays[name] + step * direction}
            mixture = dense_experts(moved["x"], moved["weights"], expert_ids, moved["gate_up"], moved["down"])
            values.append(np.sum(mixture * cotangent))
        np.testing.assert_allclose(np.sum(gradient * direction), (values[0] - values[1]) / 2e-5, rtol=1e-7)


@pytest.mark.parametrize(("n", "k", "e"), [(1, 2, 4), (7, 3, 3), (70, 1, 3), (150, 2, 5)], ids=str)
def test_value_and_gradients_match_the_dense_mixture(n, k, e):
    inputs = random_inputs(n, k, e)
    assert_matches_oracle(compiled_value_and_gradients(*inputs), inputs)


@pytest.mark.parametrize(("n", "k", "e"), [(1, 2, 4), (7, 3, 3), (150, 2, 5)], ids=str)
def test_the_sorted_path_matches_the_dense_mixture(monkeypatch, n, k, e):
    inputs = random_inputs(n, k, e)
    monkeypatch.setattr(experts, "run_experts", experts.run_experts_sorted)
    assert_matches_oracle(jax.jit(lambda *inputs: value_and_gradients(*inputs))(*inputs), inputs)


@pytest.mark.parametrize("expert", [0, 1, 2])
def test_all_tokens_to_one_expert(expert):
    x, weights, _, *rest = random_inputs(70, 1, 3)
    inputs = (x, weights, np.full((70, 1), expert, np.int32), *rest)
    value, gradients = compiled_value_and_gradients(*inputs)
    assert_matches_oracle((value, gradients), inputs)
    others = [other for other in range(3) if other != expert]
    for gradient in gradients[2:]:
        assert np.all(np.asarray(gradient)[others] == 0) and np.any(np.asarray(gradient)[expert] != 0)


def test_assignments_without_a_place_count_like_the_others():
    """Two experts get nearly all tokens, several times what they have places for."""
    x, weights, _, gate_up, down, cotangent = random_inputs(150, 2, 5)
    expert_ids = random_routes(150, 2, 5)[1]
    counts = np.bincount(expert_ids.reshape(-1), minlength=5)
    assert counts.max() > 1.9 * experts._places_of_each(300, 5) and counts.min() < 30
    inputs = (x, weights, expert_ids, gate_up, down, cotangent)
    assert_matches_oracle(compiled_value_and_gradients(*inputs), inputs)


def unspecified_beyond_the_groups(rows, weights, group_sizes):
    """`grouped_matmul` as on a TPU: what it leaves in rows of no group may be NaN, and so may their gradient."""
    own = (jnp.arange(rows.shape[0]) < jnp.sum(group_sizes))[:, None]

    @jax.custom_vjp
    def spoil_gradient(rows):
        return rows

    spoil_gradient.defvjp(lambda rows: (rows, None), lambda _, gradient: (jnp.where(own, gradient, jnp.nan),))
    return jnp.where(own, block_matmul(spoil_gradient(rows), weights, group_sizes), jnp.nan)


@pytest.mark.parametrize("way", ["run_experts", "run_experts_sorted"])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_an_assignment_to_no_expert_adds_nothing_and_has_no_gradient(monkeypatch, way, share):
    """The id E stands for no expert, as for an expert on another device: like weight 0, also in the gradient."""
    x, weights, expert_ids, gate_up, down, cotangent = random_inputs(150, 2, 5)
    nobody = np.random.default_rng(0).uniform(size=expert_ids.shape) < share
    if way == "run_experts_sorted":  # behind the part of `run_experts` that all ways share
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, default, **_: default(*arrays))
        monkeypatch.setattr(experts, "grouped_matmul", unspecified_beyond_the_groups)
    value, gradients = jax.jit(lambda *inputs: value_and_gradients(*inputs))(
        x, weights, np.where(nobody, 5, expert_ids).astype(np.int32), gate_up, down, cotangent
    )
    expected, expected_gradients = dense_experts(x, np.where(nobody, 0, weights), expert_ids, gate_up, down, cotangent)
    expected_gradients = (expected_gradients[0], np.where(nobody, 0, expected_gradients[1]), *expected_gradients[2:])
    for found, wanted in zip((value, *gradients), (expected, *expected_gradients), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unused", [0, 2, 4])
def test_an_expert_without_tokens_is_not_touched(unused):
    x, weights, _, gate_up, down, cotangent = random_inputs(150, 2, 5)
    used = np.array([expert for expert in range(5) if expert != unused], np.int32)
    expert_ids = used[random_inputs(150, 2, 4)[2]]
    inputs = (x, weights, expert_ids, gate_up, down, cotangent)
    value, gradients = compiled_value_and_gradients(*inputs)
    assert_matches_oracle((value, gradients), inputs)

    poisoned = [array.copy() for array in (gate_up, down)]
    for array in poisoned:
        array[unused] = np.nan
    poisoned_value, poisoned_gradients = compiled_value_and_gradients(x, weights, expert_ids, *poisoned, cotangent)
    np.testing.assert_array_equal(poisoned_value, value)
    for gradient, clean in zip(poisoned_gradients, gradients, strict=True):
        np.testing.assert_array_equal(gradient, clean)
    for gradient in poisoned_gradients[2:]:
        assert np.all(np.asarray(gradient)[unused] == 0)


def test_a_token_of_weight_zero_still_has_a_gradient_in_its_weight():
    x, weights, *rest = random_inputs(150, 2, 5)
    inputs = (x, np.zeros_like(weights), *rest)
    value, gradients = compiled_value_and_gradients(*inputs)
    np.testing.assert_array_equal(value, 0)
    assert_near(gradients[1], dense_experts(*inputs)[1][1])


def test_bfloat16_stays_bfloat16():
    x, weights, expert_ids, *rest = random_inputs(40, 2, 4)
    rounded = [jnp.asarray(array, jnp.bfloat16) for array in (x, weights, *rest)]
    inputs = (*rounded[:2], expert_ids, *rounded[2:])
    value, gradients = compiled_value_and_gradients(*inputs)
    assert all(array.dtype == jnp.bfloat16 for array in (value, *gradients))
    exact = [np.asarray(array, np.float64) for array in rounded]
    assert_matches_oracle((value, gradients), (*exact[:2], expert_ids, *exact[2:]), tolerance=2**-6)


def test_inside_a_scan_over_recomputed_layers():
    layers = [random_inputs(9, 2, 4, seed) for seed in range(3)]
    x, cotangent = layers[0][0], layers[0][5]
    weights, expert_ids, gate_up, down = (np.stack([layer[index] for layer in layers]) for index in range(1, 5))

    def body(x, layer):
        weights, expert_ids, gate_up, down = layer
        return x + experts.run_experts(x, weights, expert_ids, gate_up, down), None

    @jax.jit
    def run(x, weights, expert_ids, gate_up, down, cotangent):
        def forward(x, weights, gate_up, down):
            return jax.lax.scan(jax.checkpoint(body), x, (weights, expert_ids, gate_up, down))[0]

        value, vjp = jax.vjp(forward, x, weights, gate_up, down)
        return value, vjp(cotangent)

    value, gradients = run(x, weights, expert_ids, gate_up, down, cotangent)
    inputs = [np.asarray(x, np.float64)]
    for layer in layers:
        inputs.append(inputs[-1] + dense_experts(inputs[-1], *layer[1:5]))
    assert_near(value, inputs[-1])
    d_x, expected = np.asarray(cotangent, np.float64), []
    for layer, layer_x in reversed(list(zip(layers, inputs[:-1], strict=True))):
        _, (through, *rest) = dense_experts(layer_x, *layer[1:5], d_x)
        d_x = d_x + through
        expected.insert(0, rest)
    assert_near(gradients[0], d_x)
    for gradient, of_layers in zip(gradients[1:], zip(*expected, strict=True), strict=True):
        assert_near(gradient, np.stack(of_layers))


@pytest.mark.parametrize("block_size", [1, 64])
def test_any_block_size_gives_the_same_result(monkeypatch, block_size):
    inputs = random_inputs(30, 2, 3)
    monkeypatch.setattr(experts, "block_size_for", lambda num_assignments, num_experts: block_size)
    assert_matches_oracle(jax.jit(lambda *inputs: value_and_gradients(*inputs))(*inputs), inputs)


def random_routes(n, k, e):
    """Distinct experts for each token: uniform, crowded onto few experts, and all alike."""
    rng = np.random.default_rng([n, k, e])
    uniform = rng.permuted(np.tile(np.arange(e), (n, 1)), axis=1)[:, :k]
    crowded = np.argsort(rng.gumbel(size=(n, e)) - 3 * np.arange(e), axis=1)[:, :k]
    first, last = np.tile(np.arange(k), (n, 1)), np.tile(np.arange(e - k, e), (n, 1))
    return [route.astype(np.int32) for route in (uniform, crowded, first, last)]


@pytest.mark.parametrize("way", SORTS)
@pytest.mark.parametrize(("n", "k", "e"), [(5, 2, 4), (61, 3, 7), (9, 4, 4), (64, 1, 3)], ids=str)
def test_assignments_are_sorted_by_expert(n, k, e, way):
    for expert_ids in random_routes(n, k, e):
        route = jax.tree.map(np.asarray, SORTS[way](expert_ids, e))
        assert all(array.dtype == np.int32 for array in route)
        np.testing.assert_array_equal(route.assignment_of_row, np.argsort(expert_ids.reshape(-1), kind="stable"))
        np.testing.assert_array_equal(route.assignment_of_row[route.row_of_assignment], np.arange(n * k))
        counts = np.bincount(expert_ids.reshape(-1), minlength=e)
        np.testing.assert_array_equal(route.group_bounds, np.concatenate([[0], np.cumsum(counts)]))


def test_block_size_is_a_power_of_two_in_range():
    sizes = {
        experts.block_size_for(num_assignments, num_experts)
        for num_assignments in (*range(1, 300), 1000, 4096, 10**4, 10**5, 10**7)
        for num_experts in (1, 2, 3, 8, 60, 128, 512)
    }
    assert sizes == {8, 16, 32, 64, 128, 256, 512}


def test_sharded_rows_and_replicated_experts_give_the_unsharded_result():
    program = textwrap.dedent("""
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import PartitionSpec as P
        from models import experts

        rng = np.random.default_rng(0)
        shapes = (16, 6), (16, 2), (3, 6, 2, 5), (3, 5, 6), (16, 6)
        x, weights, gate_up, down, cotangent = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
        expert_ids = jnp.asarray(rng.integers(0, 3, (16, 2)), jnp.int32)
        mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        rows, all = P("data"), P()

        def check(run_experts):
            sharded = jax.shard_map(
                run_experts, mesh=mesh, in_specs=(rows, rows, rows, all, all), out_specs=rows, check_vma=False
            )

            def value_and_gradients(run):
                value, vjp = jax.vjp(lambda x, w, g, d: run(x, w, expert_ids, g, d), x, weights, gate_up, down)
                return value, *vjp(cotangent)

            expected, actual = (jax.jit(value_and_gradients, static_argnums=0)(f) for f in (run_experts, sharded))
            assert len(actual[0].sharding.device_set) == 4
            for one, other in zip(expected, actual, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)

        check(experts.run_experts)
        check(experts.run_experts_sorted)
        print("equal")
    """)
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout == "equal\n", result.stderr


@pytest.mark.parametrize("run", [experts.run_experts_of_layer, experts._run_sorted_layer])
def test_experts_of_a_layer_are_read_from_the_stack(run):
    """Few tokens, so that most experts have none."""
    rng = np.random.default_rng(40)
    x, weights = rng.normal(size=(3, 8)), rng.uniform(0.1, 1, (3, 2))
    expert_ids = np.array([[4, 1], [4, 0], [1, 4]], np.int32)
    gate_up, down = 0.3 * rng.normal(size=(3, 6, 8, 2, 5)), 0.3 * rng.normal(size=(3, 6, 5, 8))
    arrays = [jnp.asarray(array, jnp.float32) for array in (x, weights)]
    stacks = [jnp.asarray(array, jnp.float32) for array in (gate_up, down)]
    for layer in range(3):
        whole = experts.run_experts(*arrays, jnp.asarray(expert_ids), *(stack[layer] for stack in stacks))
        actual = jax.jit(run)(*arrays, jnp.asarray(expert_ids), *stacks, jnp.int32(layer))
        np.testing.assert_allclose(actual, whole, rtol=0, atol=1e-6)
    in_bfloat16 = jax.jit(run)(
        *(array.astype(jnp.bfloat16) for array in arrays), jnp.asarray(expert_ids), *stacks, jnp.int32(2)
    )
    assert in_bfloat16.dtype == jnp.bfloat16
    np.testing.assert_allclose(in_bfloat16.astype(jnp.float32), whole, rtol=0, atol=0.05)
