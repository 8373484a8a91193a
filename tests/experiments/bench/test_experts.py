"""The experts' benchmark, on a block small enough for a test: its rows, and that its blocks compute the same."""

import jax
import numpy as np

from experiments.bench import experts as bench_experts

SHAPE = bench_experts.Shape(tokens=12, hidden_size=8, expert_size=4, num_experts=4, experts_per_token=2)


def test_ragged_dot_computes_the_same_block():
    compiled = bench_experts.programs(SHAPE, seed=0, ragged_dot=True)
    assert list(compiled) == ["dense", "experts", "ragged_dot"]
    for direction in ("forward", "forward + backward"):
        ours, theirs = (jax.tree.leaves(compiled[name][direction]()) for name in ("experts", "ragged_dot"))
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_prints_a_row_for_each_shape_direction_and_block(capsys):
    assert bench_experts.main(["--shapes", "12", "8", "4", "4", "2", "--repeats", "2", "--biases"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "dense" in line or "experts" in line]
    assert len([line for line in lines if "│" in line]) == 6
