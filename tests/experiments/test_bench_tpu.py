"""What the TPU compiler is asked, at sizes that it answers in seconds, and the word where it is missing. Runs nothing
on a TPU."""

import importlib.util
import json

import pytest

from experiments import bench_tpu

SMALL = [
    *("--tokens", "256", "--hidden-size", "256", "--expert-size", "128", "--num-experts", "8"),
    *("--experts-per-token", "2", "--num-layers", "3", "--num-heads", "2", "--num-kv-heads", "1"),
    *("--vocab-size", "4096", "--dtypes", "bfloat16"),
]


def test_it_says_what_to_install(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find_spec(name))
    assert bench_tpu.main(SMALL) == 2
    assert "pip install libtpu" in capsys.readouterr().err


@pytest.mark.parametrize("part", bench_tpu.PARTS)
def test_every_part_compiles(part, tmp_path):
    pytest.importorskip("libtpu", reason="the TPU compiler is an optional package")
    path = tmp_path / "figures.json"
    assert bench_tpu.main([*SMALL, "--parts", part, "--json", str(path)]) == 0
    figures = json.loads(path.read_text())["figures"]
    assert figures and all(figure["part"] == part and figure["value"] > 0 for figure in figures)
    if part == "route":
        assert [figure["expected"] for figure in figures] == [3 * 3 * 2] * 2
    if part == "experts":
        flops = next(figure for figure in figures if figure["measure"] == "GFLOP")
        useful = 6 * (512 * 3 * 256 * 128 + 256 * 256 * 8) / 1e9
        assert flops["expected"] == pytest.approx(useful)
