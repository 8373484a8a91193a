"""Whole folders, saved and loaded: the files that go along, the dtypes, and the refusals.

The results of models are tested elsewhere, and so is the placement on several devices (`test_devices.py`).
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import hf_cases

import models
from models.hugging_face.reading import list_tensors

WEIGHTS = "model.safetensors"
TOKENIZER = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tiktoken.model",
    "tokenization_own.py",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


def make_folder(folder, case, **changes):
    """Make the folder of a case, with changes to config.json."""
    folder.mkdir()
    hf_cases.write_golden_folder(case, folder)
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def change_tensors(folder, changes, without=()):
    tensors = load_file(folder / WEIGHTS)
    for name in without:
        del tensors[name]
    save_file(tensors | changes, folder / WEIGHTS)


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.fixture(scope="module")
def fresh():
    """A model that did not come from a folder."""
    config, random = models.TransformerConfig(), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: models.init_params(config, key), jax.random.key(0))
    return config, jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), shapes)


@pytest.fixture(scope="module")
def saved(fresh, tmp_path_factory):
    """The folder of the fresh model."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    models.save_hf(folder, *fresh)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A folder of a dense model with tied embeddings, and the configuration and parameters read from it."""
    folder = make_folder(tmp_path_factory.mktemp("dense") / "model", "qwen3")
    return folder, *models.load_hf(folder)


def test_a_fresh_model_comes_back_bit_by_bit(fresh, saved):
    config, params = fresh
    found, read = models.load_hf(saved)
    assert found == config
    assert_same_bits(read, params)
    values = json.loads((saved / "config.json").read_text())
    assert (values["architectures"], values["dtype"]) == (["Qwen3MoeForCausalLM"], "float32")


def test_the_tokenizer_and_what_is_no_mathematics_go_along(dense, tmp_path):
    _, config, params = dense
    source = make_folder(
        tmp_path / "source",
        "qwen3",
        max_position_embeddings=9,
        eos_token_id=[1, 7],
        auto_map={"AutoConfig": "configuration_own.Own"},
        torch_dtype="bfloat16",
        transformers_version="4.0.0",
    )
    others = ("README.md", "modeling_own.py", "optimizer.bin")
    for name in (*TOKENIZER, *others):
        (source / name).write_text(f"this is {name}")
    (source / "tokenizer_folder").mkdir()
    models.save_hf(tmp_path / "saved", config, params, source)
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {*TOKENIZER, "config.json", WEIGHTS}
    for name in TOKENIZER:
        assert (tmp_path / "saved" / name).read_text() == f"this is {name}"
    values = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (values["max_position_embeddings"], values["eos_token_id"], values["pad_token_id"]) == (9, [1, 7], 0)
    assert not {"auto_map", "torch_dtype", "transformers_version", "rope_parameters"} & values.keys()
    assert models.load_config_hf(tmp_path / "saved") == config


def test_of_another_model_s_mathematics_nothing_stays(fresh, tmp_path):
    config, params = fresh
    source = make_folder(
        tmp_path / "source",
        "qwen2_moe_sliding",
        rope_parameters=None,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
        max_position_embeddings=9,
    )
    models.save_hf(tmp_path / "saved", config, params, source)
    assert models.load_config_hf(tmp_path / "saved") == config
    values = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert values["max_position_embeddings"] == 9
    assert not {"rope_scaling", "layer_types", "shared_expert_intermediate_size"} & values.keys()


def test_a_source_that_is_no_model_is_refused(fresh, tmp_path):
    with pytest.raises(ValueError, match="is not a Hugging Face folder"):
        models.save_hf(tmp_path / "saved", *fresh, source=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_not_written_to(fresh, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already and is not an empty folder"):
        models.save_hf(tmp_path, *fresh)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_model_of_no_family_is_not_written(fresh, tmp_path):
    config = models.TransformerConfig(router="sigmoid")
    with pytest.raises(ValueError, match="no family of Hugging Face models"):
        models.save_hf(tmp_path / "saved", config, fresh[1])
    assert not list(tmp_path.iterdir())


ONES = np.ones(3, np.float32)
QUERY, MATRIX = "model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.experts.5.up_proj.weight"


@pytest.mark.parametrize(
    ("case", "changes", "without", "message"),
    [
        ("qwen3_moe", {}, [MATRIX], f"lacks {MATRIX}, which the model needs$"),
        ("qwen3", {"model.layers.0.mlp.extra": ONES}, [], "holds model.layers.0.mlp.extra, which the model does"),
        ("qwen3", {QUERY: ONES}, [], rf"{QUERY} in .* has shape \[3\], where the model needs \[48, 32\]"),
        ("qwen3", {QUERY: ONES.astype(np.int32)}, [], f"{QUERY} in .* is of dtype I32"),
        ("qwen2", {}, ["lm_head.weight"], "lacks lm_head.weight, which the model needs$"),
        ("qwen3", {"model.lm_head.weight": ONES}, [], "holds model.lm_head.weight, which"),
        # There is one head for further tokens, and layer 3 belongs to it.
        (
            "deepseek_v3",
            {"model.layers.3.eh_proj.weight": ONES, "model.layers.4.eh_proj.weight": ONES},
            [],
            "it holds model.layers.4.eh_proj.weight, which the model does not know$",
        ),
        ("qwen3", {"model.layers.3.mlp.gate.weight": ONES}, [], "holds model.layers.3.mlp.gate.weight, which"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(case, changes, without, message, tmp_path):
    folder = make_folder(tmp_path / "model", case)
    change_tensors(folder, changes, without)
    with pytest.raises(ValueError, match=message):
        models.load_hf(folder)


def test_a_tied_model_may_hold_its_head_twice(dense, tmp_path):
    folder, config, params = dense
    assert config.tie_embeddings and "lm_head.weight" not in load_file(folder / WEIGHTS)
    twice = make_folder(tmp_path / "twice", "qwen3")
    embedding = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    change_tensors(twice, {"lm_head.weight": embedding, "model.layers.0.self_attn.rotary_emb.inv_freq": ONES})
    found, read = models.load_hf(twice)
    assert found == config
    assert_same_bits(read, params)


def test_parameters_get_the_dtype_asked_for_but_for_corrections(tmp_path):
    folder = make_folder(tmp_path / "model", "moonlight", num_hidden_layers=1, first_k_dense_replace=0)
    tensors = load_file(folder / WEIGHTS).items()
    # Layer 1 is now the only one, and layer 2 a head for further tokens.
    renamed = {name.replace("layers.1.", "layers.0."): tensor for name, tensor in tensors if "layers.0." not in name}
    save_file({name.replace("layers.2.", "layers.1."): tensor for name, tensor in renamed.items()}, folder / WEIGHTS)
    config, params = models.load_hf(folder, "bfloat16", "bfloat16", "full")
    assert (config.dtype, config.param_dtype, config.remat) == ("bfloat16", "bfloat16", "full")
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    corrections = params["layers"]["moe"]["correction_bias"]
    np.testing.assert_array_equal(corrections[0], renamed[name])
    others = [leaf for leaf in jax.tree.leaves(params) if leaf is not corrections]
    assert (corrections.dtype, {leaf.dtype.name for leaf in others}) == (jnp.float32, {"bfloat16"})

    models.save_hf(tmp_path / "saved", config, params, folder, dtype="bfloat16")
    kinds = {tensor: stored.dtype for tensor, stored in list_tensors(tmp_path / "saved").items()}
    assert (kinds.pop(name), {*kinds.values()}) == ("F32", {"BF16"})
    values = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (values["dtype"], values["num_nextn_predict_layers"]) == ("bfloat16", 0)
