"""The parts of a step at sizes that the compilers of TPUs and GPUs answer in seconds, and the message if these are
missing. Nothing runs on either."""

import importlib.util
import json

import jax
import pytest
from support.tpu_compiler import need_libtpu

from experiments.bench import parts as bench_parts
from experiments.compilers import gpu

SMALL = [
    *("--tokens", "256", "--hidden-size", "256", "--expert-size", "128", "--num-experts", "8"),
    *("--experts-per-token", "2", "--num-layers", "3", "--num-heads", "2", "--num-kv-heads", "1"),
    *("--vocab-size", "4096", "--dtypes", "bfloat16"),
]
COMPILERS = {"v5p:2x2x1": "libtpu", "h200": "jax_cuda13_plugin"}


@pytest.mark.parametrize(("topology", "install"), [("v5p:2x2x1", "libtpu"), ("h200", "'jax[cuda13]'")])
def test_it_says_what_to_install(topology, install, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    missing = COMPILERS.values()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name))
    assert bench_parts.main([*SMALL, "--topology", topology]) == 2
    assert f"pip install {install}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["h200:0", "h200:x", "h200:-1"])
def test_a_number_of_gpus_that_is_none_is_refused(name, capsys):
    assert bench_parts.main([*SMALL, "--topology", name]) == 2
    assert f"no GPU is called {name!r}" in capsys.readouterr().err


def test_what_does_not_fit_is_said_in_a_sentence(monkeypatch, capsys):
    def too_large(benchmark, compiler):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: it does not fit\nand so on")

    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    monkeypatch.setattr(bench_parts, "find_devices", lambda topology: (mesh, False))
    monkeypatch.setitem(bench_parts.PARTS, "route", too_large)
    assert bench_parts.main([*SMALL, "--parts", "route"]) == 1
    said = capsys.readouterr().err
    assert said == "error: this does not compile for v5p:2x2x1: RESOURCE_EXHAUSTED: it does not fit\n"


@pytest.mark.parametrize(
    ("name", "capability", "cores"), [("a100", "major: 8 minor: 0", 108), ("h200", "major: 9 minor: 0", 132)]
)
def test_the_compiler_is_told_of_the_chip(name, capability, cores):
    target = gpu.target_config(gpu.TARGETS[name])
    assert capability in target and f"core_count: {cores} " in target
    assert ("ACCELERATED_FEATURES" in target) == (name == "h200")
    assert target.count("{") == target.count("}") == 4


@pytest.mark.parametrize("topology", COMPILERS)
@pytest.mark.parametrize("part", bench_parts.PARTS)
def test_every_part_compiles(part, topology, tmp_path, monkeypatch):
    if topology.startswith("v5p"):
        need_libtpu(monkeypatch)
    else:
        pytest.importorskip(COMPILERS[topology], reason="NVIDIA's compiler is an optional package")
    path = tmp_path / "figures.json"
    with jax.numpy_dtype_promotion("standard"):  # Optax promotes
        assert bench_parts.main([*SMALL, "--topology", topology, "--parts", part, "--json", str(path)]) == 0
    figures = json.loads(path.read_text())["figures"]
    assert figures and all(figure["part"] == part for figure in figures)
    assert all(figure["value"] > 0 for figure in figures if "spills" not in figure["measure"])
    if part == "route":
        assert [figure["expected"] for figure in figures] == [3 * 3 * 2] * 2
    if part == "experts" and topology == "h200":
        memory, spilled = figures
        assert memory["value"] < memory["expected"] and spilled["value"] == 0
    elif part == "experts":
        flops = next(figure for figure in figures if figure["measure"] == "GFLOP")
        useful = 6 * (512 * 3 * 256 * 128 + 256 * 256 * 8) / 1e9
        assert flops["expected"] == pytest.approx(useful)


def test_ptxas_is_asked_about_kernels_with_matrix_products_only(monkeypatch, tmp_path):
    ptxas = tmp_path / "ptxas"
    ptxas.write_text(
        "#!/bin/sh\necho 'ptxas info: 0 bytes stack frame, 24 bytes spill stores, 12 bytes spill loads' >&2\n"
    )
    ptxas.chmod(0o755)
    monkeypatch.setattr(gpu, "_ptxas", lambda: ptxas)
    text = ".version 8.6\n.target sm_90a\n.visible .entry product__3(\n)\n{ wgmma.mma_async.sync; }\n"
    assert gpu.spills_of([text, text.replace("wgmma.mma_async", "add")]) == [gpu.Kernel("product", 24)]
