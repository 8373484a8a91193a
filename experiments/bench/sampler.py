"""`python -m experiments.bench_sampler`: tokens per second of our sampler, beside Hugging Face's and Tunix's.

All draw greedily with the same weights, from the same left-padded prompts, for the same number of new tokens, in
float32 on the same CPU cores. What they answer is checked before anything is timed, compilation is left out, and the
runs take turns, so that a noisy machine disturbs all alike. The rivals are optional packages, imported only when asked
for. This file must never be needed by a run.
"""

import dataclasses
import functools
import importlib
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
import tyro

import models
from experiments.bench.experts import interleaved_seconds
from experiments.bench.measure import peak_of
from experiments.config import RUNS
from rspo_jax.rollouts import SamplerConfig, generate
from rspo_jax.types import Params

Contender = Callable[[], np.ndarray]
"""Answers all prompts of a case: int32 [B, R] on the host."""

ROPE_THETA = 1e6  # Tunix's Qwen3 rotates by this base whatever its config says
TIE = 1e-4
"""How far below the likeliest token, in logits, a token may be and still count as greedy: float32 rounds differently
in every framework, and near ties fall either way."""


@dataclass(frozen=True)
class Case:
    """A model and the work to do with it."""

    model: models.TransformerConfig
    rows: int
    prompt_tokens: int
    """Width; the prompts have from half of it to all of it."""
    new_tokens: int
    group: int = 1
    """Rows in a row that have the same prompt, as in group-relative training; ours reads such a prompt once."""
    slots: int | None = None
    """Rows drawn at once, where that is not all of them: ours refills them, the others draw batch after batch."""
    stop_token: int | None = None
    """It ends a response, so that the responses of a batch differ in length."""


def _cases() -> dict[str, Case]:
    run = RUNS["countdown"]()
    countdown = dataclasses.replace(run.architecture(), rope_theta=ROPE_THETA)
    dense = dataclasses.replace(
        countdown,
        num_experts=1,
        num_experts_per_token=1,
        expert_size=countdown.num_experts_per_token * countdown.expert_size,
    )
    larger = models.TransformerConfig(
        vocab_size=8192,
        hidden_size=256,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        num_experts=32,
        num_experts_per_token=4,
        expert_size=256,
        rope_theta=ROPE_THETA,
    )
    new_tokens = run.trainer.sampler.max_new_tokens
    return {
        "countdown-64": Case(countdown, 64, 14, new_tokens),
        "countdown-512": Case(countdown, 512, 14, new_tokens),
        "countdown-64x8": Case(countdown, 512, 14, new_tokens, group=8),
        "countdown-queue": Case(countdown, 256, 14, 128, slots=32, stop_token=15),
        "dense-512": Case(dense, 512, 14, new_tokens),
        "larger-16": Case(larger, 16, 64, 64),
    }


CASES = _cases()
"""Countdown's model at two batch sizes, in groups as the trainer samples it, and with responses of different length in
the queue for 32 slots; the same with one expert of equal active width; and a larger model."""


def make_prompts(case: Case, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded int32 [B, P] tokens and their bool mask; token 0 is the padding and occurs nowhere else."""
    rng = np.random.default_rng(seed)
    shape = (case.rows // case.group, case.prompt_tokens)
    lengths = rng.integers((case.prompt_tokens + 1) // 2, case.prompt_tokens + 1, shape[0])
    mask = np.arange(case.prompt_tokens)[None, :] >= case.prompt_tokens - lengths[:, None]
    tokens = np.where(mask, rng.integers(1, case.model.vocab_size, shape), 0).astype(np.int32)
    return np.repeat(tokens, case.group, axis=0), np.repeat(mask, case.group, axis=0)


def our_sampler(case: Case, params: Params, prompts: np.ndarray, mask: np.ndarray) -> dict[str, Contender]:
    """`rspo_jax.rollouts.sampler.generate`."""
    model, keys = models.Transformer(case.model), jax.random.split(jax.random.key(0), case.rows)
    config = SamplerConfig(max_new_tokens=case.new_tokens, temperature=0.0, slots=case.slots)
    prompts, mask = prompts[:: case.group], mask[:: case.group]
    stops = () if case.stop_token is None else (case.stop_token,)

    def answer() -> np.ndarray:
        return np.asarray(generate(model, params, prompts, mask, keys, config, stops, repeats=case.group).tokens)

    return {"rspo_jax": answer}


def in_batches(case: Case, answer: Callable[[slice], np.ndarray]) -> np.ndarray:
    """All rows, as many at once as there are slots; answers may be narrower where all have ended early."""
    size = case.slots or case.rows
    tokens = np.zeros((case.rows, case.new_tokens), np.int32)
    for first in range(0, case.rows, size):
        part = answer(slice(first, first + size))
        tokens[first : first + size, : part.shape[1]] = part
    return tokens


def hf_weights(case: Case, params: Params) -> dict[str, np.ndarray]:
    """Our parameters under the names and in the shapes of `Qwen3MoeForCausalLM`; with one expert, dense layers."""
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
    """`Qwen3MoeForCausalLM` with our parameters."""
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
    """`generate` of transformers, with whichever of its caches and of its ways to run experts is fastest here."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(len(usable_cores()))
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
    seconds = interleaved_seconds(ways, repeats=1)
    fastest = min(seconds, key=lambda name: statistics.median(seconds[name]))
    return {fastest: ways[fastest]}


def tunix_weights(case: Case, params: Params) -> dict[str, Any]:
    """Our parameters as the nested dict of Tunix's `Qwen3`; with one expert, dense layers."""
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
    """Tunix's `Qwen3` with our parameters.

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
        raise ValueError("this version of Tunix arranges its parameters otherwise than the benchmark knows")
    nnx.replace_by_pure_dict(state, weights)
    nnx.update(model, state)
    return model


class _TokenIds:
    """A tokenizer for Tunix whose texts are lists of token ids. Neither padding nor end is an id that a model draws."""

    def encode(self, text: list[int]) -> list[int]:
        return text

    def decode(self, ids: list[int]) -> list[int]:
        return ids

    def bos_id(self) -> int:
        return 0  # Tunix puts none before the prompt then

    def eos_id(self) -> int:
        return -2

    def pad_id(self) -> int:
        return -1


def tunix_sampler(case: Case, params: Params, prompts: np.ndarray, mask: np.ndarray) -> dict[str, Contender]:
    """Tunix's vanilla sampler: its public call, and its compiled prefill and decoding alone."""
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
            return np.where(tokens < 0, case.stop_token or 0, tokens)  # padding stands where the stop token was

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
    """Another sampler, and what it needs."""

    modules: tuple[str, ...]
    packages: str
    build: Callable[[Case, Params, np.ndarray, np.ndarray], dict[str, Contender]]


RIVALS = {
    "hf": Rival(("torch", "transformers"), "torch transformers", hf_sampler),
    "tunix": Rival(("tunix.generate.sampler", "tunix.models.qwen3.model"), "google-tunix", tunix_sampler),
}


def check_installed(against: tuple[str, ...]) -> None:
    """Imports the rivals' modules.

    Raises:
      ValueError: if one is missing, with the packages to install.
    """
    for name in against:
        for module in RIVALS[name].modules:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise ValueError(
                    f"--against {name} needs other packages ({error}): pip install {RIVALS[name].packages}"
                ) from error


def responses(case: Case, tokens: np.ndarray) -> np.ndarray:
    """Which of the tokens [B, R] belong to a response: up to its first stop token, bool [B, R]."""
    stops = tokens == case.stop_token if case.stop_token is not None else np.zeros(tokens.shape, bool)
    return np.cumsum(stops, axis=1) - stops == 0


def check_greedy(case: Case, params: Params, prompts: np.ndarray, mask: np.ndarray, tokens: np.ndarray) -> None:
    """Every token of a response must be the likeliest one, by one uncached forward pass over prompt and answer.

    Raises:
      ValueError: if a token is more than `TIE` below the likeliest, or if there are too few or too many.
    """
    if tokens.shape != (case.rows, case.new_tokens):
        raise ValueError(f"gave tokens of shape {tokens.shape} instead of {(case.rows, case.new_tokens)}")
    inputs = np.concatenate([prompts, tokens[:, :-1]], axis=1)
    segment_ids = np.concatenate([mask, np.ones_like(tokens[:, :-1], bool)], axis=1).astype(np.int32)
    forward = jax.jit(functools.partial(models.Transformer(case.model).apply, {"params": params}))
    logits = np.asarray(forward(inputs, segment_ids=segment_ids).logits[:, case.prompt_tokens - 1 :])  # pyright: ignore
    below = logits.max(-1) - np.take_along_axis(logits, tokens[:, :, None], -1)[..., 0]
    below = np.where(responses(case, tokens), below, 0)
    if not below.max() <= TIE:
        row, step = np.unravel_index(np.argmax(below), below.shape)
        raise ValueError(f"is not greedy: token {step} of row {row} is {below[row, step]:.2g} below the likeliest one")


def product_flops(case: Case, params: Params, new_tokens: int) -> float:
    """FLOPs of all products with weights: each token of each row once through its chosen experts, and the head for each
    of the new tokens of all rows. Attention and routing, and what a sampler saves or wastes, are left out."""
    c = case.model
    layers = jax.tree.map(lambda leaf: leaf.size, params["layers"])
    experts = layers["moe"]["gate_up"] + layers["moe"]["down"]
    active = sum(jax.tree.leaves(layers)) - experts + experts * c.num_experts_per_token / c.num_experts
    head = c.hidden_size * c.vocab_size
    return 2.0 * ((case.rows * (case.prompt_tokens - 1) + new_tokens) * active + new_tokens * head)


def usable_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


@contextmanager
def on_cores(threads: int) -> Iterator[None]:
    """Keeps this thread, and those it starts, on the first cores; the frameworks size their thread pools by that.

    Raises:
      ValueError: if there are not as many.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError("the number of threads can only be set on Linux")
    cores = usable_cores()
    if not 1 <= threads <= len(cores):
        raise ValueError(f"threads must lie between 1 and the {len(cores)} cores of this machine, got {threads}")
    os.sched_setaffinity(0, cores[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def measure(name: str, case: Case, against: tuple[str, ...], repeats: int, seed: int) -> rich.table.Table:
    """Builds the contenders of a case, checks their answers and times them.

    Raises:
      ValueError: if a contender's answer is wrong.
    """
    params = models.init_params(case.model, jax.random.key(seed))
    prompts, mask = make_prompts(case, seed)
    contenders = our_sampler(case, params, prompts, mask)
    for rival in against:
        contenders |= RIVALS[rival].build(case, params, prompts, mask)
    answers = {}
    for contender, answer in contenders.items():
        tokens = answer()
        try:
            check_greedy(case, params, prompts, mask, tokens)
        except ValueError as error:
            raise ValueError(f"{name}: {contender} {error}") from error
        answers[contender] = np.where(responses(case, tokens), tokens, 0)
    lengths = responses(case, answers["rspo_jax"]).sum(axis=1)
    seconds = interleaved_seconds(contenders, repeats)
    title = f"{name}: {case.rows} rows, prompts up to {case.prompt_tokens}, {case.new_tokens} new tokens"
    if case.stop_token is not None:
        title += f" at most, {lengths.mean():.1f} on average, {case.slots} rows at once"
    table = rich.table.Table(title=title)
    flops = product_flops(case, params, lengths.sum())
    for column in ("sampler", "same answers", "median ms", "tokens/s", "GFLOP/s", "rspo_jax is faster by", "quartiles"):
        table.add_column(column, justify="left" if column == "sampler" else "right")
    for contender, times in seconds.items():
        ratios = [time / ours for time, ours in zip(times, seconds["rspo_jax"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        same = np.mean(np.all(answers[contender] == answers["rspo_jax"], axis=1))
        median = statistics.median(times)
        rate = f"{lengths.sum() / median:,.0f}"
        ratio = (f"{middle:.2f} ×", f"{low:.2f} – {high:.2f}") if contender != "rspo_jax" else ("", "")
        table.add_row(
            contender, f"{100 * same:.1f} %", f"{1e3 * median:.1f}", rate, f"{1e-9 * flops / median:.1f}", *ratio
        )
    return table


@dataclass(frozen=True)
class Benchmark:
    """Time greedy sampling from random weights, compilation left out."""

    against: tuple[Literal["hf", "tunix"], ...] = ()
    """Samplers to compare with: hf needs torch and transformers, tunix needs google-tunix."""
    cases: tuple[str, ...] = tuple(CASES)
    """Which sizes to run."""
    threads: int = 2
    """CPU cores for every sampler."""
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for case in self.cases:
            if case not in CASES:
                raise ValueError(f"unknown case {case!r}; choose among {', '.join(CASES)}")
        if self.repeats < 2:
            raise ValueError(f"repeats must be at least 2, got {self.repeats}")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for something that the user can mend."""
    try:
        benchmark = tyro.cli(Benchmark, args=arguments, prog="python -m experiments.bench_sampler")
        with on_cores(benchmark.threads):
            check_installed(benchmark.against)
            console = rich.console.Console()
            console.print(f"greedy, float32, {benchmark.threads} threads, compilation left out", highlight=False)
            peak = peak_of(jax.devices()[0].device_kind, jax.devices()[0].platform, working_set=1 << 20)
            if peak is not None:
                console.print(
                    f"One large product runs at {1e-9 * peak.flops_per_second:.0f} GFLOP/s here. GFLOP/s count the "
                    "products with weights that the answers need."
                )
            for name in benchmark.cases:
                console.print(measure(name, CASES[name], benchmark.against, benchmark.repeats, benchmark.seed))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
