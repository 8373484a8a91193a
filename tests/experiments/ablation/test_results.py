"""The table of a study, the results in it and its figures. Runs are written by hand."""

import dataclasses
import gzip
import io
import json

import matplotlib.image
import numpy as np
import pytest
from etils import epath

from experiments.ablation.grid import choose, vary
from experiments.ablation.results import Results, collapse_rate, describe_study, summarize_study
from experiments.ablation.study import Study, Style, plan_study
from experiments.ablation.table import MOST_STEPS, Table, finished_rows, read_table, run_row, with_factors, write_table
from experiments.config import CountdownRun
from experiments.reporting.study_figures import (
    CollapseRates,
    FinalScores,
    Improvement,
    LearningCurves,
    MeansOfSteps,
    Sensitivity,
)

GRID = choose("method", {"gmpo": {"objective.objective": "gmpo"}, "rspo": {"objective.objective": "rspo"}})
GRID *= vary("updates", "trainer.mini_batches", 4, 16)
GRID += vary("floor", "objective.gamma_min", 0.5).with_seeds(0, 1) * choose("method", {"rspo": {}})
FIGURES = (
    LearningCurves("curves", panels="updates", metric="reward"),
    LearningCurves("ratios", panels="updates", metric="ratio_max", log=True),
    FinalScores("scores", panels="updates"),
    FinalScores("one_panel", where={"updates": 16}, title="One panel"),
    CollapseRates("collapses", panels="updates"),
    Improvement("improvement", panels="updates", pairs=(("rspo", "gmpo"),)),
    Improvement("improvement_at_16", where={"updates": 16}, pairs=(("rspo", "gmpo"), ("gmpo", "rspo"))),
    Sensitivity("updates", factor="updates", lines="method", log=True),
    Sensitivity("floor", factor="floor", where={"method": "rspo", "updates": (4, 16)}),
)
STUDY = Study(
    "a_study",
    CountdownRun(),
    GRID,
    seeds=(0, 1, 2),
    warm_starts=0,
    defaults={"floor": 0.8, "updates": 16},
    figures=FIGURES,
    labels={"rspo": "RSPO"},
    styles={"gmpo": Style("#0072B2", dashed=True)},
)
PLAN = plan_study(STUDY)


def table(steps=20, score=lambda run: 0.5, **more):
    """Return a table of the plan's runs, all of them done."""
    result = Table({}, {})
    rng = np.random.default_rng(0)
    for run in PLAN.runs:
        row = run_row(run, "done", test_sampled=score(run), start_test_sampled=0.3, collapsed=False, seconds=10.0)
        result.runs[run.name] = row | more
        result.steps[run.name] = [
            run_row(run, "done", step=step, reward=float(rng.random()), ratio_max=float(np.exp(rng.normal())))
            for step in range(steps)
        ]
    return result


def results(of):
    return Results(STUDY, PLAN, of)


def described(of, **more):
    """Return the lines that describe the results of a table, with more entries of the summary."""
    return describe_study(summarize_study(results(of)) | more).splitlines()


# --- the table ---


def test_a_table_is_read_as_it_was_written(tmp_path):
    folder, order = epath.Path(tmp_path), [run.name for run in PLAN.runs]
    written = table()
    write_table(folder, written, order)
    read = read_table(folder)
    assert (read.runs, read.steps) == (written.runs, written.steps)
    assert list(read.runs) == order
    before = (tmp_path / "steps.jsonl.gz").read_bytes()
    write_table(folder, read, order)
    assert (tmp_path / "steps.jsonl.gz").read_bytes() == before


def test_runs_of_before_a_factor_have_its_default():
    grown = plan_study(
        dataclasses.replace(
            STUDY,
            grid=GRID + choose("method", {"rspo": {}}) * vary("clip", "objective.clip_high", 0.2),
            defaults=dict(STUDY.defaults) | {"clip": 0.4},
        )
    )
    old = table()
    assert "clip" not in old.runs["method=rspo,updates=4,seed=0"]
    old.runs["of an older study"] = {"run": "of an older study", "state": "done"}
    new = with_factors(old, grown)
    assert new.runs["method=rspo,updates=4,seed=0"] == old.runs["method=rspo,updates=4,seed=0"] | {"clip": 0.4}
    assert {row["clip"] for row in new.steps["method=rspo,updates=4,seed=0"]} == {0.4}
    assert new.runs["of an older study"] == old.runs["of an older study"]


def test_there_may_be_no_table_yet(tmp_path):
    assert read_table(epath.Path(tmp_path)) == Table({}, {})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("runs.jsonl", b'{"run": "a", '),
        ("runs.jsonl", b'{"seed": 1}\n'),
        ("steps.jsonl.gz", b"not compressed"),
        ("steps.jsonl.gz", gzip.compress(b'{"run": "a"}\n' * 100, mtime=0)[:-10]),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, name, content):
    write_table(epath.Path(tmp_path), table(), [run.name for run in PLAN.runs])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"the table in .* is damaged"):
        read_table(epath.Path(tmp_path))


def test_a_table_takes_ten_kilobytes_a_run(tmp_path):
    study = dataclasses.replace(STUDY, seeds=tuple(range(4)))
    runs = plan_study(study).runs
    assert len(runs) == 18
    rng = np.random.default_rng(0)
    # A task has solve rates, or else mean rewards.
    metrics = [name for name in study.metrics if not name.endswith("_reward")]
    big = Table({}, {})
    for run in runs:
        big.runs[run.name] = run_row(run, "done")
        values = rng.random((101, len(metrics))).round(5).tolist()
        big.steps[run.name] = [
            {"run": run.name, "seed": run.seed, "step": step} | dict(zip(metrics, row, strict=True))
            for step, row in enumerate(values)
        ]
    write_table(epath.Path(tmp_path), big, [run.name for run in runs])
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 10_000 * len(runs)


def write_run(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps({"wall_seconds": 12.3456789}))


def test_the_rows_of_a_finished_run(tmp_path):
    rewards = [0.4] * 30 + [0.05] * 30
    rows = [{"phase": "warm_start", "step": 1, "loss": 2.0}]
    rows += [{"phase": "rl", "step": 0, "eval_sampled": 0.31, "test_sampled": 0.3, "test_sampled_low": 0.25}]
    for step, reward in enumerate(rewards, 1):
        rows.append({"phase": "rl", "step": step, "reward": reward, "step_seconds": step / 10, "unknown": 3.0})
        rows[-1]["solve_rate"] = step / 100
    rows[20] |= {"eval_sampled": 0.45678912, "skipped_updates": 2.0}
    rows[-1] |= {"eval_sampled": 0.1, "test_sampled": 0.08, "reward": None}
    write_run(tmp_path, rows)
    row, steps = finished_rows(STUDY, PLAN.runs[0], epath.Path(tmp_path))
    assert row == {
        "run": "method=gmpo,updates=4,seed=0",
        "method": "gmpo",
        "updates": 4,
        "floor": 0.8,
        "seed": 0,
        "state": "done",
        "start_eval_sampled": 0.31,
        "start_test_sampled": 0.3,
        "start_test_sampled_low": 0.25,
        "eval_sampled": 0.1,
        "test_sampled": 0.08,
        "best_eval_sampled": 0.45679,
        "late_solve_rate": 0.555,
        "collapsed": True,
        "collapse_step": row["collapse_step"],
        "alarm_step": None,
        "steps": 60,
        "skipped_updates": 2,
        "seconds": 12.346,
        "step_seconds": 3.05,
    }
    assert 31 <= row["collapse_step"] <= 40
    assert [step["step"] for step in steps] == list(range(61))
    assert steps[1] == {
        "run": "method=gmpo,updates=4,seed=0",
        "method": "gmpo",
        "updates": 4,
        "floor": 0.8,
        "seed": 0,
        "step": 1,
        "reward": 0.4,
        "solve_rate": 0.01,
    }
    assert steps[-1]["reward"] is None


def test_a_long_run_is_thinned_and_keeps_its_evaluations(tmp_path):
    rows = [{"phase": "rl", "step": step, "reward": 0.1} for step in range(1001)]
    for step in (0, 333, 1000):
        rows[step] |= {"eval_sampled": 0.2, "test_sampled": 0.2}
    write_run(tmp_path, rows)
    _, steps = finished_rows(STUDY, PLAN.runs[0], epath.Path(tmp_path))
    assert len(steps) <= MOST_STEPS + 3
    assert [step["step"] for step in steps if "eval_sampled" in step] == [0, 333, 1000]


# --- what is compared ---


def test_factors_that_are_not_named_are_at_their_default():
    rows = results(table()).runs(("method",), {})
    assert [row["run"] for row in rows] == [
        f"method={m},updates=16,seed={s}" for s in range(3) for m in ("gmpo", "rspo")
    ]
    rows = results(table()).runs(("floor",), {"method": "rspo"})
    assert {(row["floor"], row["updates"]) for row in rows} == {(0.8, 16), (0.5, 16)}
    rows = results(table()).runs((), {"method": "rspo", "updates": (4, 16)})
    assert {(row["floor"], row["updates"]) for row in rows} == {(0.8, 4), (0.8, 16)}


def test_numeric_levels_are_in_order_and_others_as_declared():
    everything = results(table())
    rows = everything.runs(("floor", "updates", "method"), {})
    assert everything.levels("floor", rows) == [0.5, 0.8]
    assert everything.levels("method", rows) == ["gmpo", "rspo"]


def test_scores_leave_out_what_is_not_done_or_not_finite():
    of = table(score=lambda run: run.seed / 10)
    first, second, third = (f"method=rspo,updates=16,seed={seed}" for seed in range(3))
    of.runs[second] |= {"state": "failed"}
    of.runs[third] |= {"test_sampled": None}
    rows = results(of).runs(("method",), {"method": "rspo"})
    assert [row["run"] for row in rows] == [first, third]
    found = results(of).score(rows)
    assert found is not None
    assert (found.value, found.runs) == (0.0, 1)
    assert results(of).score([]) is None


def test_the_summary():
    of = table(score=lambda run: 0.1 * run.seed + 0.3 * (run.factors["method"] == "rspo"))
    of.runs["method=gmpo,updates=4,seed=1"] |= {"collapsed": True}
    of.runs["method=gmpo,updates=4,seed=2"] = run_row(PLAN.runs[0], "failed", exit_codes=[1, 1, 1])
    del of.runs["method=rspo,updates=16,seed=2"]
    summary = summarize_study(results(of))
    assert summary["states"] == {"done": 12, "failed": 1, "waiting": 1}
    cells = {cell["cell"]: cell for cell in summary["cells"]}
    assert len(cells) == 5
    broken = cells["method=gmpo,updates=4"]
    assert (broken["runs"], broken["done"], broken["failed"], broken["collapse_rate"]) == (3, 2, 1, 0.5)
    assert broken["score"] == pytest.approx(0.05)
    assert cells["method=gmpo,updates=16"]["score"] == pytest.approx(0.1)
    text = describe_study(summary)
    assert "method=gmpo,updates=4     2/3     5.0 % [  0.0,  10.0]" in text
    alone = describe_study({"score": "reward", "cells": [broken | {"done": 1}]})
    assert "5.0 % " in alone and "10.0]" not in alone
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_comparisons_are_over_strata_and_seeds():
    of = table(score=lambda run: 0.1 * run.seed + 0.05 * (run.factors["method"] == "rspo"))
    numbers = FIGURES[5].comparisons(results(of))
    assert [(row["first"], row["second"], row.get("updates")) for row in numbers] == [
        ("rspo", "gmpo", 4),
        ("rspo", "gmpo", 16),
        ("rspo", "gmpo", None),
    ]
    for row in numbers:
        assert row["probability"] == pytest.approx(6 / 9)
        assert row["difference"] == pytest.approx(0.05)
        assert row["difference_interval"] == pytest.approx([0.05, 0.05])
    nothing = {"first": "a", "second": "b", "probability": None, "difference": None}
    lines = described(of, comparisons={"ours": numbers, "empty": [nothing]})
    assert lines[-7].startswith("ours ") and lines[-1].split() == ["a", "over", "b,", "all", "together", "–", "–"]
    for line, where in zip(lines[-6:-3], ("4", "16", "all together"), strict=True):
        assert line.startswith(f"rspo over gmpo, {where} ")
        assert "0.67 [" in line and line.endswith(" +5.0 points [+5.0, +5.0]")


def test_curves_end_at_the_mean_of_their_last_steps():
    of = table(steps=20)
    first, second, third = (f"method=rspo,updates=16,seed={seed}" for seed in range(3))
    for seed, name in enumerate((first, second, third)):
        for step in of.steps[name]:
            step |= {"reward": float(seed if step["step"] >= 10 else 100), "ratio_max": float(np.exp(seed))}
    of.steps[second][15] |= {"reward": None}  # it was not finite
    for step in of.steps["method=gmpo,updates=4,seed=0"]:
        del step["reward"]
    endings = FIGURES[0].means(results(of))
    assert [(one["line"], one["panel"]) for one in endings] == [
        ("gmpo", 4),
        ("rspo", 4),
        ("gmpo", 16),
        ("rspo", 16),
    ]
    assert endings[3]["mean"] == pytest.approx(1.0)
    assert endings[3]["mean_interval"] == pytest.approx([0.0, 2.0])
    logarithmic = FIGURES[1].means(results(of))
    assert logarithmic[3]["mean"] == pytest.approx(np.e)  # a geometric mean
    assert logarithmic[3]["mean_interval"] == pytest.approx([1.0, np.e**2])
    for step in of.steps[first] + of.steps[second] + of.steps[third]:
        del step["reward"]
    nothing = FIGURES[0].means(results(of))
    assert nothing[3]["mean"] is None
    lines = described(of, means={"rewards": nothing, "ratios": logarithmic})
    titles = [line.split("  ")[0] for line in lines[-7:]]
    assert titles == [
        "rewards: reward in the last 10 steps, 95 %",
        "gmpo",
        "rspo",
        "",
        "ratios: ratio_max in the last 10 steps, 95 %",
        "gmpo",
        "rspo",
    ]
    assert lines[-5].endswith(" –") and lines[-1].endswith(" 2.718 [1, 7.389]")


def test_another_score_than_the_studys_is_in_the_summary_too():
    of = table(test_greedy=0.4, start_test_greedy=0.25)
    figure = FinalScores("greedy", panels="updates", metric="test_greedy")
    means = figure.means(results(of))
    assert [(one["line"], one["panel"], one["mean"]) for one in means] == [
        ("gmpo", 4, pytest.approx(0.4)),
        ("rspo", 4, pytest.approx(0.4)),
        ("before training", 4, pytest.approx(0.25)),
        ("gmpo", 16, pytest.approx(0.4)),
        ("rspo", 16, pytest.approx(0.4)),
        ("before training", 16, pytest.approx(0.25)),
    ]
    assert figure.draw(results(of)) is not None
    assert FIGURES[2].means(results(of)) == []  # the summary has the study's score for each cell


def test_several_metrics_have_their_means_over_all_steps():
    of = table(steps=20)
    for seed in range(3):
        for step in of.steps[f"method=rspo,updates=16,seed={seed}"]:
            step |= {"reward": float(seed), "late": 4.0 if step["step"] == 19 else None}
    figure = MeansOfSteps("both", metrics=("reward", "late"), where={"method": "rspo"}, panels="updates", what="of two")
    means = figure.means(results(of))
    assert [(one["line"], one["panel"]) for one in means] == [("reward", 4), ("late", 4), ("reward", 16), ("late", 16)]
    assert [one["mean"] for one in means[1:]] == [None, pytest.approx(1.0), 4.0]
    assert means[2]["mean_interval"] == pytest.approx([0.0, 2.0])
    assert described(of, means={"both": means})[-3].startswith("both: of two, 95 %")
    pixels = matplotlib.image.imread(io.BytesIO(figure.draw(results(of))))
    assert np.ptp(pixels[..., :3]) > 0.5


def test_there_is_no_collapse_rate_without_runs():
    assert collapse_rate([]) is None
    rate = collapse_rate([{"collapsed": True}, {"collapsed": False}])
    assert rate is not None
    assert rate.value == 0.5


# --- what is drawn ---


def odd(of):
    """Return the table with most of the oddities that a table can have."""
    rows = list(of.runs.values())
    rows[0]["test_sampled"] = None
    rows[1]["collapsed"] = True
    of.runs.pop(rows[2]["run"])
    for step in of.steps[rows[3]["run"]]:
        step["reward"], step["ratio_max"] = None, 0.0
    return of


CASES = [(figure, odd(table())) for figure in FIGURES] + [(FIGURES[0], table(steps=60)), (FIGURES[1], table(steps=60))]


@pytest.mark.parametrize(("figure", "of"), CASES, ids=lambda case: getattr(case, "name", ""))
def test_figures_are_drawn_without_a_warning(figure, of, tmp_path):
    picture = figure.draw(results(of))
    assert picture is not None
    assert len(picture) < 150_000
    (tmp_path / "a.png").write_bytes(picture)
    pixels = matplotlib.image.imread(tmp_path / "a.png")
    assert pixels.shape[0] > 150
    assert pixels.shape[1] > 500
    assert 0.001 < np.mean(pixels[..., :3].min(axis=-1) < 0.9) < 0.5


def test_the_same_table_gives_the_same_picture():
    assert FIGURES[3].draw(results(table())) == FIGURES[3].draw(results(table()))


def test_nothing_is_drawn_while_nothing_is_done():
    for figure in FIGURES:
        assert figure.draw(results(Table({}, {}))) is None
