"""The families against transformers itself, in both directions, forward and backward. Needs PyTorch.

We read the folders that transformers writes, it loads ours, and both compute the same.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from support import hf_cases, hf_comparison

import models

torch = pytest.importorskip("torch")
import transformers  # noqa: E402
from support import hf_golden_live  # noqa: E402

pytestmark = pytest.mark.slow


def stored(folder):
    """Return dtype, shape and bits of each tensor, by name."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in tensors.items()}


@pytest.mark.parametrize("case", hf_cases.CASES)
def test_a_folder_of_transformers_is_read_and_written_back(case, tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    hf_golden_live.write_folder(case, theirs)
    expected = hf_golden_live.run(hf_golden_live.load(theirs), hf_cases.sequences())
    config, params = models.load_hf(theirs)
    hf_comparison.compare(config, params, expected, at_once=8)

    models.save_hf(ours, config, params)
    assert stored(ours) == stored(theirs)
    again, read = models.load_hf(ours)
    assert again == config
    assert hf_comparison.same_bits(read, params)
    found = hf_golden_live.run(hf_golden_live.load(ours), hf_cases.sequences())
    for (logits, router_logits), (other_logits, other_router_logits) in zip(expected, found, strict=True):
        np.testing.assert_array_equal(logits, other_logits)
        np.testing.assert_array_equal(router_logits, other_router_logits)


def test_weights_in_bfloat16_are_read_exactly_and_written_back(tmp_path):
    plain, theirs, ours = tmp_path / "plain", tmp_path / "theirs", tmp_path / "ours"
    hf_golden_live.write_folder("deepseek_v3", plain)
    transformers.AutoModelForCausalLM.from_pretrained(plain, dtype="bfloat16").save_pretrained(theirs)
    config, params = models.load_hf(theirs)
    assert (config.dtype, config.param_dtype) == ("bfloat16", "float32")
    model = hf_golden_live.load(theirs)
    np.testing.assert_array_equal(params["embedding"], model.model.embed_tokens.weight.detach())
    gate_up = model.model.layers[2].mlp.experts.gate_up_proj.detach()
    np.testing.assert_array_equal(params["layers_1"]["moe"]["gate_up"][1, :, :, 0], gate_up[:, :16].mT)
    np.testing.assert_array_equal(params["layers_1"]["moe"]["gate_up"][1, :, :, 1], gate_up[:, 16:].mT)

    models.save_hf(ours, config, params, source=theirs, dtype="bfloat16")
    assert stored(ours) == stored(theirs)
    kinds = {name: kind for name, (kind, *_) in stored(ours).items()}
    assert kinds["model.layers.1.mlp.gate.e_score_correction_bias"] == "float32"
    assert kinds["model.layers.1.mlp.gate.weight"] == "bfloat16"
    halves = models.load_hf(ours, param_dtype="bfloat16")[1]
    assert hf_comparison.same_bits(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), halves), params)


def test_a_folder_of_several_files_is_read_like_one(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    hf_golden_live.write_folder("gpt_oss", whole)
    hf_golden_live.load(whole).save_pretrained(parts, max_shard_size="40KB")
    assert len(list(parts.glob("*.safetensors"))) > 2
    (config, params), (other_config, other_params) = models.load_hf(whole), models.load_hf(parts)
    assert config == other_config
    assert hf_comparison.same_bits(params, other_params)


@pytest.mark.parametrize("case", hf_cases.CASES)
def test_a_config_as_transformers_4_wrote_it_says_the_same(case, tmp_path):
    new = json.loads((hf_cases.GOLDEN / case / "config.json").read_text())
    old = {name: value for name, value in new.items() if name not in ("rope_parameters", "dtype")}
    rope = dict(new["rope_parameters"])
    old |= {"torch_dtype": new["dtype"], "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    if rope["rope_type"] == "default":
        old["rope_scaling"] = None
    elif new["model_type"] == "deepseek_v3":
        rope["type"] = rope.pop("rope_type")
    if new["model_type"] == "qwen3_moe":
        old["num_experts"] = old.pop("num_local_experts")
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert models.load_config_hf(tmp_path) == models.load_config_hf(hf_cases.GOLDEN / case)
    assert transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters.items() >= new["rope_parameters"].items()


def negative_log_likelihood(config, params, tokens):
    logits = models.Transformer(config).apply({"params": params}, tokens).logits
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1))


@pytest.mark.parametrize("case", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_gradients_are_those_of_torch(case, tmp_path):
    folder, theirs, ours = tmp_path / "folder", tmp_path / "theirs", tmp_path / "ours"
    hf_golden_live.write_folder(case, folder)
    tokens = hf_cases.sequences()[1][None]
    model = hf_golden_live.load(folder)
    loss = model(torch.as_tensor(tokens), labels=torch.as_tensor(tokens)).loss
    loss.backward()
    for parameter in model.parameters():  # saved in place of the weights, the gradients get their names
        parameter.data = parameter.grad
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.zero_()
    model.save_pretrained(theirs)

    config, params = models.load_hf(folder)
    gradient = jax.jit(jax.value_and_grad(negative_log_likelihood, 1), static_argnums=0)
    value, gradients = gradient(config, params, jnp.asarray(tokens, jnp.int32))
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    models.save_hf(ours, config, gradients)
    expected, found = (load_file(path / "model.safetensors") for path in (theirs, ours))
    assert expected.keys() == found.keys()
    for name in expected:
        distance = np.linalg.norm(found[name] - expected[name])
        assert distance <= 1e-3 * np.linalg.norm(expected[name]), name
