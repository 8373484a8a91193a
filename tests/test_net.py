"""Digests of what the library computes, taken before its files were moved: the same numbers, bit for bit, must come out
after. Only where the digests were taken, as the last bits depend on the processor; `NET=write` takes them anew."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import platform
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import objective_cases, oracles

import models
from rspo_jax.objectives import OBJECTIVES, CorrectionConfig, RegularizerConfig
from rspo_jax.records import read_diagnostics, read_metrics
from rspo_jax.rollouts import Packing, Prompts, SamplerConfig, assemble, generate, load_problems, pack
from rspo_jax.routing import ROUTINGS, AdaptiveShiftConfig
from rspo_jax.sharding import MeshConfig
from rspo_jax.training import (
    CheckpointConfig,
    EvaluationConfig,
    LearnerConfig,
    OptimizerConfig,
    TrainerConfig,
    WarmStartConfig,
    score,
)
from rspo_jax.training.trainer import train
from rspo_jax.types import Judgement

FILE = pathlib.Path(__file__).with_name("net.json")
TIMINGS = {"step_seconds", "tokens_per_second"}


def machine():
    flags = subprocess.run(["lscpu"], capture_output=True, text=True).stdout
    lines = [line for line in flags.splitlines() if line.startswith(("Model name", "Flags"))]
    return hashlib.sha256(("".join(lines) + platform.machine()).encode()).hexdigest()[:16]


def digest(tree):
    sums = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        array = np.asarray(leaf)
        sums.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode() + array.tobytes())
    return sums.hexdigest()[:32]


def check(name, tree):
    found, known = digest(tree), json.loads(FILE.read_text()) if FILE.exists() else {}
    if os.environ.get("NET") == "write":
        known[name], known["machine"] = found, machine()
        FILE.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
        return
    if known.get("machine") != machine():
        pytest.skip("the digests were taken on another processor")
    assert found == known[name]


MODEL = models.TransformerConfig(
    vocab_size=16, hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=8, num_experts=4, expert_size=8
)
DEEP = dataclasses.replace(
    MODEL, num_layers=3, dense_layers=(0,), dense_size=16, router="sigmoid", shared_expert_size=8
)
FORMS = {"softmax": MODEL, "sigmoid": DEEP}


class Characters:
    pad_id, eos_id, stop_ids, vocabulary_size = 0, 1, (1,), 16

    def encode(self, text):
        return [2 + "0123456789abc".index(character) for character in text]

    def decode(self, ids):
        return "".join("0123456789abc"[token - 2] for token in ids if 2 <= token < 15)


class Doubling:
    tokenizer = Characters()

    def problems(self, split):
        return {"train": range(3, 43), "validation": range(44, 50), "test": range(50, 58)}[split]

    def prompt(self, problem):
        return f"{problem}a"

    def solution(self, problem):
        return f"{2 * problem}"

    def judge(self, problems, responses):
        right = [response == self.solution(problem) for problem, response in zip(problems, responses, strict=True)]
        like = [
            sum(a == b for a, b in zip(self.solution(p), r, strict=False))
            for p, r in zip(problems, responses, strict=True)
        ]
        return [Judgement(one + 0.25 * some, one) for one, some in zip(right, like, strict=True)]


@pytest.mark.parametrize(("name", "settings"), objective_cases.CASES, ids=objective_cases.case_id)
def test_objectives(name, settings):
    results = [objective_cases.run(name, oracles.random_batch(seed), settings) for seed in range(3)]
    metrics = OBJECTIVES[name].loss(
        **oracles.random_batch(3).arrays(), config=objective_cases.make_config(name, settings)
    )
    check(f"objective {name} {objective_cases.case_id(settings)}", (results, metrics))


def sample(config, routed):
    policy = models.Transformer(config)
    params = models.init_params(config, jax.random.key(3))
    tokens = jax.random.randint(jax.random.key(1), (4, 5), 2, 16, jnp.int32)
    mask = jnp.arange(5)[None, :] >= jnp.array([0, 1, 2, 4])[:, None]
    prompts = Prompts(jnp.where(mask, tokens, 0), mask)
    keys = jax.random.split(jax.random.key(2), 8)
    samples = generate(
        policy, params, prompts.tokens, prompts.mask, keys, SamplerConfig(6, slots=4), (1,), 0, 2, record_route=routed
    )
    repeated = Prompts(jnp.repeat(prompts.tokens, 2, 0), jnp.repeat(prompts.mask, 2, 0))
    return policy, params, samples, assemble(repeated, [samples])


@pytest.mark.parametrize("form", FORMS)
def test_rollout_and_score(form):
    policy, params, samples, rollout = sample(FORMS[form], True)
    check(f"rollout {form}", (samples, rollout))
    batch, _ = pack(rollout, 6, np.arange(8), Packing(2, 2, 24))
    for routing in ("free", "replay_sampler"):
        learner = LearnerConfig(routing=routing)
        check(f"score {form} {routing}", score(policy, params, batch, learner, params))


OPTIMIZER = OptimizerConfig(learning_rate=0.02, warmup_updates=2)
CONFIG = TrainerConfig(
    steps=3,
    prompts=8,
    group_size=4,
    mini_batches=2,
    seed=5,
    sampler=SamplerConfig(max_new_tokens=4),
    optimizer=OPTIMIZER,
    warm_start=WarmStartConfig(steps=8, batch_size=8, optimizer=OPTIMIZER),
    evaluation=EvaluationConfig(every=2, problems=6),
    checkpoint=CheckpointConfig(every=3),
    mesh=MeshConfig(),
)
RUNS = {
    **{routing: (CONFIG, LearnerConfig(routing=routing), MODEL) for routing in ROUTINGS},
    "sigmoid": (CONFIG, LearnerConfig(layer_aggregation="sum"), DEEP),
    "all": (
        dataclasses.replace(
            CONFIG, epochs=2, dynamic_sampling=True, overlong_buffer=2, probe_every=3, decay_learning_rate=True
        ),
        LearnerConfig(
            regularizers=RegularizerConfig(0.01, "k3", 0.01, 0.01, 0.001),
            adaptive_shift=AdaptiveShiftConfig("quantile"),
            correction=CorrectionConfig("tis"),
            micro_batches=2,
            row_length=24,
        ),
        MODEL,
    ),
    "slots": (
        dataclasses.replace(CONFIG, learned_groups=6, sampler=SamplerConfig(4, slots=8), max_prompt_tokens=3),
        LearnerConfig("grpo", OBJECTIVES["grpo"].config_type(gamma_min=0.8, gamma_gradient=True)),
        MODEL,
    ),
    **{name: (CONFIG, LearnerConfig(name), MODEL) for name in ("gmpo", "gspo", "cispo")},
}


@pytest.mark.parametrize("name", RUNS)
def test_runs(name, tmp_path):
    config, learner, model = RUNS[name]
    with jax.numpy_dtype_promotion("standard"):
        params, _ = train(
            models.Transformer(model),
            functools.partial(models.init_params, model),
            load_problems(Doubling(), config.max_prompt_tokens),
            learner,
            config,
            tmp_path,
        )
    rows = [
        {key: value for key, value in row.items() if key not in TIMINGS | {"phase"}} for row in read_metrics(tmp_path)
    ]
    arrays = [{key: value for key, value in row.items() if key != "phase"} for row in read_diagnostics(tmp_path)]
    check(f"run {name}", (rows, arrays, jax.device_get(params)))
