"""The benchmark of the sampler: its prompts, its check of the answers, its messages, and, if the rivals are installed,
their answers with our weights."""

import dataclasses
import importlib
import os
import sys

import jax
import numpy as np
import pytest
from support.random_params import draw_params

import models
from experiments.bench import sampler as bench_sampler
from experiments.bench import sampler_cases, sampler_rivals
from experiments.bench.roofline import Peak
from experiments.bench.sampler import CASES
from experiments.bench.sampler_cases import Case
from experiments.bench.sampler_rivals import RIVAL_SAMPLERS, Rival

pytestmark = pytest.mark.slow  # they compile many programs

MODEL = models.TransformerConfig(
    vocab_size=40,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_experts=4,
    num_experts_per_token=2,
    expert_size=12,
    rope_theta=sampler_cases.ROPE_THETA,
)
SPARSE = Case(MODEL, rows=6, prompt_tokens=6, new_tokens=4)
DENSE = dataclasses.replace(SPARSE, model=dataclasses.replace(MODEL, num_experts=1, num_experts_per_token=1))
QUEUED = dataclasses.replace(SPARSE, new_tokens=12, slots=2, stop_token=7)


@pytest.fixture(autouse=True)
def small_cases(monkeypatch):
    monkeypatch.setattr(bench_sampler, "CASES", {"sparse": SPARSE, "dense": DENSE})
    monkeypatch.setattr(bench_sampler, "peak_of", lambda device, working_set: Peak(1e9, 1e9, ""))
    monkeypatch.setenv("COLUMNS", "160")


def prepared(case):
    return models.init_params(case.model, jax.random.key(0)), *sampler_cases.make_prompts(case, seed=1)


def call(capsys, *arguments):
    try:
        code = bench_sampler.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = exit.code
    return code, capsys.readouterr()


def rival(change):
    """A rival that gives our answers, changed."""

    def build(case, params, prompts, mask):
        ours = bench_sampler.our_sampler(case, params, prompts, mask)["rspo_jax"]
        return {"stranger": lambda: change(ours().copy())}

    return Rival((), "nothing", build)


def test_prompts_are_left_padded_and_of_many_lengths():
    case = dataclasses.replace(SPARSE, rows=200, prompt_tokens=7)
    tokens, mask = sampler_cases.make_prompts(case, seed=3)
    assert tokens.shape == mask.shape == (200, 7)
    assert tokens.dtype == np.int32
    assert set(mask.sum(axis=1)) == {4, 5, 6, 7}
    assert mask[:, -1].all() and (np.diff(mask.astype(int), axis=1) >= 0).all()
    np.testing.assert_array_equal(tokens > 0, mask)
    assert tokens.max() < case.model.vocab_size
    np.testing.assert_array_equal(tokens, sampler_cases.make_prompts(case, seed=3)[0])


def test_the_sizes_that_are_measured():
    run = sampler_cases.RUNS["countdown"]()
    assert {CASES["countdown-64"].rows, CASES["countdown-512"].rows} == {64, 512}
    for name in ("countdown-64", "countdown-512"):
        assert dataclasses.replace(CASES[name].model, rope_theta=run.model.rope_theta) == run.model
        assert CASES[name].new_tokens == run.trainer.sampler.max_new_tokens
    dense = CASES["dense-512"].model
    assert dense.num_experts == 1
    assert dense.expert_size == run.model.num_experts_per_token * run.model.expert_size


def test_the_table(monkeypatch, capsys):
    monkeypatch.setitem(RIVAL_SAMPLERS, "hf", rival(lambda tokens: tokens))
    cores = os.sched_getaffinity(0)
    code, captured = call(capsys, "--against", "hf", "--cases", "sparse", "--threads", 1, "--repeats", 2)
    assert (code, captured.err) == (0, "")
    assert "sparse: 6 rows, prompts up to 6, 4 new tokens" in captured.out
    assert "at 1 GFLOP/s here" in captured.out
    ours, theirs = (
        next(line for line in captured.out.splitlines() if name in line.split()) for name in ("rspo_jax", "stranger")
    )
    assert "100.0 %" in theirs and "×" in theirs and "×" not in ours
    assert os.sched_getaffinity(0) == cores


def one_other_token(tokens):
    tokens[1, 2] = (tokens[1, 2] + 1) % MODEL.vocab_size
    return tokens


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (one_other_token, "sparse: stranger is not greedy: token"),
        (lambda tokens: tokens[:, :-1], "sparse: stranger gave tokens of shape (6, 3) instead of (6, 4)"),
    ],
)
def test_wrong_answers_are_refused(monkeypatch, capsys, change, words):
    monkeypatch.setitem(RIVAL_SAMPLERS, "hf", rival(change))
    code, captured = call(capsys, "--against", "hf", "--cases", "sparse", "--threads", 1, "--repeats", 2)
    assert code == 2
    assert captured.err.startswith(f"error: {words}")


@pytest.mark.parametrize(
    ("name", "module", "packages"),
    [("hf", "transformers", "torch transformers"), ("tunix", "tunix.generate.sampler", "google-tunix")],
)
def test_a_missing_package_is_named(monkeypatch, capsys, name, module, packages):
    monkeypatch.setitem(sys.modules, module, None)
    code, captured = call(capsys, "--against", name, "--cases", "sparse", "--threads", 1)
    assert code == 2
    assert captured.err.startswith(f"error: --against {name} needs other packages")
    assert captured.err.endswith(f"pip install {packages}\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cases", "sparse", "--threads", 0], "threads must lie between 1 and"),
        (["--cases", "sparse", "--threads", 100_000], "cores of this machine, got 100000"),
        (["--cases", "sparse", "--repeats", 1], "repeats must be at least 2, got 1"),
        (["--cases", "huge"], "unknown case 'huge'; choose among sparse, dense"),
        (["--against", "vllm"], "vllm"),
    ],
    ids=str,
)
def test_wrong_flags(capsys, arguments, words):
    code, captured = call(capsys, *arguments)
    assert code == 2
    assert words in " ".join(captured.err.split())


@pytest.mark.parametrize("case", [SPARSE, DENSE], ids=["sparse", "dense"])
def test_our_parameters_in_their_layout(case):
    """Shapes and some entries, by the index rules of both layouts."""
    params = jax.tree.map(np.asarray, draw_params(case.model))
    c, attention, moe = case.model, params["layers"]["attention"], params["layers"]["moe"]
    weights = sampler_rivals.hf_weights(case, params)
    name = "model.layers.1"
    query = weights[f"{name}.self_attn.q_proj.weight"]
    assert query.shape == (c.num_heads * c.head_dim, c.hidden_size)
    assert query[2 * c.head_dim + 5, 7] == attention["query"][1, 7, 2, 5]
    output = weights[f"{name}.self_attn.o_proj.weight"]
    assert output[7, 2 * c.head_dim + 5] == attention["output"][1, 2, 5, 7]
    if c.num_experts == 1:
        assert weights[f"{name}.mlp.up_proj.weight"][4, 7] == moe["gate_up"][1, 0, 7, 1, 4]
        assert weights[f"{name}.mlp.down_proj.weight"][7, 4] == moe["down"][1, 0, 4, 7]
    else:
        gate_up = weights[f"{name}.mlp.experts.gate_up_proj"]
        assert gate_up.shape == (c.num_experts, 2 * c.expert_size, c.hidden_size)
        assert gate_up[3, 4, 7] == moe["gate_up"][1, 3, 7, 0, 4]
        assert gate_up[3, c.expert_size + 4, 7] == moe["gate_up"][1, 3, 7, 1, 4]
        assert weights[f"{name}.mlp.experts.down_proj"][3, 7, 4] == moe["down"][1, 3, 4, 7]
        assert weights[f"{name}.mlp.gate.weight"][3, 7] == moe["router"][1, 7, 3]


@pytest.mark.parametrize("case", [SPARSE, DENSE, QUEUED], ids=["sparse", "dense", "queue"])
@pytest.mark.parametrize("name", list(RIVAL_SAMPLERS))
@pytest.mark.filterwarnings("default")  # those of other libraries
def test_rivals_with_our_weights_give_our_answers(name, case):
    for module in RIVAL_SAMPLERS[name].modules:
        try:
            importlib.import_module(module)
        except ImportError:
            pytest.skip(f"needs {RIVAL_SAMPLERS[name].packages}")
    params, prompts, mask = prepared(case)
    expected = bench_sampler.our_sampler(case, params, prompts, mask)["rspo_jax"]()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        contenders = RIVAL_SAMPLERS[name].build(case, params, prompts, mask)
        for answer in contenders.values():
            kept = sampler_cases.responses(case, expected)
            np.testing.assert_array_equal(np.where(kept, answer(), 0), np.where(kept, expected, 0))


def test_groups_share_their_prompts():
    case = dataclasses.replace(SPARSE, group=3)
    prompts, mask = sampler_cases.make_prompts(case, seed=0)
    assert prompts.shape == (6, 6)
    np.testing.assert_array_equal(prompts[[0, 0, 3, 3]], prompts[[1, 2, 4, 5]])
    assert np.any(prompts[0] != prompts[3])
    params = models.init_params(MODEL, jax.random.key(0))
    shared, separate = (bench_sampler.our_sampler(each, params, prompts, mask)["rspo_jax"]() for each in (case, SPARSE))
    np.testing.assert_array_equal(shared, separate)


def test_responses_end_with_their_stop_token():
    tokens = np.array([[3, 7, 7, 3], [7, 0, 0, 0], [3, 3, 3, 3], [3, 3, 3, 7]])
    expected = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    np.testing.assert_array_equal(sampler_cases.responses(QUEUED, tokens), expected)
    assert sampler_cases.responses(SPARSE, tokens).all()


def test_batches_may_end_early():
    answers = {0: np.full((2, 3), 1), 2: np.full((2, 12), 2), 4: np.full((2, 1), 3)}
    tokens = sampler_cases.in_batches(QUEUED, lambda rows: answers[rows.start])
    assert tokens.shape == (6, 12) and tokens.dtype == np.int32
    np.testing.assert_array_equal(np.count_nonzero(tokens, axis=1), [3, 3, 12, 12, 1, 1])


def test_a_queue_is_timed_by_the_tokens_of_its_responses(monkeypatch, capsys):
    """A rival may leave anything behind a stop token, and nothing else than the likeliest tokens before it."""
    params, prompts, mask = prepared(SPARSE)
    free = bench_sampler.our_sampler(SPARSE, params, prompts, mask)["rspo_jax"]()
    queue = dataclasses.replace(SPARSE, slots=2, stop_token=int(free[0, 1]))
    lengths = sampler_cases.responses(queue, free).sum(axis=1)
    assert 0 < lengths.mean() < 4

    def rubbish_at_the_end(tokens):
        return np.where(sampler_cases.responses(queue, tokens), tokens, 5)

    monkeypatch.setattr(bench_sampler, "CASES", {"queue": queue})
    monkeypatch.setattr(bench_sampler, "make_prompts", lambda case, seed: (prompts, mask))
    monkeypatch.setitem(RIVAL_SAMPLERS, "hf", rival(rubbish_at_the_end))
    code, captured = call(capsys, "--against", "hf", "--cases", "queue", "--threads", 1, "--repeats", 2)
    assert (code, captured.err) == (0, "")
    assert f"4 new tokens at most, {lengths.mean():.1f} on average, 2 rows at once" in " ".join(captured.out.split())
    assert "100.0 %" in next(line for line in captured.out.splitlines() if "stranger" in line)


def test_flops_of_products():
    params, _, _ = prepared(SPARSE)
    c = MODEL
    attention = 2 * c.hidden_size * c.head_dim * (c.num_heads + c.num_kv_heads) + 2 * c.head_dim + 2 * c.hidden_size
    active = attention + c.hidden_size * c.num_experts + c.num_experts_per_token * 3 * c.hidden_size * c.expert_size
    head = c.hidden_size * c.vocab_size
    expected = 2 * (c.num_layers * active * (6 * 5 + 12) + 12 * head)
    assert bench_sampler.product_flops(SPARSE, params, 12) == expected
