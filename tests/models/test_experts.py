"""The chosen experts against a dense mixture in float64: every expert on every token, combined by the weights, with
the gradients written out by hand; with SwiGLU, and with the biases and the clamped activation of gpt-oss. Knows no
router and no model."""

import functools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import experts
from models.experts import Experts
from models.kernels.grouped_matmul import block_matmul
from rspo_jax.sharding import lowering_for

HIDDEN, EXPERT_SIZE = 6, 5
FORMS = ("silu", "clamped")
"""The first without biases, the second with them."""
WAYS = {"in places": "cpu", "sorted": "rocm"}
"""Way to run experts -> a platform that goes this way, the second without kernels of its own."""


def combine_matrix(weights, expert_ids, num_experts):
    """The weight of each expert for each token, float64 [N, E]."""
    combine = np.zeros((len(weights), num_experts))
    for token, (row, ids) in enumerate(zip(weights, expert_ids, strict=True)):
        for weight, expert in zip(row, ids, strict=True):
            combine[token, expert] += weight
    return combine


def dense_experts(x, weights, expert_ids, parameters, cotangent=None, form="silu"):
    """The mixture, and the gradients of sum(mixture * cotangent) in x, weights and parameters; all in float64."""
    x, weights = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    gate_up, down, *biases = (None if array is None else np.asarray(array, np.float64) for array in parameters)
    gate_up_bias, down_bias = (np.zeros(1) if bias is None else bias for bias in biases)
    combine = combine_matrix(weights, expert_ids, len(down))
    gate_kernel, up_kernel = gate_up[:, :, 0], gate_up[:, :, 1]
    gate, up = np.einsum("nd,edf->enf", x, gate_kernel), np.einsum("nd,edf->enf", x, up_kernel)
    free_gate = free_up = steepness = 1.0
    if biases[0] is not None:
        gate, up = gate + gate_up_bias[:, None, 0], up + gate_up_bias[:, None, 1]
    if form == "clamped":
        free_gate, free_up, steepness = gate <= 7, np.abs(up) <= 7, 1.702
        gate, up = np.minimum(gate, 7), np.maximum(np.minimum(up, 7), -7) + 1
    sigmoid = 1 / (1 + np.exp(-steepness * gate))
    hidden = gate * sigmoid * up
    outputs = np.einsum("enf,efd->end", hidden, down)
    if biases[1] is not None:
        outputs = outputs + down_bias[:, None, :]
    mixture = np.einsum("ne,end->nd", combine, outputs)
    if cotangent is None:
        return mixture
    d_combine = np.einsum("nd,end->ne", cotangent, outputs)
    d_outputs = combine.T[:, :, None] * cotangent[None]
    d_hidden = np.einsum("end,efd->enf", d_outputs, down)
    d_gate = free_gate * d_hidden * up * sigmoid * (1 + steepness * gate * (1 - sigmoid))
    d_up = free_up * d_hidden * gate * sigmoid
    gradients = (
        np.einsum("enf,edf->nd", d_gate, gate_kernel) + np.einsum("enf,edf->nd", d_up, up_kernel),
        np.take_along_axis(d_combine, np.asarray(expert_ids), axis=1),
        Experts(
            gate_up=np.stack([np.einsum("nd,enf->edf", x, d_gate), np.einsum("nd,enf->edf", x, d_up)], axis=2),
            down=np.einsum("enf,end->efd", hidden, d_outputs),
            gate_up_bias=None if biases[0] is None else np.stack([d_gate.sum(axis=1), d_up.sum(axis=1)], axis=1),
            down_bias=None if biases[1] is None else d_outputs.sum(axis=1),
        ),
    )
    return mixture, gradients


def random_inputs(n, k, e, seed=0, form="silu"):
    """x, weights, distinct expert ids of each token, parameters, and a cotangent of the output.

    Those of "clamped" have biases, and projections that are often beyond the limits.
    """
    rng = np.random.default_rng([n, k, e, seed])
    expert_ids = rng.permuted(np.tile(np.arange(e, dtype=np.int32), (n, 1)), axis=1)[:, :k]
    shapes = ((n, HIDDEN), (n, k), (e, HIDDEN, 2, EXPERT_SIZE), (e, EXPERT_SIZE, HIDDEN), (n, HIDDEN))
    scales = (1, 1, HIDDEN**-0.5, EXPERT_SIZE**-0.5, 1)
    x, weights, gate_up, down, cotangent = (
        (scale * rng.normal(size=shape)).astype(np.float32) for shape, scale in zip(shapes, scales, strict=True)
    )
    parameters = Experts(gate_up, down)
    if form == "clamped":
        biases = (rng.normal(size=shape).astype(np.float32) for shape in ((e, 2, EXPERT_SIZE), (e, HIDDEN)))
        parameters = Experts(4 * gate_up, down, *biases)
    return x, weights, expert_ids, parameters, cotangent


def value_and_gradients(x, weights, expert_ids, parameters, cotangent, form="silu"):
    def run(x, weights, parameters):
        return experts.run_experts(x, weights, expert_ids, parameters, form)

    value, vjp = jax.vjp(run, x, weights, parameters)
    return value, vjp(cotangent)


compiled_value_and_gradients = jax.jit(value_and_gradients, static_argnames="form")
SORTS = {
    "sorted": jax.jit(experts.sort_assignments, static_argnames="num_experts"),
    "counted": jax.jit(experts._rank_assignments, static_argnames="num_experts"),
}


def assert_near(actual, expected, tolerance=1e-5):
    """The largest error, relative to the largest entry."""
    assert actual.shape == expected.shape
    error = np.max(np.abs(np.asarray(actual, np.float64) - expected))
    assert error <= tolerance * np.max(np.abs(expected)), error


def assert_matches_oracle(actual, inputs, tolerance=1e-5, form="silu"):
    expected = dense_experts(*inputs, form=form)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for found, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_near(found, wanted, tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_oracle_gradients_agree_with_differences(form):
    *arrays, expert_ids, parameters, cotangent = random_inputs(4, 2, 3, form=form)
    _, gradients = dense_experts(*arrays, expert_ids, parameters, cotangent, form)
    leaves, structure = jax.tree.flatten((*arrays, parameters))
    for index, gradient in enumerate(jax.tree.leaves(gradients)):
        direction = np.random.default_rng(1).normal(size=gradient.shape)
        values = []
        for step in (1e-5, -1e-5):
            moved = [leaf + step * direction if place == index else leaf for place, leaf in enumerate(leaves)]
            x, weights, moved_parameters = structure.unflatten(moved)
            mixture = dense_experts(x, weights, expert_ids, moved_parameters, form=form)
            values.append(np.sum(mixture * cotangent))
        np.testing.assert_allclose(np.sum(gradient * direction), (values[0] - values[1]) / 2e-5, rtol=1e-7)


def test_activations_are_clamped_as_in_gpt_oss():
    gate, up = np.array([-300.0, -2, 0, 6.9, 7, 7.1, 3, 3, 3]), np.array([1.0, 2, 3, 4, 5, 6, 7, -7.1, 80])
    within_gate, within_up = np.array([1, 1, 1, 1, 1, 0, 1, 1, 1.0]), np.array([1, 1, 1, 1, 1, 1, 1, 0, 0.0])
    clamped_gate, clamped_up = np.minimum(gate, 7), np.clip(up, -7, 7)
    sigmoid = 1 / (1 + np.exp(-1.702 * clamped_gate))
    value, vjp = jax.vjp(functools.partial(experts.activate, activation="clamped"), *map(jnp.float32, (gate, up)))
    np.testing.assert_allclose(value, (clamped_up + 1) * clamped_gate * sigmoid, rtol=1e-6, atol=1e-30)
    of_gate, of_up = vjp(jnp.ones(9))
    slope = sigmoid * (1 + 1.702 * clamped_gate * (1 - sigmoid))
    np.testing.assert_allclose(of_gate, within_gate * (clamped_up + 1) * slope, rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(of_up, within_up * clamped_gate * sigmoid, rtol=1e-6, atol=1e-30)


def test_an_activation_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="activation must be 'silu' or 'clamped', got 'relu'"):
        experts.activate(jnp.ones(2), jnp.ones(2), "relu")


CASES = [(1, 2, 4, "silu"), (7, 3, 3, "silu"), (70, 1, 3, "silu"), (150, 2, 5, "silu"), (150, 2, 5, "clamped")]


@pytest.mark.parametrize(("n", "k", "e", "form"), CASES, ids=str)
def test_value_and_gradients_match_the_dense_mixture(n, k, e, form):
    inputs = random_inputs(n, k, e, form=form)
    assert_matches_oracle(compiled_value_and_gradients(*inputs, form=form), inputs, form=form)


@pytest.mark.parametrize(("n", "k", "e", "form"), [CASES[0], CASES[1], CASES[3], CASES[4]], ids=str)
def test_the_sorted_path_matches_the_dense_mixture(n, k, e, form):
    inputs = random_inputs(n, k, e, form=form)
    with lowering_for(WAYS["sorted"]):
        found = compiled_value_and_gradients(*inputs, form=form)
    assert_matches_oracle(found, inputs, form=form)


def test_the_inputs_of_clamped_experts_are_clamped_and_free():
    x, _, _, parameters, _ = random_inputs(150, 2, 5, form="clamped")
    projected = np.einsum("nd,edcf->necf", x, parameters.gate_up) + parameters.gate_up_bias[None]
    gate, up = projected[:, :, 0], projected[:, :, 1]
    for beyond in (gate > 7, up > 7, up < -7):
        assert 0.01 < np.mean(beyond) < 0.2


@pytest.mark.parametrize("expert", [0, 1, 2])
def test_all_tokens_to_one_expert(expert):
    x, weights, _, *rest = random_inputs(70, 1, 3)
    inputs = (x, weights, np.full((70, 1), expert, np.int32), *rest)
    value, gradients = compiled_value_and_gradients(*inputs)
    assert_matches_oracle((value, gradients), inputs)
    others = [other for other in range(3) if other != expert]
    for gradient in jax.tree.leaves(gradients[2]):
        assert np.all(np.asarray(gradient)[others] == 0) and np.any(np.asarray(gradient)[expert] != 0)


@pytest.mark.parametrize("form", FORMS)
def test_assignments_without_a_place_count_like_the_others(form):
    """Two experts get nearly all tokens, several times what they have places for."""
    x, weights, _, parameters, cotangent = random_inputs(150, 2, 5, form=form)
    expert_ids = random_routes(150, 2, 5)[1]
    counts = np.bincount(expert_ids.reshape(-1), minlength=5)
    assert counts.max() > 1.9 * experts._places_of_each(300, 5) and counts.min() < 30
    inputs = (x, weights, expert_ids, parameters, cotangent)
    assert_matches_oracle(compiled_value_and_gradients(*inputs, form=form), inputs, form=form)


def unspecified_beyond_the_groups(rows, weights, group_sizes):
    """`grouped_matmul` as on a TPU: what it leaves in rows of no group may be NaN, and so may their gradient."""
    own = (jnp.arange(rows.shape[0]) < jnp.sum(group_sizes))[:, None]

    @jax.custom_vjp
    def spoil_gradient(rows):
        return rows

    spoil_gradient.defvjp(lambda rows: (rows, None), lambda _, gradient: (jnp.where(own, gradient, jnp.nan),))
    return jnp.where(own, block_matmul(spoil_gradient(rows), weights, group_sizes), jnp.nan)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_an_assignment_to_no_expert_adds_nothing_and_has_no_gradient(monkeypatch, way, form):
    """The id E stands for no expert, as for an expert on another device: like weight 0, also in the gradient."""
    x, weights, expert_ids, parameters, cotangent = random_inputs(150, 2, 5, form=form)
    monkeypatch.setattr(experts, "grouped_matmul", unspecified_beyond_the_groups)
    run = jax.jit(lambda *inputs, form: value_and_gradients(*inputs, form=form), static_argnames="form")
    for share in (0.3, 1.0):
        nobody = np.random.default_rng(0).uniform(size=expert_ids.shape) < share
        ids = np.where(nobody, 5, expert_ids).astype(np.int32)
        with lowering_for(WAYS[way]):
            found = run(x, weights, ids, parameters, cotangent, form=form)
        weightless = (x, np.where(nobody, 0, weights), expert_ids, parameters, cotangent)
        expected, (of_x, of_weights, of_parameters) = dense_experts(*weightless, form=form)
        expected = (expected, (of_x, np.where(nobody, 0, of_weights), of_parameters))
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert_near(one, other)


@pytest.mark.parametrize("unused", [0, 2, 4])
def test_an_expert_without_tokens_is_not_touched(unused):
    x, weights, _, parameters, cotangent = random_inputs(150, 2, 5)
    used = np.array([expert for expert in range(5) if expert != unused], np.int32)
    expert_ids = used[random_inputs(150, 2, 4)[2]]
    inputs = (x, weights, expert_ids, parameters, cotangent)
    value, gradients = compiled_value_and_gradients(*inputs)
    assert_matches_oracle((value, gradients), inputs)

    poisoned = jax.tree.map(np.copy, parameters)
    for array in jax.tree.leaves(poisoned):
        array[unused] = np.nan
    poisoned_value, poisoned_gradients = compiled_value_and_gradients(x, weights, expert_ids, poisoned, cotangent)
    np.testing.assert_array_equal(poisoned_value, value)
    for gradient, clean in zip(jax.tree.leaves(poisoned_gradients), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_array_equal(gradient, clean)
    for gradient in jax.tree.leaves(poisoned_gradients[2]):
        assert np.all(np.asarray(gradient)[unused] == 0)


def test_a_token_of_weight_zero_still_has_a_gradient_in_its_weight():
    x, weights, *rest = random_inputs(150, 2, 5)
    inputs = (x, np.zeros_like(weights), *rest)
    value, gradients = compiled_value_and_gradients(*inputs)
    np.testing.assert_array_equal(value, 0)
    assert_near(gradients[1], dense_experts(*inputs)[1][1])


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_stays_bfloat16(form):
    x, weights, expert_ids, *rest = random_inputs(40, 2, 4, form=form)
    rounded = jax.tree.map(lambda array: jnp.asarray(array, jnp.bfloat16), (x, weights, *rest))
    actual = compiled_value_and_gradients(*rounded[:2], expert_ids, *rounded[2:], form=form)
    assert all(array.dtype == jnp.bfloat16 for array in jax.tree.leaves(actual))
    exact = jax.tree.map(lambda array: np.asarray(array, np.float64), rounded)
    assert_matches_oracle(actual, (*exact[:2], expert_ids, *exact[2:]), tolerance=2**-6, form=form)


def test_inside_a_scan_over_recomputed_layers():
    layers = [random_inputs(9, 2, 4, seed) for seed in range(3)]
    x, cotangent = layers[0][0], layers[0][4]
    weights, expert_ids, parameters = jax.tree.map(lambda *leaves: np.stack(leaves), *(layer[1:4] for layer in layers))

    def body(x, layer):
        return x + experts.run_experts(x, *layer), None

    @jax.jit
    def run(x, weights, expert_ids, parameters, cotangent):
        def forward(x, weights, parameters):
            return jax.lax.scan(jax.checkpoint(body), x, (weights, expert_ids, parameters))[0]

        value, vjp = jax.vjp(forward, x, weights, parameters)
        return value, vjp(cotangent)

    value, gradients = run(x, weights, expert_ids, parameters, cotangent)
    inputs = [np.asarray(x, np.float64)]
    for layer in layers:
        inputs.append(inputs[-1] + dense_experts(inputs[-1], *layer[1:4]))
    assert_near(value, inputs[-1])
    d_x, expected = np.asarray(cotangent, np.float64), []
    for layer, layer_x in reversed(list(zip(layers, inputs[:-1], strict=True))):
        _, (through, *rest) = dense_experts(layer_x, *layer[1:4], d_x)
        d_x = d_x + through
        expected.insert(0, rest)
    assert_near(gradients[0], d_x)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *expected)
    for gradient, of_layers in zip(jax.tree.leaves(gradients[1:]), jax.tree.leaves(stacked), strict=True):
        assert_near(gradient, of_layers)


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
        import functools, jax, jax.numpy as jnp, numpy as np
        from jax.sharding import PartitionSpec as P
        from models import experts
        from models.experts import Experts

        rng = np.random.default_rng(0)
        shapes = (16, 6), (16, 2), (3, 6, 2, 5), (3, 5, 6), (16, 6)
        x, weights, *parameters, cotangent = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
        parameters = Experts(*parameters)
        expert_ids = jnp.asarray(rng.integers(0, 3, (16, 2)), jnp.int32)
        mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        rows, all = P("data"), P()

        def check(run_experts):
            sharded = jax.shard_map(
                run_experts, mesh=mesh, in_specs=(rows, rows, rows, all), out_specs=rows, check_vma=False
            )

            def value_and_gradients(run):
                value, vjp = jax.vjp(lambda x, w, p: run(x, w, expert_ids, p), x, weights, parameters)
                return jax.tree.leaves((value, vjp(cotangent)))

            expected, actual = (jax.jit(value_and_gradients, static_argnums=0)(f) for f in (run_experts, sharded))
            assert len(actual[0].sharding.device_set) == 4
            for one, other in zip(expected, actual, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)

        check(experts.run_experts)
        check(functools.partial(experts.run_experts_sorted, activation="silu"))
        print("equal")
    """)
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout == "equal\n", result.stderr


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_experts_of_a_layer_are_read_from_the_stack(way, form):
    """Few tokens, so that most experts have none, and one of no expert."""
    layers = [random_inputs(3, 2, 6, seed, form)[3] for seed in range(3)]
    stacks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x, weights, *_ = random_inputs(3, 2, 6, 3)
    expert_ids = jnp.asarray([[4, 1], [4, 6], [1, 4]], jnp.int32)
    known = np.array([[4, 1], [4, 0], [1, 4]]), weights * np.array([[1, 1], [1, 0], [1, 1]])
    run = jax.jit(functools.partial(experts.run_experts_of_layer, activation=form))
    with lowering_for(WAYS[way]):
        for layer, parameters in enumerate(layers):
            expected = dense_experts(x, known[1], known[0], parameters, form=form)
            assert_near(run(x, weights, expert_ids, stacks, jnp.int32(layer)), expected)
        in_bfloat16 = run(*(jnp.asarray(a, jnp.bfloat16) for a in (x, weights)), expert_ids, stacks, jnp.int32(2))
    assert in_bfloat16.dtype == jnp.bfloat16
    assert_near(in_bfloat16, expected, 2**-6)
