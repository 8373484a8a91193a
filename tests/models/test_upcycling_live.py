"""Upcycled folders in transformers: it loads them, and they compute the same as the dense model. Needs PyTorch."""

import numpy as np
import pytest
from support import hf_cases

import models
from models.upcycling import UpcyclingConfig, upcycle, upcycled_config

torch = pytest.importorskip("torch")
import transformers  # noqa: E402

pytestmark = pytest.mark.slow


def logits(folder):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype="float32", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        outputs = [model.eval()(torch.as_tensor(tokens)[None]).logits[0].numpy() for tokens in hf_cases.sequences()]
    return type(model).__name__, np.concatenate(outputs)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("qwen3", "Qwen3MoeForCausalLM"),
        ("qwen3_linear", "Qwen3MoeForCausalLM"),
        ("qwen2", "Qwen2MoeForCausalLM"),
        ("qwen2_sliding", "Qwen2MoeForCausalLM"),
    ],
)
def test_transformers_computes_what_it_did_before(case, name, split, tmp_path):
    source, target = tmp_path / "dense", tmp_path / "sparse"
    source.mkdir()
    hf_cases.write_golden_folder(case, source)
    config, params = models.load_hf(source)
    upcycling = UpcyclingConfig(num_experts=8, num_experts_per_token=4, expert_split=split)
    models.save_hf(target, upcycled_config(config, upcycling), upcycle(config, params, upcycling), source=source)
    _, before = logits(source)
    found, after = logits(target)
    assert found == name
    assert np.max(np.abs(after - before)) <= 2e-6 * np.max(np.abs(before))
