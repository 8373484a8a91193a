"""Reports on synthetic runs: one run as a page, and several beside each other. Matplotlib's warnings are errors too."""

import html
import json
import re

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments import compare, report
from experiments.reporting import heat_maps, page, probes
from experiments.reporting.comparison_page import METRICS, make_comparison, name_runs
from experiments.reporting.panels import SECTIONS
from experiments.reporting.record import Series, load_run
from experiments.reporting.run_page import make_report
from rspo_jax.records import MetricsLog, write_json
from rspo_jax.records.samples import Sample
from rspo_jax.routing import diagnostics
from rspo_jax.stopwatch import STAGES
from rspo_jax.training.probe import PROBED

LAYERS, EXPERTS = 4, 16
SAMPLE = Sample("1+1=", "2", 1.0, True, False, 0.5, [4], ["2"], [-0.5], [-0.25], [0.9])


def interval(prefix, rate):
    return {f"{prefix}": rate, f"{prefix}_low": rate - 0.02, f"{prefix}_high": rate + 0.02}


def fake_run(run_dir, steps=60, collapses=True, arrays=True, **config):
    """Write a run that learns, and whose reward falls from step 30 on if it collapses."""
    rng = np.random.default_rng(steps)
    with MetricsLog(run_dir, None) as log:
        log.write("warm_start", 1, {"loss": 2.0})
        log.write("rl", 0, interval("test_sampled", 0.1) | interval("eval_greedy", 0.15))
        for step in range(1, steps + 1):
            trouble = max(0.0, step - 30) / 30 if collapses else 0.0
            beside = (fake_arrays(rng, trouble), [SAMPLE]) if arrays else ()
            log.write("rl", step, fake_metrics(rng, step, trouble), *beside)
    write_json(
        run_dir / "config.json",
        {"task_name": "countdown", "objective": {"objective": "grpo", "gamma_min": None}, "trainer": {"steps": steps}}
        | config,
    )
    return run_dir


def fake_metrics(rng, step, trouble):
    noise = 0.02 * rng.random()
    metrics = {
        "reward": 0.1 + 0.3 * step / 60 - 0.6 * trouble + noise if trouble < 0.7 else noise,
        "solve_rate": max(0.0, 0.1 + 0.3 * step / 60 - 0.6 * trouble),
        "rewards/correct/mean": 0.1 + noise,
        "rewards/brief/mean": -noise,
        "entropy": 1.2 - 0.5 * step / 60 - 0.5 * trouble + noise,
        "drift": 0.01 + 0.15 * trouble + 0.1 * noise,
        "gamma_mean": 0.99 - 0.15 * trouble - 0.1 * noise,
        "gamma_p10": 0.97 - 0.3 * trouble,
        "gamma_min": 0.8 - 0.6 * trouble,
        "gamma_floor_fraction": 0.3 * trouble,
        "ratio_mean": 1 + 0.1 * noise,
        "ratio_max": float(np.exp(0.3 + 8 * trouble + 10 * noise)),
        "clip_fraction": 0.004 + 0.2 * trouble,
        "clip_fraction_positive": 0.002 + 0.1 * trouble,
        "clip_fraction_negative": 0.006 + 0.3 * trouble,
        "effective_sample_size": 0.99 - 0.5 * trouble,
        "route_stays": 0.9 - 0.5 * trouble,
        "overlap": 0.96 - 0.2 * trouble,
        "grad_norm": 0.5 + 5 * trouble + noise,
        "approx_kl": 1e-4 + trouble**2,
        "mismatch_mean": 1e-6,
        "mismatch_max": 1e-5,
        "response_length": 20.0,
        "longest_response": 40.0,
        **fake_seconds(step),
        "peak_memory_gib": 1.5 + step / 100,
    }
    return metrics | (interval("eval_greedy", metrics["solve_rate"]) | fake_probe(trouble) if step % 10 == 0 else {})


def fake_seconds(step):
    """Seconds of a step whose first compiles, and which the update and, at every tenth, an evaluation take most of."""
    seconds = dict.fromkeys(STAGES, 0.0) | {"draw": 1.0, "judge": 0.25, "update": 90.0 if step == 1 else 2.0}
    seconds |= {"evaluate": 2.0} if step % 10 == 0 else {}
    parts = {f"seconds_{stage}": spent for stage, spent in seconds.items()}
    rest = {"overlapped_seconds": 0.125, "compile_seconds": 88.0 if step == 1 else 0.0}
    return parts | rest | {"step_seconds": sum(seconds.values())}


def fake_probe(trouble):
    of_objectives = {
        f"probe_{kind}_{name}": value - 0.01 * place
        for kind, value in (("cosine", 0.9 - 0.5 * trouble), ("snr", 4 - 3 * trouble))
        for place, name in enumerate(PROBED)
    }
    return of_objectives | {"probe_reference_cosine_sequence_mean": 0.8, "probe_snr_gspo": np.nan}


def fake_arrays(rng, trouble):
    log_ratio = (0.02 + trouble) * rng.standard_cauchy(2000) / 10
    drift = np.abs((0.02 + trouble) * rng.normal(size=2000)) * (rng.random(2000) < 0.6)
    load = rng.dirichlet(np.full(EXPERTS, 20 / (1 + 10 * trouble)), LAYERS)
    edges, quantiles = np.array(diagnostics.LOG_RATIO_EDGES), np.array(diagnostics.PERCENTS) / 100
    drift_edges = np.array(diagnostics.DRIFT_EDGES)
    layers = np.arange(1, LAYERS + 1) / LAYERS
    return {
        "log_ratio_histogram": np.histogram(log_ratio, [-np.inf, *edges, np.inf])[0],
        "log_ratio_quantiles": np.quantile(log_ratio, quantiles),
        "log_ratio_edges": edges,
        "drift_histogram": np.histogram(drift, [-np.inf, *drift_edges, np.inf])[0],
        "drift_quantiles": np.quantile(drift, quantiles),
        "drift_edges": drift_edges,
        "expert_load": load,
        "layer_max_violation": diagnostics.max_violation(load),
        "layer_drift": (0.02 + trouble) * layers,
        "layer_overlap": 1 - 0.2 * (0.1 + trouble) * layers,
        "layer_stays": 1 - 0.3 * (0.1 + trouble) * layers,
        "layer_router_entropy": 2.5 - trouble * layers,
        "mismatch_histogram": np.histogram(1e-5 * log_ratio, [-np.inf, *edges, np.inf])[0],
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of a run that collapses, one that does not, and an unfinished one without arrays."""
    folder = tmp_path_factory.mktemp("runs")
    unfinished = fake_run(folder / "old", arrays=False, steps=25)
    (unfinished / "config.json").unlink()
    return {
        "grpo": fake_run(folder / "grpo"),
        "rspo": fake_run(folder / "rspo", collapses=False, objective={"objective": "rspo", "gamma_min": 0.8}),
        "old": unfinished,
    }


def without_rendering(make):
    """Make a page without rendering its pictures, the slow part; return it and the axes by their titles."""
    drawn = {}

    def keep(figure, label):
        drawn[label] = figure.axes[0]
        return "<svg></svg>"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "as_svg", keep)
        return make(), drawn


@pytest.fixture(scope="module")
def reports(runs):
    """The report on each run and its axes by title, pictures not rendered."""
    return {name: without_rendering(lambda run=run: make_report(load_run(run))) for name, run in runs.items()}


PANELS = [panel for section in SECTIONS for panel in section.panels]


def test_a_report_is_one_file_with_all_panels(runs, tmp_path, monkeypatch, capsys):
    # Laying out every picture would double the time; the next two tests do it for some.
    monkeypatch.setattr(page, "ConstrainedLayoutEngine", lambda **_: "none")
    path = tmp_path / "page.html"
    assert report.main([str(runs["grpo"]), "--out", str(path)]) == 0
    assert capsys.readouterr().out == f"report: {path}\n"
    text = path.read_text()
    for panel in PANELS:
        assert re.search(f'<h3>{re.escape(page.escape(panel.title))}</h3><div class="drawn"[^>]*><svg ', text)
    assert text.count("<svg ") == text.count("</svg>") == len(PANELS) + 2  # and the key of alarm and collapse
    assert "Left out" not in text and "<h2>Samples</h2>" in text
    for fetched in ("<script ", "<link", "@import", 'src="', 'href="http'):
        assert fetched not in text
    assert text.count("<script>") == 1
    assert set(re.findall(r"url\((.)", text)) == {"#"} and "data:image/png;base64" in text
    style, body = text.split("</style>", 1)
    assert "prefers-color-scheme: dark" in style and "--ink: #d6d9df" in style
    assert "var(--ink)" in body and "#333333" not in body and "#ffffff" not in body


@pytest.mark.parametrize("title", ["Reward", "Router shift γ", "Effective sample size"])
def test_the_legend_of_a_panel_is_inside_its_picture(reports, title):
    axes = reports["rspo"][1][title]
    figure = axes.figure
    FigureCanvasAgg(figure).draw()
    legend = axes.get_legend().get_window_extent()
    assert figure.bbox.y0 <= legend.y0 and legend.y1 <= figure.bbox.y1
    assert figure.bbox.x0 <= legend.x0 and legend.x1 <= figure.bbox.x1


def test_a_heat_map_and_its_scale_are_inside_their_picture(reports):
    figure = reports["rspo"][1]["Log-ratios"].figure
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
    assert len(figure.axes) == 2


def test_a_report_says_what_is_left_out_and_why(reports):
    text, drawn = reports["old"]
    assert drawn.keys() == {panel.title for panel in PANELS if not panel.arrays}
    for panel in PANELS:
        if panel.arrays:
            row = f"<tr><td>{page.escape(panel.title)}</td><td>diagnostics.jsonl has no {panel.arrays[0]}</td></tr>"
            assert row in text
    assert "Configuration: the folder has no config.json" in text and "Summary: the folder has no summary.json" in text


def test_values_under_the_pointer_are_those_of_the_rows(runs):
    record = load_run(runs["rspo"])
    panels = {panel.title: panel for panel in PANELS}
    for title in ("Held-out problems", "Router shift γ", "Reward"):
        text = page.figure(title, "", lambda axes, panel=panels[title]: panel.draw(axes, record))
        found = json.loads(html.unescape(re.search(r'data-lines="(.*?)"', text)[1]))
        lines = {line["name"]: line for line in found["lines"]}
        metrics = {
            "Held-out problems": {"training, each step": "solve_rate", "held-out greedy": "eval_greedy"},
            "Router shift γ": {"mean": "gamma_mean", "at the floor": "gamma_floor_fraction"},
            "Reward": {"training samples, each step": "reward"},
        }[title]
        for name, metric in metrics.items():
            rows = [row for row in record.rl if np.isfinite(row.get(metric, np.nan)) or metric != "eval_greedy"]
            expected = [row.get(metric, np.nan) for row in rows]
            values = [np.nan if value is None else value for value in lines[name]["values"]]
            assert found["grids"][lines[name]["grid"]] == [row["step"] for row in rows]
            np.testing.assert_allclose(values, expected, rtol=1e-3)
            assert lines[name]["percent"] == (metric not in ("gamma_mean", "reward"))
            assert lines[name]["colour"].startswith("var(--")
        left, top, width, height = found["frame"]
        assert 0 < left < left + width <= 1 and 0 < top < top + height < 1
        assert found["span"][0] <= 0 and found["span"][1] >= 60
        assert not any(name.startswith("child") for name in lines)


def test_alarm_and_collapse_are_told_and_marked(runs, reports):
    text, drawn = reports["grpo"]
    warned = load_run(runs["grpo"]).warned
    assert 30 < warned.alarm < warned.collapse
    assert f"<b>step {warned.alarm}</b><span>{page.escape(warned.why)}" in text
    assert f"<b>step {warned.collapse}</b><span>{warned.lead} steps after the alarm" in text
    for title, axes in drawn.items():
        upright = [line.get_xdata()[0] for line in axes.lines if list(line.get_ydata()) == [0, 1]]
        assert upright == ([] if title == "Expert load, last step" else [warned.alarm, warned.collapse]), title
    calm, _ = reports["rspo"]
    assert "no sign of a collapse" in calm and 'class="key"' not in calm


def test_the_seconds_of_steps_are_stacked_on_the_scale_of_those_that_did_not_compile(reports):
    text, drawn = reports["rspo"]
    axes = drawn["Seconds of a step"]
    assert [area.get_label() for area in axes.collections] == ["judge", "draw", "update", "evaluate"]
    corners = {area.get_label(): area.get_paths()[0].vertices for area in axes.collections}
    tops = {label: of_area[of_area[:, 0] > 60, 1].max() for label, of_area in corners.items()}
    assert tops == {"judge": 0.25, "draw": 1.25, "update": 3.25, "evaluate": 5.25}  # each stands on those before
    assert axes.get_ylim() == (0, 1.1 * 5.25)
    assert [note.get_text() for note in axes.texts] == ["91 s, of which 88 s compiling"]
    (line,) = [line for line in axes.lines if line.get_label() == "overlapped"]
    assert set(line.get_ydata()) == {0.125}
    assert "Compiling<b>88 s</b>" in text and "Peak memory<b>2.10 GiB</b>" in text


def test_probes_are_drawn_at_the_steps_that_have_one(reports):
    _, drawn = reports["rspo"]
    labels = {label for _, _, label in probes.STYLES.values()}
    cosine, signal = (
        {line.get_label(): line for line in drawn[title].lines if not line.get_label().startswith("_")}
        for title in ("Cosine to the on-policy gradient", "Signal-to-noise ratio of gradients")
    )
    assert cosine.keys() == labels | {"halves of on-policy"} and signal.keys() == labels - {"GSPO"}
    for line in (*cosine.values(), *signal.values()):
        assert list(line.get_xdata()) == [10, 20, 30, 40, 50, 60]
    assert probes.STYLES.keys() == PROBED.keys()
    looks = [(colour, str(dashes)) for colour, dashes, _ in probes.STYLES.values()]
    assert len(set(looks)) == len(looks)


def test_numbers_configuration_and_intervals_are_shown(runs, reports):
    text, _ = reports["rspo"]
    assert "countdown · rspo · 60 steps" in text
    assert "<td>objective.gamma_min</td><td>0.8</td>" in text
    greedy = load_run(runs["rspo"]).held_out("greedy")
    assert greedy.split == "validation" and greedy.step == 60
    assert f"<b>{100 * greedy.value:.1f} %</b><span>95 %: {100 * greedy.low:.1f} to {100 * greedy.high:.1f}" in text


def test_mean_rewards_take_the_place_of_solve_rates_that_a_task_does_not_tell(tmp_path):
    rewards = {f"eval_{mode}_reward": 0.25 for mode in ("greedy", "sampled")} | {"reward": 0.125}
    rewards |= {"eval_greedy_reward_low": 0.2, "eval_greedy_reward_high": 0.3}
    rewards |= {"eval_sampled_reward_low": np.nan, "eval_sampled_reward_high": np.nan}
    with MetricsLog(tmp_path, None) as log:
        for step in range(3):
            log.write("rl", step, rewards | {"rewards/a b/mean": 1.0, "rewards/a b/std": 0.0})
    record = load_run(tmp_path)
    assert record.reward_names == ["a b"]
    text, drawn = without_rendering(lambda: make_report(record))
    assert "<b>0.250</b><span>95 %: 0.200 to 0.300, step 2, before 0.250" in text
    assert "<b>0.250</b><span>step 2, before 0.250" in text
    assert {"Held-out problems", "Rewards by name"} <= set(drawn)
    assert drawn["Held-out problems"].get_ylabel() == "mean reward"
    comparison, drawn = without_rendering(lambda: make_comparison([record]))
    assert "0.250 [0.200, 0.300] (validation)" in comparison and "Held-out reward, greedy" in drawn


def test_arrays_of_another_shape_than_the_last_are_left_out(tmp_path):
    with MetricsLog(tmp_path, None) as log:
        for step, layers in ((1, 2), (2, 3), (3, 3)):
            log.write("rl", step, {"reward": 0.0}, {"layer_drift": np.full(layers, step)})
    series = load_run(tmp_path).series("layer_drift")
    np.testing.assert_array_equal(series.steps, [2, 3])
    np.testing.assert_array_equal(series.values, [[2, 2, 2], [3, 3, 3]])


def test_heat_maps_put_layers_and_steps_where_they_belong():
    axes = Figure().subplots()
    heat_maps.draw_by_layer(axes, Series(np.array([4, 6, 10]), np.array([[1.0, 2.0], [3.0, np.nan], [5.0, 6.0]])))
    (image,) = axes.images
    drawn = np.ma.filled(image.get_array().astype(float), np.nan)
    np.testing.assert_array_equal(drawn, [[1, 3, np.nan, 5], [2, np.nan, np.nan, 6]])
    assert image.get_extent() == [3, 11, -0.5, 1.5] and image.get_clim() == (1, 6) and image.origin == "lower"


def test_histograms_are_shares_with_quantiles_in_the_same_place():
    axes, steps = Figure().subplots(), np.array([1, 2])
    counts = Series(steps, np.array([[2.0, 0.0, 6.0], [0.0, 0.0, 0.0]]))
    heat_maps.draw_histogram(axes, counts, [0.1, 1.0], Series(steps, np.array([[0.55], [1.0]])), "nats")
    drawn = np.ma.filled(axes.images[0].get_array().astype(float), np.nan)
    np.testing.assert_array_equal(drawn, [[0.25, np.nan], [np.nan, np.nan], [0.75, np.nan]])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [1.0, 1.5])  # the second bin reaches from 0.5 to 1.5
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.1", "1"]


def test_bins_to_both_sides_have_0_in_the_middle():
    axes = Figure().subplots()
    edges = list(diagnostics.LOG_RATIO_EDGES)
    heat_maps.draw_histogram(axes, Series(np.array([1]), np.ones((1, len(edges) + 1))), edges, None, "nats")
    shown = dict(zip([label.get_text() for label in axes.get_yticklabels()], axes.get_yticks(), strict=True))
    assert shown.keys() == {"-10", "-1", "-0.1", "-0.01", "-0.001", "0", "0.001", "0.01", "0.1", "1", "10"}
    assert shown["0"] == len(edges) / 2 and shown["10"] + shown["-10"] == 2 * shown["0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "is nowhere the folder of a run"),
        (["damaged"], "config.json is damaged"),
        (["list"], "config.json is damaged: it is not a JSON object"),
        (["run", "--out", "nowhere/page.html"], "nowhere does not exist: make that folder"),
        (["run", "--alarm.window", "0"], "window must be at least 1"),
    ],
)
def test_mistakes_are_told_in_a_sentence(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name, config in (("damaged", "{"), ("list", "[]"), ("run", "{}")):
        fake_run(tmp_path / name, steps=1, arrays=False)
        (tmp_path / name / "config.json").write_text(config)
    monkeypatch.setattr(report, "make_report", lambda _: "")
    try:
        code = report.main(arguments)
    except SystemExit as stop:  # from the parser
        code = stop.code
    assert code == 2 and message in " ".join(capsys.readouterr().err.split())


def test_a_comparison_has_a_line_for_every_run(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, drawn = without_rendering(lambda: compare.main([str(runs[name]) for name in ("grpo", "rspo", "old")]))
    assert code == 0
    assert capsys.readouterr().out == "comparison: comparison.html\n"
    text = (tmp_path / "comparison.html").read_text()
    assert drawn.keys() == {metric.title for metric in METRICS} - {
        "Load violation", "Router entropy",
    } | {"Held-out solve rate, greedy"}  # fmt: skip
    for title, axes in drawn.items():
        assert [line.get_label() for line in axes.lines] == ["grpo", "rspo", "old"], title
        assert len({line.get_color() for line in axes.lines}) == 3
    assert "<td>Router entropy</td><td>no run has recorded router_entropy</td>" in text
    assert "old: no config.json." in text
    records = {name: load_run(run) for name, run in runs.items()}
    cells = re.search(r"<tr><td>grpo</td>(.*?)</tr>", text).group(1)
    warned = records["grpo"].warned
    for shown in ("grpo", "60", warned.alarm, warned.collapse, warned.lead, "10.0 % [8.0, 12.0]"):
        assert f'<td class="number">{shown}</td>' in cells
    assert "(validation)" in cells


def test_configurations_are_compared_field_by_field(runs):
    text, _ = without_rendering(lambda: make_comparison([load_run(runs["grpo"]), load_run(runs["rspo"])]))
    rows = text[text.index("Differences in configuration") :]
    assert "<td>objective.objective</td><td>grpo</td><td>rspo</td>" in rows
    assert "<td>objective.gamma_min</td><td>None</td><td>0.8</td>" in rows
    assert "trainer.steps" not in rows
    alike, _ = without_rendering(lambda: make_comparison([load_run(runs["grpo"])] * 2))
    assert '<p class="quiet">None.</p>' in alike
    assert alike.count(f"<td>{runs['grpo']}</td>") == 2  # runs of one name go by their paths


def test_many_runs_are_told_apart_by_colour_and_dashes(runs):
    named = name_runs([load_run(runs["grpo"])] * 20)
    assert len({(run.colour, run.dashes) for run in named}) == 20


def test_a_comparison_needs_two_runs(runs, capsys):
    with pytest.raises(SystemExit) as stop:
        compare.main([str(runs["grpo"])])
    assert stop.value.code == 2 and "two or more runs" in capsys.readouterr().err
