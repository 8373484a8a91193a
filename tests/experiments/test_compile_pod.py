"""The command that compiles for a pod: its refusals, the mesh that it chooses, its advice, and, if the TPU compiler is
installed, a whole run at small sizes."""

import importlib.util
import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import rich.console
from support.tpu_compiler import need_libtpu

from experiments import compile_pod
from experiments.compilers.chips import TPUS
from experiments.pod import programs, sweep, tables
from experiments.pod.advice import advise, micro_batches, missing_bytes
from experiments.pod.meshes import MeshFlags, suitable_sizes
from experiments.pod.presets import MODELS
from experiments.pod.programs import Setting
from experiments.pod.topologies import chip_of, count_chips, pods_of
from rspo_jax.sharding import MeshConfig

QWEN = MODELS["qwen3-30b-a3b"]
MESH = {"data": 1, "fsdp": 8, "expert": 8, "tensor": 1, "context": 1}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch", "0"], "--batch must be at least 1"),
        (["--micro-batches", "3"], "--batch 128 does not divide into 3 --micro-batches"),
        (["--seq-len", "8"], "--seq-len must be at least 16"),
        (["--prompt-len", "8192"], "--prompt-len must lie between 1 and --seq-len, 8192"),
        (["--objective", "ppo"], "unknown objective 'ppo'"),
        (["--layers", "4", "2"], "--layers must be positive and rise"),
        (["--topology", "v9:4x4"], "unknown TPU generation 'v9'"),
        (["--sweep", "fixed-total-work", "--objective", "rspo", "gmpo"], "a sweep compiles one program"),
    ],
)
def test_mistakes_are_named_before_anything_is_compiled(flags, message, capsys):
    assert compile_pod.main(flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_it_says_what_to_install(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "libtpu" else find_spec(name))
    assert compile_pod.main([]) == 2
    assert "pip install libtpu" in capsys.readouterr().err


def test_scoring_is_compared_by_whether_it_keeps_a_route():
    names = ("gmpo", "rspo", "grpo", "cispo")
    assert programs.different_objectives("score", names) == ["gmpo", "rspo"]
    assert programs.different_objectives("update", names) == list(names)


def test_programs_that_are_the_same_are_compiled_once():
    all_jobs = compile_pod.jobs(compile_pod.Pod(objective=("all",)))
    assert [job for job in all_jobs if job[0] == "score"] == [("score", "rspo"), ("score", "gmpo")]
    assert [objective for program, objective in all_jobs if program == "update"] == list(compile_pod.OBJECTIVES)
    assert [program for program, _ in all_jobs if program in ("prefill", "decode")] == ["prefill", "decode"]


@pytest.mark.parametrize(
    ("devices", "rows", "expected"),
    [
        (64, 128, {"fsdp": 8, "expert": 8, "context": 1}),
        (256, 128, {"fsdp": 16, "expert": 8, "context": 2}),
        (512, 128, {"fsdp": 16, "expert": 8, "context": 4}),
        (64, 96, {"fsdp": 4, "expert": 8, "context": 2}),
        (4, 128, {"fsdp": 1, "expert": 4, "context": 1}),
    ],
)
def test_a_mesh_that_suits(devices, rows, expected):
    sizes = suitable_sizes(QWEN, devices, rows)
    assert sizes == expected
    assert math.prod(sizes.values()) == devices
    assert MeshFlags().config(QWEN, devices, rows) == MeshConfig(**expected)


def test_where_no_mesh_suits_it_says_so():
    with pytest.raises(ValueError, match="no mesh suits 32 rows on 512 devices"):
        suitable_sizes(QWEN, 512, 32)


def test_a_given_mesh_is_taken_as_it_is():
    flags = MeshFlags(expert=4, rules=("embed=fsdp",))
    assert flags.config(QWEN, 64, 128) == MeshConfig(expert=4, rules=("embed=fsdp",))


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    setting = Setting(QWEN, MeshConfig(), batch=96, row_length=8192, prompt_length=1024)
    with pytest.raises(ValueError, match="96 rows of a micro-batch cannot be split into 64 equal parts"):
        setting.check_batch(MESH)
    with pytest.raises(ValueError, match="8191 tokens of a row cannot be split into 2"):
        Setting(QWEN, MeshConfig(), 128, 8191, 1024).check_batch(MESH | {"context": 2})


def test_pods_double():
    for generation in TPUS:
        chips = [count_chips(pod) for pod in pods_of(generation)]
        assert chips == [16 << i for i in range(len(chips))] and chips[-1] >= 256
    assert pods_of("v5p", 64, 128) == ["v5p:4x4x4", "v5p:4x4x8"]
    assert chip_of("tpu7x:4x4x4").hbm_bytes * chip_of("tpu7x:4x4x4").devices == 192 * 2**30


@pytest.mark.parametrize(("mode", "expected"), [(sweep.FIXED_PER_CHIP, [32, 128, 512]), (sweep.FIXED_TOTAL, [128] * 3)])
def test_batches_of_a_sweep(mode, expected):
    assert [sweep.batch_for(mode, 128, chips, 64) for chips in (16, 64, 256)] == expected


def figures(program="update", objective="rspo", peak=120, fits=False, **changed):
    gib = 2**30
    held = {
        "parameters": 2,
        "optimizer": 4,
        "route": 1,
        "kv_cache": 0,
        "other_arguments": 0,
        "results": 0,
        "constants": 0,
    }
    held |= {"activations": peak - 7, "peak": peak, "hbm": 95, "largest": []}
    held = {name: value if name == "largest" else value * gib for name, value in held.items()}
    held["alive"] = held["peak"] if fits else None
    flops = {name: 1e12 for name in ("total", "matrix", "kernels", "elementwise", "model", "model_with_remat")}
    moved = {"bytes": 1e9, "by_kind": [{"kind": "all-gather", "axes": ["fsdp"], "bytes": 1e9}], "largest": []}
    return {
        "program": program,
        "objective": objective,
        "layers": 48,
        "fits": fits,
        "error": "",
        "advice": ["something"],
        "memory": held,
        "flops": flops | {"seconds_at_peak": 0.1},
        "collectives": moved,
        "compile_seconds": 3.0,
        "cpu_seconds": 4.0,
        "cycles": 5.0,
        "optimal_seconds_loops_once": None,
    } | changed


SETTING = Setting(QWEN, MeshConfig(fsdp=8, expert=8), batch=128, row_length=8192, prompt_length=1024)


def test_what_would_help_is_counted():
    assert missing_bytes(figures()) == 25 * 2**30 and missing_bytes(figures(fits=True)) == 0
    assert micro_batches(SETTING, MESH) == [2]
    setting = Setting(replace(QWEN, param_dtype="float32"), SETTING.mesh, 128, 8192, 1024)
    assert advise(figures(), setting, MESH) == [
        "a pod of twice the size: about 59.5 GiB, enough",
        # Half of what is alive beside gradients and a copy of the parameters, 113 - 3 GiB, but a sum of gradients more.
        "--micro-batches 2: about 53.0 GiB, enough",
        "--param-dtype bfloat16: about 4.0 GiB",
        "the old route on the host (LearnerConfig.route_on_host): about 1.0 GiB",
    ]
    assert "--mesh.data 1 --mesh.fsdp 8: about 4.0 GiB" in advise(figures(), setting, MESH | {"data": 2, "fsdp": 4})
    assert advise(figures("decode"), SETTING, MESH) == ["--mesh.expert 16 --mesh.fsdp 4: about 1.0 GiB"]


def test_the_fewest_micro_batches_that_are_enough():
    setting = Setting(QWEN, MeshConfig(), batch=128, row_length=8192, prompt_length=1024)
    small = MESH | {"fsdp": 2}
    assert micro_batches(setting, small) == [2, 4, 8]
    assert any(sentence.startswith("--micro-batches 2:") for sentence in advise(figures(), setting, small))
    assert any(sentence.startswith("--micro-batches 4:") for sentence in advise(figures(peak=250), setting, small))
    assert any(sentence.startswith("--micro-batches 8:") for sentence in advise(figures(peak=1000), setting, small))


def test_no_smaller_parts_than_the_mesh_has():
    setting = Setting(QWEN, MeshConfig(), batch=64, row_length=8192, prompt_length=1024)
    assert micro_batches(setting, MESH) == []
    assert not any("micro-batches" in sentence for sentence in advise(figures(), setting, MESH))


def test_objectives_are_compared_with_gmpo():
    baseline = figures(objective="gmpo", peak=100)
    rows = tables.compare([figures(peak=101), baseline, figures("decode")])
    assert [(row["program"], row["objective"]) for row in rows] == [("update", "rspo")]
    assert rows[0]["peak_percent"] == pytest.approx(1) and rows[0]["hbm_percent"] == pytest.approx(100 / 95)
    assert rows[0]["flops_percent"] == 0 and rows[0]["route_bytes"] == 2**30
    assert rows[0]["alive_percent"] is None


def test_the_report_shows_what_does_not_fit_and_what_does_not_compile():
    console = rich.console.Console(width=180, record=True, file=io.StringIO())
    rows = [figures(), figures(objective="gmpo"), figures(layers=4), figures("decode", fits=False, error="RET_CHECK")]
    head = {"model": "m", "topology": "v5p:4x4x4", "devices": 64, "mesh": MESH}
    tables.show(console, head | {"programs": rows, "comparison": tables.compare(rows)})
    text = console.export_text()
    for part in ("25.00 more than there is", "would help: something", "decode, 48 layers does not compile: RET_CHECK"):
        assert part in text
    assert "fsdp 8 × expert 8" in text and "More than gmpo" in text and "Compile time, 48 layers ÷ 4" in text


def test_a_sweep_is_drawn(tmp_path):
    head = {"topology": "v5p:2x2x4", "devices": 16, "mesh": MESH, "batch": 32}
    points = [
        sweep.point(mode, head | {"programs": [figures(fits=chips > 16)]}, chips)
        for mode in (sweep.FIXED_PER_CHIP, sweep.FIXED_TOTAL)
        for chips in (16, 32)
    ]
    points.append(sweep.point(sweep.FIXED_TOTAL, head | {"programs": [figures(error="no")]}, 64))
    assert points[0]["flops"] == 1e12 and points[1]["flops"] == 0.5e12
    sweep.draw_sweep(points, "a title", tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_pod_of_small_sizes(tmp_path, monkeypatch):
    need_libtpu(monkeypatch)
    flags = ["--model", "small", "--topology", "v5p:2x2x1", "--layers", "1", "--batch", "8", "--seq-len", "128"]
    command = [sys.executable, "-m", "experiments.compile_pod", *flags, "--objective", "rspo", "gmpo"]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "small-v5p-2x2x1.json").read_text())
    by_name = {(row["program"], row["objective"]): row for row in found["programs"]}
    assert len(by_name) == 6
    update = by_name["update", "rspo"]
    assert not update["error"] and update["fits"] and not update["undeclared_kernels"]
    # float32 parameters on four devices; routers and norms may be whole, and small arrays are padded.
    assert update["memory"]["optimizer"] == pytest.approx(2 * update["memory"]["parameters"], rel=0.01)
    assert update["memory"]["route"] >= 8 * 128 * 3 * 4 // 4 and by_name["update", "gmpo"]["memory"]["route"] == 0
    assert 0.9 < update["flops"]["total"] / update["flops"]["model_with_remat"] < 2
    assert update["collectives"]["bytes"] > 0 and by_name["decode", "rspo"]["memory"]["kv_cache"] > 0
    assert [row["objective"] for row in found["comparison"]] == ["rspo", "rspo"]
