"""Samplers of other libraries with our weights: Hugging Face's `generate` and Tunix's sampler.

The libraries are optional packages, imported only when asked for.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import timing
from experiments.bench.cores import cpu_threads
from experiments.bench.sampler_cases import Case, Contender, in_batches
from rspo_jax.types import Params


def hf_weights(case: Case, params: Params) -> dict[str, np.ndarray]:
    """Return our parameters by the names and shapes of `Qwen3MoeForCausalLM`; one expert becomes dense layers."""
    c, p = case.model, jax.tree.map(np.asarray, params)
    weights = {
        "model.embed_tokens.weight": p["embedding"],
        "model.norm.weight": p["final_norm"]["scale"],
        "lm_head.weight": p["head"].T,
    }
    for number in range(c.num_layers):
        layer = jax.tree.map(lambda array, number=number: array[number], p["layers"])
        attention, moe, name = layer["attention"], layer["moe"], f"model.layers.{number}"
        weights[f"{name}.input_layernorm.weight"] = layer["attention_norm"]["scale"]
        weights[f"{name}.post_attention_layernorm.weight"] = layer["moe_norm"]["scale"]
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v")):
            weights[f"{name}.self_attn.{theirs}_proj.weight"] = attention[ours].reshape(c.hidden_size, -1).T
        weights[f"{name}.self_attn.o_proj.weight"] = attention["output"].reshape(-1, c.hidden_size).T
        weights[f"{name}.self_attn.q_norm.weight"] = attention["query_norm"]["scale"]
        weights[f"{name}.self_attn.k_norm.weight"] = attention["key_norm"]["scale"]
        if c.num_experts == 1:
            weights[f"{name}.mlp.gate_proj.weight"] = moe["gate_up"][0, :, 0].T
            weights[f"{name}.mlp.up_proj.weight"] = moe["gate_up"][0, :, 1].T
            weights[f"{name}.mlp.down_proj.weight"] = moe["down"][0].T
        else:
            gate_up = moe["gate_up"].transpose(0, 2, 3, 1)  # [E, 2, F, D]
            weights[f"{name}.mlp.gate.weight"] = moe["router"].T
            weights[f"{name}.mlp.experts.gate_up_proj"] = gate_up.reshape(c.num_experts, -1, c.hidden_size)
            weights[f"{name}.mlp.experts.down_proj"] = moe["down"].transpose(0, 2, 1)
    return weights


def hf_model(case: Case, params: Params) -> Any:
    """Build `Qwen3MoeForCausalLM` with our parameters."""
    torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
    c = case.model
    config = transformers.Qwen3MoeConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.expert_size,
        moe_intermediate_size=c.expert_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        num_experts=c.num_experts,
        num_experts_per_tok=c.num_experts_per_token,
        norm_topk_prob=c.normalize_expert_weights,
        mlp_only_layers=list(range(c.num_layers)) if c.num_experts == 1 else [],
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        rms_norm_eps=c.rms_norm_epsilon,
        max_position_embeddings=case.prompt_tokens + case.new_tokens,
        dtype="float32",
    )
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    weights = {name: torch.tensor(np.ascontiguousarray(array)) for name, array in hf_weights(case, params).items()}
    model.load_state_dict(weights)  # strict: every weight, and no other
    return model


def hf_sampler(case: Case, params: Params, prompts: np.ndarray, mask: np.ndarray) -> dict[str, Contender]:
    """Build `generate` of transformers, with those of its caches and ways to run experts that are fastest here."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(cpu_threads())
    model = hf_model(case, params)
    ids, attention_mask = torch.tensor(prompts, dtype=torch.long), torch.tensor(mask).long()
    stops = {"pad_token_id": 0, "eos_token_id": case.stop_token}

    def answer(cache: str, experts: str) -> np.ndarray:
        model.set_experts_implementation(experts)
        options = {"do_sample": False, "max_new_tokens": case.new_tokens, "cache_implementation": cache} | stops

        def answer_batch(rows: slice) -> np.ndarray:
            with torch.inference_mode():
                tokens = model.generate(input_ids=ids[rows], attention_mask=attention_mask[rows], **options)
            return tokens[:, case.prompt_tokens :].numpy().astype(np.int32)

        return in_batches(case, answer_batch)

    ways = {
        f"hf ({cache} cache, {experts} experts)": functools.partial(answer, cache, experts)
        for cache in ("dynamic", "static")
        for experts in (("eager",) if case.model.num_experts == 1 else ("eager", "grouped_mm"))
    }
    seconds = timing.interleaved_seconds(ways, repeats=1)
    fastest = min(seconds, key=lambda name: seconds[name])
    return {fastest: ways[fastest]}


def tunix_weights(case: Case, params: Params) -> dict[str, Any]:
    """Return our parameters as the nested dict of Tunix's `Qwen3`; one expert becomes dense layers."""
    layers: dict[int, dict[str, Any]] = {}
    for number in range(case.model.num_layers):
        layer = jax.tree.map(lambda array, number=number: array[number], params["layers"])
        attention, moe = layer["attention"], layer["moe"]
        mlp = {"gate_proj": moe["gate_up"][:, :, 0], "up_proj": moe["gate_up"][:, :, 1], "down_proj": moe["down"]}
        if case.model.num_experts == 1:
            mlp = {name: {"kernel": kernel[0]} for name, kernel in mlp.items()}
        else:
            mlp["router"] = {"kernel": moe["router"]}
        layers[number] = {
            "input_layernorm": {"w": layer["attention_norm"]["scale"]},
            "post_attention_layernorm": {"w": layer["moe_norm"]["scale"]},
            "attn": {
                "q_proj": {"w": attention["query"]},
                "k_proj": {"w": attention["key"]},
                "v_proj": {"w": attention["value"]},
                "o_proj": {"w": attention["output"]},
                "q_norm": {"w": attention["query_norm"]["scale"]},
                "k_norm": {"w": attention["key_norm"]["scale"]},
            },
            "mlp": mlp,
        }
    return {
        "embedder": {"input_embedding": params["embedding"]},
        "final_norm": {"w": params["final_norm"]["scale"]},
        "lm_head": {"w": params["head"]},
        "layers": layers,
    }


def tunix_model(case: Case, params: Params) -> Any:
    """Build Tunix's `Qwen3` with our parameters.

    Raises:
      ValueError: if the installed version arranges its parameters differently.
    """
    nnx, qwen3 = (importlib.import_module(name) for name in ("flax.nnx", "tunix.models.qwen3.model"))
    c = case.model
    dense = c.num_experts == 1
    config = qwen3.ModelConfig(
        num_layers=c.num_layers,
        vocab_size=c.vocab_size,
        embed_dim=c.hidden_size,
        hidden_dim=c.expert_size,
        num_heads=c.num_heads,
        head_dim=c.head_dim,
        num_kv_heads=c.num_kv_heads,
        rope_theta=int(c.rope_theta),
        norm_eps=c.rms_norm_epsilon,
        num_experts=None if dense else c.num_experts,
        num_experts_per_tok=None if dense else c.num_experts_per_token,
    )
    model = qwen3.Qwen3(config, rngs=nnx.Rngs(0))
    state, weights = nnx.state(model), tunix_weights(case, params)
    if jax.tree.map(jnp.shape, nnx.to_pure_dict(state)) != jax.tree.map(jnp.shape, weights):
        raise ValueError("this version of Tunix arranges its parameters in a way that the benchmark does not know")
    nnx.replace_by_pure_dict(state, weights)
    nnx.update(model, state)
    return model


class _TokenIds:
    """A tokenizer for Tunix whose texts are lists of token ids. No model draws its ids of padding and end."""

    def encode(self, text: list[int]) -> list[int]:
        return text

    def decode(self, ids: list[int]) -> list[int]:
        return ids

    def bos_id(self) -> int:
        return 0  # Tunix then puts none before the prompt

    def eos_id(self) -> int:
        return -2

    def pad_id(self) -> int:
        return -1


def tunix_sampler(case: Case, params: Params, prompts: np.ndarray, mask: np.ndarray) -> dict[str, Contender]:
    """Build Tunix's vanilla sampler: its public call, and its compiled prefill and decoding alone."""
    library = importlib.import_module("tunix.generate.sampler")
    c = case.model
    slots = case.prompt_tokens + case.new_tokens
    cache = library.CacheConfig(
        cache_size=slots, num_layers=c.num_layers, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim
    )
    sampler = library.Sampler(tunix_model(case, params), _TokenIds(), cache)
    texts = [row[kept].tolist() for row, kept in zip(prompts, mask, strict=True)]
    padded = jnp.asarray(np.where(mask, prompts, _TokenIds().pad_id()))

    def answer() -> np.ndarray:
        options: dict[str, Any] = {"max_prompt_length": case.prompt_tokens, "pad_output": True}
        if case.stop_token is not None:
            options["eos_tokens"] = [case.stop_token]

        def answer_batch(rows: slice) -> np.ndarray:
            tokens = np.asarray(sampler(texts[rows], case.new_tokens, **options).tokens)
            return np.where(tokens < 0, case.stop_token or 0, tokens)  # Tunix pads in place of the stop token

        return in_batches(case, answer_batch)

    def answer_compiled() -> np.ndarray:
        state = sampler.init_sample_state(
            padded,
            total_sampling_steps=slots,
            include_logits=False,
            forbidden_token_ids=None,
            temperature=0.0,
            top_p=None,
            top_k=None,
            seed=jax.random.PRNGKey(0),
            beam_size=None,
        )
        state = sampler._compiled_prefill_fn(sampler._flattened_transformer_state, state)
        state = sampler._compiled_decode_fn(sampler._flattened_transformer_state, state)
        return np.asarray(state.token_buffer[:, case.prompt_tokens :])

    if case.slots is not None:  # the compiled part alone cannot be told a stop token
        return {"tunix": answer}
    return {"tunix": answer, "tunix (compiled part)": answer_compiled}


class Rival(NamedTuple):
    """Another library's sampler and its requirements."""

    modules: tuple[str, ...]
    """Modules to import."""
    packages: str
    """Packages that hold them, as arguments of `pip install`."""
    build: Callable[[Case, Params, np.ndarray, np.ndarray], dict[str, Contender]]
    """(case, our parameters, prompts [B, P], mask [B, P]) -> name -> contender."""


RIVAL_SAMPLERS = {
    "hf": Rival(("torch", "transformers"), "torch transformers", hf_sampler),
    "tunix": Rival(("tunix.generate.sampler", "tunix.models.qwen3.model"), "google-tunix", tunix_sampler),
}


def check_installed(against: tuple[str, ...]) -> None:
    """Import the rivals' modules.

    Raises:
      ValueError: if one is missing, naming the packages to install.
    """
    for name in against:
        for module in RIVAL_SAMPLERS[name].modules:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise ValueError(
                    f"--against {name} needs other packages ({error}): pip install {RIVAL_SAMPLERS[name].packages}"
                ) from error
