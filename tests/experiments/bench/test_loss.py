"""The loss benchmark, by its command on tiny shapes: its report, its refusals, and that the timed programs compute the
loss. No test looks at how long anything takes."""

import importlib.util
import json
import math

import jax
import matplotlib.image
import numpy as np
import pytest
from support import oracles
from support.tpu_compiler import need_libtpu

import models
from experiments.bench import loss as bench_loss
from experiments.bench import loss_programs as programs
from experiments.bench import loss_tables as tables
from experiments.bench import step_programs as step
from experiments.bench.timing import DIRECTIONS
from experiments.compilers.costs import Costs

pytestmark = pytest.mark.slow  # they compile many programs

SHAPE = "3x8x2x2x4"
B, T = 3, 8
TINY_STEP = ["--rows", "4", "--row-length", "16", "--layers", "2", "--hidden-size", "16", "--experts", "4"]
TINY_STEP += ["--experts-per-token", "2", "--expert-size", "8", "--vocab-size", "16"]


def candidate_of(name="ours", library="rspo_jax", shift=False, returns="loss", value=1.0, gradient=(1.0, 2.0)):
    def result():
        return np.float32(value), None if gradient is None else np.asarray(gradient, np.float32)

    return programs.Candidate(library, name, shift, returns, result, 0.0, None, result)


@pytest.fixture(scope="module")
def arrays_report(tmp_path_factory):
    """One run at the level "arrays", with everything that it can write."""
    output = tmp_path_factory.mktemp("bench") / "new" / "folder"
    flags = ["--shapes", SHAPE, "--objectives", "rspo", "gmpo", "--repeats", "3", "--output", str(output)]
    assert bench_loss.main(flags) == 0
    return output, json.loads((output / "bench_loss.json").read_text())


def test_every_program_is_reported_once_in_both_directions(arrays_report):
    _, report = arrays_report
    (case,) = report["cases"]
    assert (case["level"], case["dtype"]) == ("arrays", "float32")
    assert case["shape"] == {"batch": 3, "tokens": 8, "layers": 2, "experts_per_token": 2, "experts": 4}
    expected = [
        ("rspo", True, "loss"),
        ("rspo", True, "loss + metrics"),
        ("rspo", False, "loss"),
        ("rspo", False, "loss + metrics"),
        ("gmpo", False, "loss"),  # with γ it would be the same program
        ("gmpo", True, "loss + metrics"),
        ("gmpo", False, "loss + metrics"),
    ]
    for direction in ("forward", "forward + backward"):
        rows = [row for row in case["programs"] if row["direction"] == direction]
        assert [(row["objective"], row["router_shift"], row["returns"]) for row in rows] == expected


def test_times_and_ratios_are_consistent(arrays_report):
    rows = arrays_report[1]["cases"][0]["programs"]
    for row in rows:
        seconds = row["seconds"]
        assert 0 < row["fastest_seconds"] <= seconds["low"] <= seconds["median"] <= seconds["high"]
        assert row["compile_seconds"] > 0
        assert row["share_of_bound"] == pytest.approx(row["bound"]["seconds"] / seconds["median"])
        assert row["agreement"] is None and row["ratio_to_ours"] is None  # ours are not compared with themselves
    for first in (rows[0], rows[len(rows) // 2]):
        assert first["ratio_to_first"] == {"low": 1, "median": 1, "high": 1}


def test_bytes_are_those_of_the_arrays(arrays_report):
    rows = {
        (row["objective"], row["router_shift"], row["returns"], row["direction"]): row["analysis"]
        for row in arrays_report[1]["cases"][0]["programs"]
    }
    without_gamma = 2 * 4 * B * T + 4 * B + B * T  # log-probs twice, advantages, mask
    assert rows["gmpo", False, "loss", "forward"]["argument_bytes"] == without_gamma
    assert rows["rspo", True, "loss", "forward"]["argument_bytes"] == without_gamma + 4 * B * T
    forward, both = (rows["rspo", True, "loss", direction] for direction in DIRECTIONS)
    assert both["output_bytes"] - forward["output_bytes"] >= 4 * B * T
    for analysis in rows.values():
        assert analysis["compulsory_bytes"] == analysis["argument_bytes"] + analysis["output_bytes"]


def test_the_bound_is_that_of_the_reported_peak(arrays_report):
    for row in arrays_report[1]["cases"][0]["programs"]:
        peak, analysis = row["bound"]["peak"], row["analysis"]
        compute = analysis["flops"] / peak["flops_per_second"]
        memory = (analysis["argument_bytes"] + analysis["output_bytes"]) / peak["bytes_per_second"]
        assert row["bound"]["seconds"] == pytest.approx(max(compute, memory))
        assert row["bound"]["limit"] == ("compute" if compute > memory else "memory")
        assert "measured here" in peak["source"]


def test_settings_and_machine_are_reported(arrays_report):
    output, report = arrays_report
    assert report["settings"]["shapes"] == [SHAPE] and report["settings"]["output"] == str(output)
    assert report["device"]["platform"] == "cpu" and report["device"]["cpu_threads"] >= 1
    assert set(report["versions"]) == {"jax"}


def test_the_picture_has_ink(arrays_report):
    picture = matplotlib.image.imread(arrays_report[0] / "bench_loss.png")
    assert picture.shape[0] > 100 and picture[..., :3].min() < 0.5


def test_router_level_and_bfloat16(tmp_path, capsys):
    path = tmp_path / "figures.json"
    flags = ["--shapes", SHAPE, "--level", "router", "--objectives", "rspo", "--router-shift", "with"]
    flags += ["--returns", "loss", "--dtypes", "bfloat16", "--repeats", "2", "--json", str(path), "--floor"]
    assert bench_loss.main(flags) == 0
    (case,) = json.loads(path.read_text())["cases"]
    ours, floors = case["programs"][::2], case["programs"][1::2]
    assert [row["direction"] for row in ours] == [row["direction"] for row in floors] == list(DIRECTIONS)
    layers, k, experts = 2, 2, 4
    logits = 2 * layers * B * T * experts
    for row in floors:
        assert row["library"] == "floor" and row["analysis"]["argument_bytes"] < logits
    for row in ours:
        assert row["router_shift"] and row["analysis"]["argument_bytes"] >= logits + layers * B * T * k
    assert "level router" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def step_run(tmp_path_factory):
    """One run at the level "step", of a tiny model: its report, and the candidates that it timed."""
    output, timed = tmp_path_factory.mktemp("bench"), []
    flags = ["--level", "step", "--objectives", "rspo", "gmpo", "--repeats", "2", "--output", str(output), *TINY_STEP]
    with pytest.MonkeyPatch.context() as monkeypatch, jax.numpy_dtype_promotion("standard"):  # Optax needs it
        make = step.timed_candidates
        monkeypatch.setattr(step, "timed_candidates", lambda *arguments: timed.append(make(*arguments)) or timed[-1])
        assert bench_loss.main(flags) == 0
    assert (output / "bench_loss.png").is_file()
    return json.loads((output / "bench_loss.json").read_text()), timed


def test_a_whole_step_is_timed_with_and_without_the_route(step_run):
    (case,) = step_run[0]["cases"]
    rows, tokens, layers, k = 4, 16, 2, 2
    assert case["level"] == "step"
    assert case["shape"] == {
        "batch": rows,
        "tokens": tokens,
        "layers": layers,
        "experts_per_token": k,
        "experts": 4,
    }
    kinds = (("rspo", True, False), ("gmpo", False, False), ("rspo", True, True))
    keys = ("direction", "objective", "router_shift", "is_control")
    programs_run = [tuple(row[key] for key in keys) for row in case["programs"]]
    assert programs_run == [(way, *kind) for way in ("update", "score") for kind in kinds]
    for row in case["programs"]:
        assert row["bound"] is None and row["seconds"]["median"] > 0
    update, _, _, score, _, _ = (row["analysis"] for row in case["programs"])
    excess = {(row["direction"], row["objective"]): row["first_minus_this"] for row in case["programs"]}
    route = 3 * rows * tokens * layers * k
    assert case["route"] == {
        "bytes_a_token": 12,
        "places": rows * tokens,
        "devices": 1,
        "meant_bytes": route,
        "compiled_bytes": route,
    }
    # The route is an argument of the one update and of nothing else; the one scoring pass returns it.
    assert excess["update", "gmpo"]["argument_bytes"] == route
    assert excess["score", "gmpo"]["argument_bytes"] == 0 and excess["score", "gmpo"]["output_bytes"] >= route
    assert set(excess["update", "rspo"].values()) <= {0, None}
    assert update["flops"] > score["flops"] > 0


def test_the_timed_updates_are_those_of_their_objectives(step_run):
    _, ((rspo, gmpo, _), _) = step_run
    for candidate, shifts in ((rspo, True), (gmpo, False)):
        state, statistics = candidate.call()
        updates = int(state.updates)
        state, _ = candidate.call()  # a donated state is followed, not used twice
        assert int(state.updates) == updates + 1 > 5
        assert float(statistics["skipped_updates"].reduce()) == 0
        assert ("gamma_mean" in statistics) == shifts
        if shifts:
            assert 0 < float(statistics["gamma_mean"].reduce()) < 1


def test_the_batch_of_a_step_has_no_places_in_vain():
    batch = step.make_batch(step.StepSettings(rows=5, row_length=32), vocab_size=7, seed=0)
    assert batch.rows.inputs.shape == (1, 5, 32)
    np.testing.assert_array_equal(batch.rows.segment_ids, np.repeat([[[1] * 16 + [2] * 16]], 5, axis=1))
    mask, places = np.asarray(batch.mask), np.asarray(batch.places)
    assert mask.all() and mask.shape == (1, 10, 13)
    assert len(set(places.ravel().tolist())) == 130 and np.asarray(batch.rows.targets).max() < 7


def test_depths_are_a_line():
    low, high = ({name: value for name in Costs.__annotations__} for value in (7.0, 13.0))
    slope, rest = tables.line_through([low, high], (2, 4))
    assert set(slope.values()) == {3.0} and set(rest.values()) == {1.0}


def test_the_preset_is_the_published_model():
    (config,) = step.StepSettings(model="qwen3-30b-a3b").configs()
    params = jax.eval_shape(lambda: models.init_params(config, jax.random.key(0)))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert count == 30_532_122_624  # of the published checkpoint
    deeper = step.StepSettings(model="qwen3-30b-a3b", layers=(2, 4)).configs()
    assert [c.num_layers for c in deeper] == [2, 4]


@pytest.mark.parametrize("name", ["rspo", "grpo"])
def test_what_is_timed_is_the_loss_and_its_gradient(name):
    arrays = programs.make_arrays(programs.Shape.parse(SHAPE), "arrays", "float32", 0)
    shift = name in oracles.USES_ROUTER_SHIFT
    loss = programs.our_loss(name, shift, "loss")
    program = programs.jax_candidate("rspo_jax", name, shift, "loss", loss, "forward + backward", arrays)
    value, gradient = program.result()
    batch = oracles.Batch(*(np.asarray(array) for array in arrays[:5]))
    np.testing.assert_allclose(value, oracles.loss(name, batch), rtol=1e-5)
    np.testing.assert_allclose(gradient, oracles.gradient(name, batch), rtol=1e-5, atol=1e-7)


def test_the_arrays_reach_the_clip_and_the_floor():
    arrays = programs.make_arrays(programs.Shape.parse("16x64x1x1x1"), "arrays", "float32", 0)
    drift = np.abs(np.asarray(arrays.log_probs) - np.asarray(arrays.old_log_probs))
    mask, gamma = np.asarray(arrays.mask), np.asarray(arrays.gamma)
    assert 0.01 < np.mean(drift[mask] > 0.4) < 0.1 and 0.01 < np.mean(gamma[mask] < 0.8) < 0.5
    assert mask[:, 0].all() and (mask.sum(-1) >= 16).all() and not mask.all()


def test_a_rival_is_compared_with_the_same_loss_of_ours():
    metrics = candidate_of("rspo", shift=True, returns="loss + metrics")
    with_gamma, without = candidate_of("rspo", shift=True), candidate_of("rspo")
    ours = [metrics, without, with_gamma, candidate_of("gmpo", shift=True)]
    assert bench_loss.counterpart(candidate_of("rspo", "torch eager", shift=True), ours) is with_gamma
    assert bench_loss.counterpart(candidate_of("rspo", "torch eager"), ours) is without
    assert bench_loss.counterpart(candidate_of("grpo", "tunix"), ours) is None
    assert bench_loss.counterpart(with_gamma, ours) is None


def test_agreement_is_measured():
    rival = candidate_of(library="tunix", value=1.000001, gradient=(1.0, 2.00001))
    differences = bench_loss.check_agreement(rival, candidate_of(), "arrays", "float32")
    assert differences == {"loss": pytest.approx(1e-6, rel=0.1), "gradient": pytest.approx(5e-6, rel=0.1)}
    assert bench_loss.check_agreement(rival, None, "arrays", "float32") is None


@pytest.mark.parametrize(
    ("change", "what"),
    [({"value": 1.0001}, "loss"), ({"gradient": (1.0, 2.001)}, "gradient"), ({"value": math.nan}, "loss")],
)
def test_a_rival_that_computes_something_else_is_not_timed(change, what):
    with pytest.raises(bench_loss.Disagreement, match=f"the {what} differs"):
        bench_loss.check_agreement(candidate_of(library="tunix", **change), candidate_of(), "arrays", "float32")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--objectives", "rspo", "ppo"], "unknown objective 'ppo'"),
        (["--shapes", "64x1024"], "BxTxLxKxE"),
        (["--shapes", "4x4x2x2xE"], "BxTxLxKxE"),
        (["--shapes", "4x4x0x2x4"], "BxTxLxKxE"),
        (["--shapes", "4x4x2x8x4"], "more experts a token than experts"),
        (["--repeats", "1"], "at least 2"),
        (["--json", "no/such/folder/figures.json"], "there is no folder"),
        (["--picture", "no/such/folder/times.png"], "there is no folder"),
        (["--platform", "tpu", "--against", "torch"], "leave --against out"),
        (["--level", "step", "--against", "torch"], "leave --against out at the level step"),
        (["--level", "step", "--rows", "0"], "rows must be at least 1"),
        (["--level", "step", "--row-length", "7"], "row_length must be at least 8"),
        (["--level", "step", "--layers", "0"], "num_layers must be at least 1"),
        (["--level", "step", "--layers", "4", "2"], "--layers must rise, got 4 2"),
        (["--level", "step", "--experts", "2"], "but a layer has only 2 experts"),
        (["--platform", "tpu", "--picture", "times.png"], "no times to draw"),
    ],
)
def test_mistakes_are_refused_in_one_sentence(flags, message, capsys, monkeypatch):
    monkeypatch.setattr(programs, "make_arrays", None)  # nothing may be computed before
    monkeypatch.setattr(step, "make_inputs", None)
    assert bench_loss.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "module", "package"),
    [
        (["--against", "tunix"], "tunix", "google-tunix"),
        (["--against", "torch"], "torch", "torch"),
        (["--platform", "tpu"], "libtpu", "libtpu"),
    ],
)
def test_a_missing_package_is_named(flags, module, package, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == module else find_spec(name))
    assert bench_loss.main(flags) == 2
    assert f"pip install {package}\n" in capsys.readouterr().err


def rival_rows(rival, tmp_path, *more):
    path = tmp_path / "figures.json"
    flags = ["--shapes", SHAPE, "--against", rival, "--returns", "loss", "--repeats", "2", "--json", str(path), *more]
    assert bench_loss.main(flags) == 0
    report = json.loads(path.read_text())
    return report, [row for row in report["cases"][0]["programs"] if row["library"] != "rspo_jax"]


def test_tunix_agrees_with_ours(tmp_path):
    pytest.importorskip("tunix", reason="google-tunix is optional and not in the development lock")
    report, rows = rival_rows("tunix", tmp_path, "--objectives", "grpo", "gspo")
    assert [row["objective"] for row in rows] == 2 * ["grpo", "gspo"] and "tunix" in report["versions"]
    for row in rows:
        assert max(row["agreement"].values()) <= 1e-5 and row["ratio_to_ours"]["median"] > 0


@pytest.mark.filterwarnings("ignore:`?torch.jit:DeprecationWarning")  # PyTorch's own, while it imports itself
def test_pytorch_agrees_with_ours(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="torch is optional and not in the development lock")
    monkeypatch.setattr(torch, "compile", lambda loss, **_: loss)  # its compiler takes a minute
    report, rows = rival_rows("torch", tmp_path, "--objectives", "rspo", "gmpo", "grpo")
    assert len(rows) == 12 and "torch" in report["versions"]
    for row in rows:
        assert max(row["agreement"].values()) <= 1e-5 and row["router_shift"] == (row["objective"] == "rspo")


@pytest.mark.filterwarnings("ignore:`?torch.jit:DeprecationWarning")
def test_pytorch_computes_the_same_router_shift(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="torch is optional and not in the development lock")
    monkeypatch.setattr(torch, "compile", lambda loss, **_: loss)
    flags = ["--level", "router", "--objectives", "rspo", "--router-shift", "with", "--dtypes", "float32", "bfloat16"]
    report, _ = rival_rows("torch", tmp_path, *flags)
    rows = [row for case in report["cases"] for row in case["programs"] if row["library"] == "torch eager"]
    assert len(rows) == 4
    for row in rows:
        assert row["agreement"]["loss"] <= 1e-3


@pytest.mark.parametrize("name", ["v9:2x2x1", "v5p:3x7"])
def test_an_unknown_topology_is_named(name, capsys, monkeypatch):
    need_libtpu(monkeypatch)
    assert bench_loss.main(["--platform", "tpu", "--topology", name]) == 2
    assert f"cannot build the topology '{name}'" in capsys.readouterr().err


def test_rows_that_cannot_be_split_are_refused(capsys, monkeypatch):
    need_libtpu(monkeypatch)
    assert bench_loss.main(["--platform", "tpu", "--topology", "v5e:2x2", "--shapes", SHAPE]) == 2
    assert "3 rows cannot be split over the 4 devices" in capsys.readouterr().err


def test_rows_of_a_step_that_cannot_be_split_are_refused(capsys, monkeypatch):
    need_libtpu(monkeypatch)
    assert bench_loss.main(["--level", "step", "--platform", "tpu", *TINY_STEP, "--rows", "6"]) == 2
    assert "--rows: 6 rows cannot be split over the 4 devices" in capsys.readouterr().err


def test_a_step_is_compiled_for_a_pod(tmp_path, monkeypatch):
    need_libtpu(monkeypatch)
    path = tmp_path / "figures.json"
    flags = ["--level", "step", "--platform", "tpu", "--objectives", "rspo", "--json", str(path), *TINY_STEP]
    with jax.numpy_dtype_promotion("standard"):
        assert bench_loss.main(flags) == 0
    (case,) = json.loads(path.read_text())["cases"]
    assert case["route"]["devices"] == 4 and case["route"]["meant_bytes"] == 12 * 16
    for row in case["programs"]:
        assert "seconds" not in row and row["analysis"]["peak_bytes"] > row["analysis"]["output_bytes"] > 0


def test_a_pod_that_is_not_there_is_compiled_for(tmp_path, monkeypatch):
    need_libtpu(monkeypatch)
    path = tmp_path / "figures.json"
    flags = ["--shapes", "4x128x2x2x4", "--level", "router", "--objectives", "rspo", "--router-shift", "with"]
    flags += ["--returns", "loss", "--platform", "tpu", "--topology", "v5p:2x2x1", "--json", str(path)]
    assert bench_loss.main(flags) == 0
    report = json.loads(path.read_text())
    assert report["device"] == {"platform": "tpu", "topology": "v5p:2x2x1"}
    for row in report["cases"][0]["programs"]:
        assert row["analysis"]["optimal_seconds"] > 0 and row["bound"]["peak"]["flops_per_second"] == 459e12
        assert "seconds" not in row
