"""The training curves of a run, from records of many odd kinds. Matplotlib's warnings are errors too."""

import functools
import json
import os
import runpy
import sys

import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.reporting import training_curves
from experiments.reporting.training_curves import draw_curves

FLAT = {
    "reward": 0.3,
    "solve_rate": 0.2,
    "entropy": 0.9,
    "gamma_mean": 1.0,
    "gamma_p10": 1.0,
    "gamma_min": 1.0,
    "gamma_floor_fraction": 0.0,
    "clip_fraction": 0.0,
    "clip_fraction_positive": 0.0,
    "clip_fraction_negative": 0.0,
    "ratio_mean": 1.0,
    "ratio_max": 1.0,
}
EVALUATION = {
    "eval_greedy": 0.3,
    "eval_greedy_low": 0.2,
    "eval_greedy_high": 0.4,
    "eval_sampled": 0.25,
    "eval_sampled_low": 0.2,
    "eval_sampled_high": 0.3,
}
TITLES = ["Reward", "Solve rate", "Token entropy", "Router shift γ", "Clip fraction", "Importance ratio"]


def row(step, values, phase="rl"):
    return {"phase": phase, "step": step} | values


def real_rows():
    rng = np.random.default_rng(0)
    rows = [row(step, {"loss": 1 / step}, "warm_start") for step in range(1, 10)]
    rows[3] |= {"eval_greedy": 0.1}
    rows[-1] |= EVALUATION
    for step in range(1, 61):
        noise = dict(zip(FLAT, 0.01 * rng.random(len(FLAT)), strict=True))
        values = {name: FLAT[name] - noise[name] if "gamma_m" in name else FLAT[name] + noise[name] for name in FLAT}
        values["ratio_max"] = float(np.exp(3 * rng.random()))
        rows.append(
            row(
                step,
                values | ({name: value + step / 200 for name, value in EVALUATION.items()} if step % 20 == 0 else {}),
            )
        )
    return rows


STEPS = range(1, 20)
CASES = {
    "real": real_rows(),
    "no_rows": [],
    "one_row": [row(1, FLAT | EVALUATION)],
    "two_rows": [row(1, FLAT), row(2, FLAT | EVALUATION)],
    "only_warm_start": [row(1, {"loss": 2.0}, "warm_start"), row(2, {"loss": 1.0} | EVALUATION, "warm_start")],
    "only_nan": [row(step, dict.fromkeys(FLAT | EVALUATION)) for step in STEPS],
    "constant": [row(step, FLAT) for step in STEPS],
    "few_columns": [
        row(step, {"reward": float(step), "ratio_mean": 0.0, "ratio_max": 0.0, "unknown": 1.0})
        | ({"eval_greedy": 0.1 * step} if step < 4 else {})
        for step in STEPS
    ],
    "gaps": [row(step, FLAT if step % 3 else dict.fromkeys(FLAT)) for step in STEPS],
    "lone_values": [row(step, dict.fromkeys(FLAT) if step % 3 else FLAT) for step in STEPS],
    "step_0_and_half_an_interval": [
        row(0, {"eval_greedy": 0.5, "eval_greedy_low": 0.4, "eval_sampled": None} | FLAT),
    ],
    "exploding": [row(step, FLAT | {"ratio_max": 10.0 ** (2 * step), "reward": -(10.0**step)}) for step in STEPS],
    "float64_extremes": [row(step, {"ratio_mean": 1e-300, "ratio_max": 1e300, "reward": 1e300}) for step in (1, 2, 3)],
    "all_at_the_floor": [row(step, FLAT | {"gamma_mean": 0.5, "gamma_floor_fraction": 1.0}) for step in STEPS],
}
WHOLE = ("real", "no_rows", "exploding", "float64_extremes")
"""Cases drawn at full size. The others are drawn small and without constrained layout, in half of the time."""


def write(run_dir, rows):
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


def draw_panels(run_dir, rows):
    """Draw rows without rendering the picture; return the panels by title, and γ's right axis as "right"."""
    figures = []

    class RecordedFigure(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            figures.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_curves, "Figure", RecordedFigure)
        patch.setattr(FigureCanvasAgg, "print_png", lambda *_: None)
        draw_curves(write(run_dir, rows))
    return {axes.get_title(loc="left") or "right": axes for axes in figures[-1].axes}


@pytest.fixture
def panels(tmp_path):
    return functools.partial(draw_panels, tmp_path / "run")


@pytest.fixture(scope="module")
def real_panels(tmp_path_factory):
    return draw_panels(tmp_path_factory.mktemp("real"), CASES["real"])


def labelled_lines(axes):
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


@pytest.mark.parametrize("name", CASES)
def test_any_record_gives_a_picture(tmp_path, monkeypatch, name):
    class SmallFigure(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"dpi": 30, "layout": "none"})

    if name not in WHOLE:
        monkeypatch.setattr(training_curves, "Figure", SmallFigure)
    run_dir = write(tmp_path / name, CASES[name])
    path = draw_curves(run_dir)
    assert path == run_dir / "curves.png"
    image = matplotlib.image.imread(path)
    assert image.shape[:2] == ((990, 1760) if name in WHOLE else (270, 480))
    assert image.std() > 0.01
    assert sorted(entry.name for entry in run_dir.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_the_name_of_the_folder_is_text(tmp_path):
    assert draw_curves(write(tmp_path / "$_^{$ 50% <b>", CASES["no_rows"])).is_file()


def test_the_folder_may_be_a_string_and_relative(tmp_path, monkeypatch):
    write(tmp_path, CASES["no_rows"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FigureCanvasAgg, "print_png", lambda *_: None)
    assert draw_curves(".").resolve() == tmp_path / "curves.png"


def test_every_panel_is_named_and_labelled(real_panels):
    drawn = real_panels
    assert [title for title in drawn if title != "right"] == TITLES
    for axes in drawn.values():
        assert axes.get_ylabel()
    for title in TITLES:
        assert drawn[title].get_xlabel() == "RL step"
        assert drawn[title].get_legend() is not None


def test_a_panel_without_data_says_so(panels):
    drawn = panels([row(step, {"reward": float(step)}) for step in STEPS])
    assert "right" not in drawn
    for title in TITLES:
        told = [text.get_text() for text in drawn[title].texts]
        assert told == ([] if title == "Reward" else ["not recorded"])


def test_lines_hold_the_record(real_panels):
    rl = [row for row in CASES["real"] if row["phase"] == "rl"]
    drawn = real_panels
    ratio = labelled_lines(drawn["Importance ratio"])
    shift = labelled_lines(drawn["Router shift γ"])
    for line, name in [
        (ratio["largest"], "ratio_max"),
        (ratio["mean"], "ratio_mean"),
        (shift["mean"], "gamma_mean"),
        (shift["10th percentile"], "gamma_p10"),
        (shift["smallest"], "gamma_min"),
        (drawn["right"].lines[0], "gamma_floor_fraction"),
        (drawn["Reward"].lines[0], "reward"),
        (drawn["Token entropy"].lines[0], "entropy"),
    ]:
        np.testing.assert_array_equal(line.get_xdata(), [row["step"] for row in rl])
        np.testing.assert_array_equal(line.get_ydata(), [row[name] for row in rl])
    assert drawn["Importance ratio"].get_yscale() == "log"
    raw = [line.get_ydata() for line in drawn["Clip fraction"].lines if line.get_label().startswith("_")]
    names = ("clip_fraction", "clip_fraction_positive", "clip_fraction_negative")
    np.testing.assert_array_equal(raw, [[row[name] for row in rl] for name in names])


# 5 % of 170 steps, made odd, are 9; a window has at least 5.
@pytest.mark.parametrize(("count", "reach"), [(170, 4), (99, 2)])
def test_bold_lines_are_running_means_of_what_is_finite(panels, count, reach):
    rng = np.random.default_rng(1)
    values = rng.normal(size=count)
    values[[0, 40, 41, count - 1]] = np.nan
    values[60:80] = np.nan
    rows = [row(step, {"reward": None if np.isnan(v) else v}) for step, v in enumerate(values, 1)]
    line = labelled_lines(panels(rows)["Reward"])["training samples"]
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(count)]
    finite = [[value for value in window if not np.isnan(value)] for window in windows]
    expected = np.array([sum(window) / len(window) if window else np.nan for window in finite])
    assert np.isnan(expected).sum() == 20 - 2 * reach
    np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-12, atol=1e-15)


def test_a_route_that_stays_is_not_blown_up(panels):
    low, high = panels(CASES["constant"])["Router shift γ"].get_ylim()
    assert 0.9 < low <= 0.95 and 1.0 < high < 1.01


def test_lone_values_are_dots(panels):
    values = [0.1, None, 0.3, 0.4, None, 0.6]
    line = panels([row(step, {"reward": value}) for step, value in enumerate(values, 1)])["Reward"].lines[0]
    assert line.get_marker() == "o" and line.get_markevery() == [0, 5]


def test_held_out_rates_stand_at_their_steps_with_intervals(real_panels):
    rl = [row for row in CASES["real"] if row["phase"] == "rl" and "eval_greedy" in row]
    axes = real_panels["Solve rate"]
    lines = labelled_lines(axes)
    for kind in ("greedy", "sampled"):
        np.testing.assert_array_equal(lines[f"held-out {kind}"].get_xdata(), [20, 40, 60])
        np.testing.assert_array_equal(lines[f"held-out {kind}"].get_ydata(), [row[f"eval_{kind}"] for row in rl])
    bars = np.array([segment for bars in axes.collections[1::2] for segment in bars.get_segments()])
    expected = [
        [[row["step"], row[f"eval_{kind}_low"]], [row["step"], row[f"eval_{kind}_high"]]]
        for kind in ("greedy", "sampled")
        for row in rl
    ]
    np.testing.assert_array_equal(bars, expected)


def test_the_baseline_is_the_last_evaluation_of_the_warm_start(panels, real_panels):
    axes = real_panels["Solve rate"]
    assert "warm start" in labelled_lines(axes)
    at_zero = [line.get_ydata()[0] for line in axes.lines if list(line.get_xdata()) == [0]]
    assert at_zero == [EVALUATION["eval_greedy"], EVALUATION["eval_sampled"]]
    assert "warm start" not in labelled_lines(panels(CASES["one_row"])["Solve rate"])


def test_all_panels_show_the_same_steps(panels):
    drawn = panels([row(1, FLAT), *(row(step, {"reward": 1.0}) for step in range(2, 51))])
    limits = {axes.get_xlim() for axes in drawn.values()}
    assert limits == {(-1.0, 51.0)}


@pytest.mark.parametrize("failing", [(FigureCanvasAgg, "print_png"), (os, "replace")], ids=["drawing", "disk"])
def test_an_older_picture_is_replaced_only_by_a_whole_one(tmp_path, monkeypatch, failing):
    pictures = iter([b"first", b"second", b"third"])
    monkeypatch.setattr(FigureCanvasAgg, "print_png", lambda _, file: file.write(next(pictures)))
    run_dir = write(tmp_path, CASES["no_rows"])
    assert draw_curves(run_dir).read_bytes() == b"first"
    with monkeypatch.context() as patch:
        patch.setattr(*failing, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            draw_curves(run_dir)
    assert (run_dir / "curves.png").read_bytes() == b"first"
    assert draw_curves(run_dir).read_bytes() in (b"second", b"third")


def test_a_folder_without_a_record_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder of a run"):
        draw_curves(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"phase": "rl"}\n')
    with pytest.raises(ValueError, match="line 1 is not a row"):
        draw_curves(tmp_path)
    assert not (tmp_path / "curves.png").exists()


def test_drawing_needs_no_pyplot(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it is an error now
    fresh = runpy.run_path(training_curves.__file__)
    assert fresh["draw_curves"](write(tmp_path, CASES["no_rows"])).is_file()
