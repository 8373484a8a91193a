"""Hugging Face folders of tiny models with random weights, for tests that go from a folder to a folder."""

import dataclasses
import json
from pathlib import Path

import jax
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

import models
from support import hf_cases

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_model(folder: Path, case: str = "qwen3_moe", seed: int = 0) -> Path:
    """Write a folder with a model of a family, and a tokenizer of single bytes with a chat template."""
    config = dataclasses.replace(models.load_config_hf(hf_cases.GOLDEN / case), vocab_size=257)
    models.save_hf(folder, config, models.init_params(config, jax.random.key(seed)))
    vocabulary = {token: index for index, token in enumerate(["<|end|>", *sorted(ByteLevel.alphabet())])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
