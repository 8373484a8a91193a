"""The alarm, judged over the tables of a study with runs written by hand."""

import pytest
from etils import epath

from experiments import judge_alarm
from experiments.ablation.table import Table, write_table

QUIET = {
    "reward": 0.5,
    "ratio_max": 1.2,
    "approx_kl": 0.002,
    "clip_fraction": 0.004,
    "entropy": 0.5,
    "drift": 0.01,
}
LOUD = {"approx_kl": 0.2, "drift": 0.2}
STEPS = 40


def rows_of(name, loud_from=None, falls_at=None, not_finite_from=None):
    rows = [{"run": name, "seed": 0, "step": 0, "eval_sampled": 0.4}]
    for step in range(1, STEPS + 1):
        row = {"run": name, "seed": 0, "step": step} | QUIET
        row |= LOUD if loud_from is not None and step >= loud_from else {}
        row |= {"approx_kl": None, "drift": None} if not_finite_from is not None and step >= not_finite_from else {}
        row |= {"reward": 0.0} if falls_at is not None and step >= falls_at else {}
        rows.append(row)
    return rows


MADE = {
    "a": (1, dict(loud_from=5, falls_at=15)),  # rings at 6: both means of five above their levels
    "b": (1, dict(falls_at=15)),
    "c": (2, dict(loud_from=20)),
    "d": (2, {}),
    "e": (2, dict(not_finite_from=10, falls_at=15)),  # rings at 10
}


@pytest.fixture
def folder(tmp_path):
    table = Table({}, {})
    for name, (rate, made) in MADE.items():
        table.runs[name] = {"run": name, "rate": rate, "seed": 0, "state": "done", "steps": STEPS}
        table.steps[name] = rows_of(name, **made)
    table.runs["f"] = {"run": "f", "rate": 3, "seed": 0, "state": "failed"}
    write_table(epath.Path(tmp_path), table, [*MADE, "f"])
    return tmp_path


def test_every_run_is_counted_once(folder, capsys):
    assert judge_alarm.main([str(folder), "--by", "rate", "--collapse.window", "4", "--collapse.stays", "6"]) == 0
    head, one, two, everything = capsys.readouterr().out.splitlines()
    assert "warned before" in head
    # Rewards fall at 15: means of four are 0.375, 0.25 and, at 17, 0.125, below half of the best.
    assert one.split() == ["1", "2", "2", "1", "11", "(11–11)", "1", "0", "0"]
    assert two.split() == ["2", "3", "1", "1", "7", "(7–7)", "0", "1", "1"]
    assert everything.split() == ["all", "5", "3", "2", "9", "(7–11)", "1", "1", "1"]


def test_other_thresholds_can_be_tried(folder, capsys):
    assert judge_alarm.main([str(folder), "--alarm.much-kl", "0.3", "--alarm.least-kl", "0.3"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:4] == ["all", "5", "3", "1"]


def test_steps_that_the_table_does_not_hold_are_not_guessed(folder, capsys):
    table = judge_alarm.read_table(epath.Path(folder))
    table.steps["b"] = table.steps["b"][::2]
    write_table(epath.Path(folder), table, [*MADE, "f"])
    assert judge_alarm.main([str(folder)]) == 2
    assert "does not hold every step of b" in capsys.readouterr().err


def test_an_unknown_factor_is_named(folder, capsys):
    assert judge_alarm.main([str(folder), "--by", "method"]) == 2
    assert "no run has the factor method; there are run, rate" in capsys.readouterr().err


def test_an_impossible_rule_is_refused(folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        judge_alarm.main([str(folder), "--alarm.signs", "9"])
    assert "signs must lie between 1 and 5, got 9" in capsys.readouterr().err


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    assert judge_alarm.main([str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err
