"""Options of training that only a model with routers can show, each in a small run of the command in this process."""

import math

import jax
import pytest

from experiments import train
from rspo_jax.records import read_diagnostics, read_metrics

pytestmark = pytest.mark.slow

SMALL = {
    "--task.train": 200,
    "--task.validation": 20,
    "--task.test": 20,
    "--model.hidden-size": 16,
    "--model.head-dim": 8,
    "--model.num-heads": 2,
    "--model.num-kv-heads": 1,
    "--model.num-layers": 2,
    "--model.expert-size": 16,
    "--model.num-experts": 4,
    "--model.num-experts-per-token": 2,
    "--steps": 2,
    "--prompts": 5,
    "--group-size": 4,
    "--mini-batches": 2,
    "--micro-batches": 2,
    "--rollout-chunks": 1,
    "--learned-groups": "None",
    "--warm-start.steps": 0,
    "--optimizer.warmup-updates": 0,
    "--optimizer.learning-rate": 3e-3,
    "--overlong-buffer": 11,  # an untrained model earns nothing, but some of its responses are longer than others
    "--evaluation.problems": 20,
}


def run(run_dir, *options):
    """The rows of the two steps."""
    arguments = [str(part) for pair in SMALL.items() for part in pair]
    with jax.numpy_dtype_promotion("standard"):  # Optax promotes
        assert train.main(["countdown", "--run-dir", str(run_dir), *arguments, *options]) == 0
    return read_metrics(run_dir)[-2:]


@pytest.fixture(scope="module")
def free(tmp_path_factory):
    return run(tmp_path_factory.mktemp("free") / "run")


def check(rows):
    for row in rows:
        assert row["skipped_updates"] == 0 and row["grad_norm"] > 0
        assert all(math.isfinite(value) for name, value in row.items() if name != "phase"), row


def test_routes_move_where_nothing_holds_them(free):
    check(free)
    assert free[0]["gamma_mean"] < 1 and free[0]["route_stays"] < 1
    assert all(abs(row["sampler_kl"]) < 1e-6 for row in free)


@pytest.mark.parametrize("routing", ["copy", "replay_trainer", "replay_sampler"])
def test_routes_that_are_held(tmp_path, free, routing):
    rows = run(tmp_path / "run", "--routing", routing)
    check(rows)
    assert all(row["overlap"] == row["route_stays"] == 1 for row in rows)  # of the experts used
    assert all(row["gamma_mean"] < 1 for row in rows)  # the routers would have moved
    assert rows[0]["reward"] == free[0]["reward"] and rows[0]["grad_norm"] != free[0]["grad_norm"]


def test_everything_that_can_be_added_to_the_loss(tmp_path, free):
    options = {"kl": 0.1, "entropy": 0.01, "load-balance": 0.05, "router-z": 0.01}
    flags = [part for name, value in options.items() for part in (f"--regularizers.{name}-coefficient", str(value))]
    rows = run(tmp_path / "run", *flags, "--correction.kind", "tis")
    check(rows)
    assert {"reference_kl", "load_balance_loss", "router_z_loss", "correction_truncated"} <= set(rows[1])
    assert rows[0]["load_balance_loss"] >= 0.9  # 1 is balance
    assert rows[1]["grad_norm"] != free[1]["grad_norm"]


@pytest.mark.parametrize(
    "options",
    [
        ("--gamma-gradient", "True"),
        ("--gamma-use", "mask", "--gamma-min", "0.999"),
        ("--adaptive-shift.rule", "quantile"),
    ],
)
def test_ways_for_the_router_shift_to_enter(tmp_path, free, options):
    rows = run(tmp_path / "run", *options)
    check(rows)
    assert rows[1]["grad_norm"] != free[1]["grad_norm"]
    arrays = read_diagnostics(tmp_path / "run")
    assert [row["layer_drift"].shape for row in arrays] == [(2,), (2,)]
    assert arrays[0]["expert_load"].shape == (2, 4)
