"""The whole path, once for real: transformers writes a model and a tokenizer, a run learns mathematics with RSPO, and
transformers loads the result."""

import json
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tokenizers  # noqa: E402
from tokenizers import decoders, models, pre_tokenizers, trainers  # noqa: E402

import models as rspo_models  # noqa: E402

pytestmark = pytest.mark.slow

THINGS = ["apples", "pens", "books", "coins", "shells", "cards"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STEPS = 3


def problem(index):
    """Return a problem in the style and the layout of GSM8K."""
    have, more, thing = 3 + index % 7, 2 + index % 5, THINGS[index % len(THINGS)]
    total = have + more
    return {
        "question": f"Tom has {have} {thing} and buys {more} more. How many {thing} does Tom have now?",
        "answer": f"Tom has {have} + {more} = <<{have}+{more}={total}>>{total} {thing}.\n#### {total}",
    }


def write_problems(path, indices):
    path.write_text("".join(json.dumps(problem(index)) + "\n" for index in indices))
    return path


def write_model(folder):
    corpus = [text for index in range(40) for text in problem(index).values()]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=len(fast),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        max_position_embeddings=512,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)


def command(module, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_from_a_folder_to_a_folder(tmp_path):
    source, run_dir, target = tmp_path / "source", tmp_path / "run", tmp_path / "target"
    write_model(source)
    command(
        "train",
        "mathematics",
        *("--model", source, "--run-dir", run_dir, "--steps", STEPS, "--prompts", 4, "--group-size", 4),
        *("--task.train-path", write_problems(tmp_path / "train.jsonl", range(40))),
        *("--task.test-path", write_problems(tmp_path / "test.jsonl", range(40, 46))),
        *("--task.validation", 6, "--task.workers", 1, "--mini-batches", 2, "--sampler.max-new-tokens", 24),
        *("--evaluation.problems", 4, "--optimizer.learning-rate", 1e-3, "--optimizer.warmup-updates", 0),
        # A random model is never right, so groups differ only in rewards for a box or for no answer.
        *("--task.unanswered-reward", -0.5, "--task.no-must-be-boxed"),
    )
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "gamma_mean" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert any(row["grad_norm"] > 0 for row in steps) and not any(row.get("skipped_updates") for row in steps)

    command("export", run_dir, target)
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    tokens = np.random.default_rng(0).integers(3, 300, (2, 20))
    logits = {}
    for name, folder in (("before", source), ("after", target)):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="float32", output_loading_info=True
        )
        assert not report["missing_keys"] and not report["unexpected_keys"]
        with torch.no_grad():
            logits[name] = model(torch.as_tensor(tokens)).logits.numpy()
    assert np.max(np.abs(logits["after"] - logits["before"])) > 1e-2  # it has learned something

    config, params = rspo_models.load_hf(target)
    ours = rspo_models.Transformer(config).apply({"params": params}, tokens.astype(np.int32)).logits
    assert np.max(np.abs(ours - logits["after"])) <= 1e-4
    assert transformers.AutoTokenizer.from_pretrained(target).decode([5, 9, 30])

    problems = tmp_path / "test.jsonl"
    printed = command(
        "evaluate",
        *("--model", target, "--task", "gsm8k", "--problems", problems, "--samples", 2, "--max-new-tokens", 16),
        *("--output", tmp_path / "evaluation"),
    )
    assert "pass@2" in printed and json.loads((tmp_path / "evaluation" / "summary.json").read_text())
