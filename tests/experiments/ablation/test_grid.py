"""Declared grids, and the runs that a study plans from them. Nothing is run."""

import dataclasses
import itertools
import json

import pytest

from experiments.ablation.grid import Grid, choose, vary
from experiments.ablation.study import Study, change_run, changed_runs, declaration, plan_study
from experiments.config import CountdownRun
from experiments.reporting.study_figures import FinalScores


@dataclasses.dataclass(frozen=True)
class StartingRun(CountdownRun):
    """A run that can begin with the parameters of another."""

    start_from: str | None = None


METHODS = choose("method", {"gmpo": {"objective.objective": "gmpo"}, "rspo": {"objective.objective": "rspo"}})
UPDATES = vary("updates", "trainer.mini_batches", 4, 16)
RATES = vary("rate", "trainer.optimizer.learning_rate", 1e-3, 3e-4)


def study(grid, **options):
    return Study("a_study", StartingRun(), grid, **options)


def names(grid):
    return [cell.name for cell in grid]


# --- grids ---


def test_a_product_has_every_pair_and_all_changes():
    grid = METHODS * UPDATES
    assert names(grid) == [f"method={m},updates={u}" for m, u in itertools.product(("gmpo", "rspo"), (4, 16))]
    assert dict(grid.cells[3].changes) == {"objective.objective": "rspo", "trainer.mini_batches": 16}
    assert len(METHODS * UPDATES * RATES) == 8


def test_a_union_has_what_both_have_once():
    grid = METHODS + vary("updates", "trainer.mini_batches", 8) + METHODS
    assert names(grid) == ["method=gmpo", "method=rspo", "updates=8"]


def test_a_union_joins_seeds():
    grid = METHODS.with_seeds(0, 1) + METHODS.with_seeds(1, 2)
    assert [cell.seeds for cell in grid] == [(0, 1, 2)] * 2


def test_a_product_keeps_the_seeds_of_one_side():
    assert {cell.seeds for cell in METHODS.with_seeds(5) * UPDATES} == {(5,)}
    assert {cell.seeds for cell in METHODS * UPDATES.with_seeds(6)} == {(6,)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: METHODS * METHODS, "both have the factor method"),
        (lambda: UPDATES * vary("other", "trainer.mini_batches", 2), "both have the field trainer.mini_batches"),
        (lambda: METHODS.with_seeds(0) * UPDATES.with_seeds(1), "both have seeds of their own"),
        (lambda: METHODS + METHODS.with_seeds(0), "only once with seeds of its own"),
        (lambda: UPDATES + vary("updates", "trainer.epochs", 4), "two cells are called updates=4"),
        (lambda: vary("seed", "trainer.seed", 1), "a column of that name"),
        (lambda: vary("a factor", "trainer.seed", 1), "'a factor' becomes part of a file's name"),
        (lambda: choose("method", {"a/b": {}}), "'a/b' becomes part of a file's name"),
    ],
)
def test_grids_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- studies ---


def test_a_run_is_the_base_with_the_changes_and_the_seed():
    plan = plan_study(study(METHODS * UPDATES * RATES, seeds=(3, 1)))
    assert len(plan.runs) == 16
    assert [run.seed for run in plan.runs] == [3] * 8 + [1] * 8  # all cells of the first seed come first
    run = next(run for run in plan.runs if run.name == "method=rspo,updates=16,rate=0.0003,seed=1")
    expected = StartingRun()
    optimizer = dataclasses.replace(expected.trainer.optimizer, learning_rate=3e-4)
    trainer = dataclasses.replace(expected.trainer, seed=1, mini_batches=16, optimizer=optimizer)
    assert run.run == dataclasses.replace(expected, trainer=trainer)
    assert run.factors == {"method": "rspo", "updates": 16, "rate": 3e-4}


def test_cells_have_seeds_of_their_own_and_defaults_for_other_factors():
    grid = METHODS + vary("floor", "objective.gamma_min", 0.5).with_seeds(7)
    plan = plan_study(study(grid, seeds=(0, 1), defaults={"floor": 0.8, "method": "rspo"}))
    assert (plan.runs[0].name, plan.runs[0].factors) == ("method=gmpo,seed=0", {"method": "gmpo", "floor": 0.8})
    assert [run.factors for run in plan.runs if run.seed == 7] == [{"method": "rspo", "floor": 0.5}]


def test_all_runs_share_a_warm_start_that_learns_nothing_else():
    plan = plan_study(study(METHODS * UPDATES, seeds=(0, 1, 2)))
    ((name, warm_start),) = plan.warm_starts.items()
    base = StartingRun()
    assert warm_start == dataclasses.replace(base, trainer=dataclasses.replace(base.trainer, steps=0, seed=0))
    assert {run.warm_start for run in plan.runs} == {name}
    started = plan.runs[0].starting_from("folder")
    assert (started.start_from, started.trainer.warm_start.steps) == ("folder", 0)
    assert change_run(started, {"start_from": None, "trainer.warm_start.steps": 150}, "") == plan.runs[0].run


def test_seeds_take_turns_with_several_warm_starts():
    plan = plan_study(study(METHODS, seeds=(0, 1, 2, 3, 4), warm_starts=2))
    assert {(run.seed, run.warm_start) for run in plan.runs} == {(seed, f"warm_start={seed % 2}") for seed in range(5)}
    assert [run.trainer.seed for run in plan.warm_starts.values()] == [0, 1]


def test_another_model_or_warm_start_is_another_warm_start():
    grid = vary("experts", "model.num_experts", 4, 8) + vary("steps", "trainer.warm_start.steps", 100)
    plan = plan_study(study(grid, seeds=(0,)))
    assert [run.model.num_experts for run in plan.warm_starts.values()] == [4, 8, 8]
    assert [run.trainer.warm_start.steps for run in plan.warm_starts.values()] == [150, 150, 100]
    assert [run.warm_start for run in plan.runs] == list(plan.warm_starts)


def test_each_run_makes_its_own_warm_start_where_none_is_shared():
    plan = plan_study(study(METHODS, warm_starts=0))
    assert not plan.warm_starts
    assert {run.warm_start for run in plan.runs} == {None}


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (
            vary("x", "trainer.mini_batch", 4),
            r"x=4,seed=0: there is no field trainer.mini_batch; trainer has .*mini_ba",
        ),
        (vary("x", "nothing.at_all", 4), r"x=4,seed=0: there is no field nothing; a run has .*trainer"),
        (vary("x", "trainer.steps.more", 4), r"x=4,seed=0: trainer.steps has no fields of its own, such as more"),
        (
            vary("x", "trainer.mini_batches", 5),
            r"x=5,seed=0 \(trainer.*512 responses to learn from do not divide into 5",
        ),
        (
            vary("x", "trainer.mini_batches", "4"),
            "x=4,seed=0: trainer.mini_batches cannot be '4': it must be of type int",
        ),
        (vary("x", "trainer.mini_batches", True), "trainer.mini_batches cannot be True: it must be of type int"),
        (
            vary("x", "objective.objective", "ppo"),
            "x=ppo,seed=0: objective.objective cannot be 'ppo': .* one of rspo, gmpo",
        ),
        (vary("x", "trainer.seed", 4), "x=4 changes trainer.seed: leave that to the seeds of the study"),
        (
            vary("x", "trainer.steps", 3, 4) + vary("y", "trainer.steps", 4),
            "y=4,seed=0 and x=4,seed=0 are the same run",
        ),
    ],
)
def test_cells_that_are_refused(grid, message):
    with pytest.raises(ValueError, match=message):
        plan_study(study(grid, seeds=(0,)))


def test_whole_numbers_and_none_are_taken_where_they_fit():
    run = change_run(StartingRun(), {"trainer.optimizer.learning_rate": 1, "trainer.learned_groups": None}, "a cell")
    assert (run.trainer.optimizer.learning_rate, run.trainer.learned_groups) == (1, None)


@pytest.mark.parametrize("order", [1, -1])
def test_a_field_and_a_part_of_it_cannot_both_change(order):
    changes = [("trainer", StartingRun().trainer), ("trainer.steps", 3)][::order]
    with pytest.raises(ValueError, match="is changed both as a whole and in part"):
        change_run(StartingRun(), dict(changes), "a cell")


def test_a_run_that_cannot_begin_with_another():
    @dataclasses.dataclass(frozen=True)
    class Alone:
        trainer: object = StartingRun().trainer

    with pytest.raises(ValueError, match="Alone cannot begin with the parameters of another run: set warm_starts to 0"):
        Study("a_study", Alone(), METHODS)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": ()}, "needs seeds"),
        ({"seeds": (1, 1)}, "each once"),
        ({"warm_starts": -1}, "warm_starts must be 0 or more"),
        ({"figures": (FinalScores("a"),)}, "figure a: no cell has the factor method"),
    ],
)
def test_studies_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        study(UPDATES, **options)


def test_a_figure_names_every_factor_without_a_default():
    with pytest.raises(ValueError, match="figure a: the factor updates has no default"):
        study(METHODS * UPDATES, figures=(FinalScores("a"),))
    study(METHODS * UPDATES, figures=(FinalScores("a"),), defaults={"updates": 4})
    study(METHODS * UPDATES, figures=(FinalScores("a", where={"updates": 4}), FinalScores("b", panels="updates")))


# --- what a name meant before ---


def saved(of):
    return json.loads(json.dumps(declaration(of, plan_study(of))))


def test_a_name_that_means_another_configuration_is_found():
    before, after = study(UPDATES, seeds=(0,)), study(vary("updates", "trainer.epochs", 4) + RATES, seeds=(0,))
    changed = changed_runs(after, plan_study(after), before.base, saved(before))
    assert changed == {"updates=4,seed=0": ["trainer.epochs: 1 -> 4"]}


def test_another_base_is_another_configuration_and_more_cells_are_not():
    before, more = study(UPDATES), study(UPDATES * Grid(METHODS.cells[:1]) + UPDATES)
    assert not changed_runs(more, plan_study(more), before.base, saved(before))
    other = dataclasses.replace(before, base=change_run(before.base, {"trainer.steps": 3}, ""))
    changed = changed_runs(other, plan_study(other), before.base, saved(before))
    assert set(map(tuple, changed.values())) == {("trainer.steps: 90 -> 3",)}
    assert len(changed) == 6
