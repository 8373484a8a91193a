"""Options of training that only a model with routers can show, each in a small run of the command in this process."""

import math

import pytest
from support.commands import SMALL, flags, run_training

from rspo_jax.records import read_diagnostics, read_metrics

pytestmark = pytest.mark.slow

FLAGS = flags(
    SMALL,
    model__num_layers=2,
    prompts=8,
    group_size=4,
    micro_batches=2,
    epochs=2,  # whichever mini-batch learns first, the routers have moved when the second epoch begins
    steps=2,
    warm_start__steps=0,
    optimizer__warmup_updates=0,
    optimizer__learning_rate=1e-2,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function that trains with some options, and returns the run's folder and the rows of its two steps."""
    folder = tmp_path_factory.mktemp("options")

    def train(*options):
        run_dir = folder / f"run{len(list(folder.iterdir()))}"
        said = run_training("--run-dir", run_dir, "--data-dir", folder / "data", *FLAGS, *options)
        assert said.code == 0, said
        rows = read_metrics(run_dir)[-2:]
        for row in rows:
            assert row["skipped_updates"] == 0 and row["grad_norm"] > 0
            assert all(math.isfinite(value) for name, value in row.items() if name != "phase"), row
        return run_dir, rows

    return train


@pytest.fixture(scope="module")
def free(run):
    """The rows of a run without any option."""
    return run()[1]


def test_routes_move_where_nothing_holds_them(free):
    assert free[0]["gamma_mean"] < 1 and free[0]["route_stays"] < 1
    assert all(abs(row["sampler_kl"]) < 1e-6 for row in free)


@pytest.mark.parametrize("routing", ["copy", "replay_trainer", "replay_sampler"])
def test_routes_that_are_held(run, free, routing):
    _, rows = run("--routing", routing)
    assert all(row["overlap"] == row["route_stays"] == 1 for row in rows)  # of the experts used
    assert all(row["gamma_mean"] < 1 for row in rows)  # the routers would have moved
    assert rows[0]["reward"] == free[0]["reward"] and rows[0]["grad_norm"] != free[0]["grad_norm"]


def test_everything_that_can_be_added_to_the_loss(run, free):
    options = {"kl": 0.1, "entropy": 0.01, "load-balance": 0.05, "router-z": 0.01}
    added = [part for name, value in options.items() for part in (f"--regularizers.{name}-coefficient", value)]
    _, rows = run(*added, "--correction.kind", "tis")
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
def test_ways_for_the_router_shift_to_enter(run, free, options):
    run_dir, rows = run(*options)
    assert rows[1]["grad_norm"] != free[1]["grad_norm"]
    arrays = read_diagnostics(run_dir)
    assert [row["layer_drift"].shape for row in arrays] == [(2,), (2,)]
    assert arrays[0]["expert_load"].shape == (2, 4)
