"""`python -m experiments.upcycle`: the new folder, which computes the same as the old one, and the refusals."""

import functools
import json
import os

import jax
import numpy as np
import pytest
import safetensors.numpy
from support import hf_cases

import models
from experiments import upcycle

OPTIONS = ("--num-experts", "4", "--num-experts-per-token", "2")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A dense model with the files of a tokenizer, and others."""

    def make(case):
        folder = tmp_path_factory.mktemp(case)
        hf_cases.write_golden_folder(case, folder)
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"auto_map": {"AutoModel": "own.Model"}}))
        (folder / "tokenizer.json").write_text("{}")
        (folder / "README.md").write_text("A dense model.")
        return folder

    return functools.cache(make)


@pytest.fixture
def source(folder_of):
    """A dense Qwen2 with windows in some layers and tied embeddings."""
    return folder_of("qwen2_sliding")


def call(capsys, *arguments):
    try:
        code = upcycle.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = exit.code
    return code, capsys.readouterr()


def logits(folder):
    config, params = models.load_hf(folder)
    tokens = hf_cases.sequences()[1][None].astype(np.int32)
    return np.asarray(jax.jit(models.Transformer(config).apply)({"params": params}, tokens).logits)


def count(folder):
    return sum(array.size for array in safetensors.numpy.load_file(folder / "model.safetensors").values())


def test_a_qwen3_becomes_a_mixture_that_computes_the_same(folder_of, tmp_path, capsys):
    source, target = folder_of("qwen3_linear"), tmp_path / "sparse"
    code, printed = call(capsys, source, target, *OPTIONS)
    assert code == 0, printed.err
    before, after = logits(source), logits(target)
    assert np.max(np.abs(after - before)) <= 2e-6 * np.max(np.abs(before))
    assert sorted(os.listdir(target)) == ["config.json", "model.safetensors", "tokenizer.json"]
    values = json.loads((target / "config.json").read_text())
    assert values["model_type"] == "qwen3_moe" and values["architectures"] == ["Qwen3MoeForCausalLM"]
    assert values["max_position_embeddings"] == 64
    assert (values["eos_token_id"], values["pad_token_id"], values["dtype"]) == (1, 0, "float32")
    assert "auto_map" not in values

    dense, total = count(source), count(target)
    assert total == dense + 3 * (32 * 4 + 3 * 3 * 32 * 48)
    active = dense + 3 * (32 * 4 + 3 * 32 * 48)
    assert printed.out.splitlines() == [
        f"{source}: dense, {dense:,} parameters",
        f"{target}: 4 experts of width 48 a layer, 2 a token; {total:,} parameters, of which a token activates "
        f"{active:,}",
    ]


def test_a_qwen2_gets_a_shared_expert_and_may_be_bfloat16(source, tmp_path, capsys):
    options = ("--expert-split", 2, "--shared-expert-size", 5, "--param-dtype", "bfloat16")
    routers = []
    for seed in (0, 0, 1):
        target = tmp_path / f"{len(routers)}"
        code, printed = call(capsys, source, target, *OPTIONS, *options, "--seed", seed)
        assert code == 0, printed.err
        values = json.loads((target / "config.json").read_text())
        assert (values["dtype"], values["model_type"]) == ("bfloat16", "qwen2_moe")
        assert values["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]
        tensors = safetensors.numpy.load_file(target / "model.safetensors")
        assert {str(array.dtype) for array in tensors.values()} == {"bfloat16"}
        assert not np.any(tensors["model.layers.0.mlp.shared_expert.down_proj.weight"].astype(np.float32))
        routers.append(tensors["model.layers.0.mlp.gate.weight"].astype(np.float32))
    np.testing.assert_array_equal(routers[0], routers[1])
    assert np.mean(routers[0] != routers[2]) > 0.9

    added = 3 * (32 * 4 + 3 * 32 * 5 + 32)  # routers, shared experts and their gates
    dense, total = count(source), count(target)
    assert total == dense + added + 3 * 3 * 32 * 48
    assert f"4 experts of width 24 a layer, 2 a token, and a shared one of width 5; {total:,}" in printed.out
    assert printed.out.endswith(f"activates {dense + added:,}\n")


def edited(source, folder, **fields):
    """Make a folder with the source's config.json, changed, and without weights."""
    folder.mkdir()
    values = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | fields))
    return folder


def test_options_that_cannot_be(source, tmp_path, capsys):
    for options, words in (
        (("--num-experts", 4, "--num-experts-per-token", 5), "a layer has only 4 experts"),
        (("--expert-split", 5, "--num-experts", 10, "--num-experts-per-token", 5), "48, is not a multiple"),
        (("--noise", -1), "noise must be 0 or more"),
        (("--seed", -1), "seed must be 0 or more"),
    ):
        code, printed = call(capsys, source, tmp_path / "target", *options)
        assert code == 2 and words in printed.err and not (tmp_path / "target").exists()


def test_a_target_that_holds_something_is_left_alone(source, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    for target in (tmp_path, tmp_path / "notes.txt"):
        code, printed = call(capsys, source, target)
        assert code == 2 and f"{target} exists already and is not an empty folder" in printed.err
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_sources_that_are_no_dense_model(source, tmp_path, capsys):
    moe = tmp_path / "moe"
    moe.mkdir()
    (moe / "config.json").write_text((hf_cases.GOLDEN / "qwen3_moe" / "config.json").read_text())
    for folder, words in (
        (tmp_path / "nothing", "it has no config.json"),
        (moe, "has 6 experts a layer already: only a dense model can be upcycled"),
        (edited(source, tmp_path / "other", model_type="llama"), "has the model_type 'llama'"),
        (edited(source, tmp_path / "windows", model_type="qwen3"), "windows in 2 of 3 layers"),
        (edited(source, tmp_path / "weightless"), "model.safetensors"),
    ):
        code, printed = call(capsys, folder, tmp_path / "target")
        assert code == 2 and words in printed.err, printed.err
        assert printed.err.startswith("error: ") and not (tmp_path / "target").exists()
