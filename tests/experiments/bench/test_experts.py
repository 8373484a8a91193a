"""The benchmark of experts on a block small enough for a test: its rows, and blocks that compute the same."""

import contextlib
import io

import jax
import numpy as np
import pytest

from experiments.bench import experts as bench_experts


@pytest.fixture(scope="module")
def run():
    """One run of the command with all blocks: its output, and the blocks that it timed."""
    timed, output = [], io.StringIO()
    programs = bench_experts.programs
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(output):
        monkeypatch.setattr(bench_experts, "programs", lambda *sizes: timed.append(programs(*sizes)) or timed[-1])
        sizes = ["--shapes", "12", "8", "4", "4", "2", "--repeats", "2"]
        assert bench_experts.main([*sizes, "--biases", "--ragged-dot"]) == 0
    return output.getvalue(), timed[0]


def test_ragged_dot_computes_the_same_block(run):
    _, compiled = run
    assert list(compiled) == ["dense", "experts", "experts with biases", "ragged_dot"]
    for direction in ("forward", "forward + backward"):
        ours, theirs = (jax.tree.leaves(compiled[name][direction]()) for name in ("experts", "ragged_dot"))
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_prints_a_row_for_each_shape_direction_and_block(run):
    output, compiled = run
    lines = [line for line in output.splitlines() if any(name in line for name in compiled)]
    assert len([line for line in lines if "│" in line]) == 8
