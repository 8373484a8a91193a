"""The training loop in this process, with a policy of two small experts and the task of translating a digit: what a run
leaves behind, that it learns, that it is a function of its seed, and that a run stopped by a signal at any point ends,
once resumed, like one that was not. Knows no real model, and reads checkpoints by the trainer alone."""

import dataclasses
import functools
import itertools
import math
import os
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from rspo_jax.objectives import RegularizerConfig
from rspo_jax.records import read_diagnostics, read_metrics
from rspo_jax.records.manifest import CheckpointMismatch
from rspo_jax.records.samples import read_samples
from rspo_jax.rollouts import SamplerConfig, load_problems
from rspo_jax.routing import AdaptiveShiftConfig
from rspo_jax.sharding import MESH_AXES
from rspo_jax.stopwatch import STAGES, Stopwatch
from rspo_jax.training import (
    CheckpointConfig,
    EvaluationConfig,
    LearnerConfig,
    OptimizerConfig,
    SamplesConfig,
    TrainerConfig,
    WarmStartConfig,
    check_learner,
    check_mesh,
    trainer,
)
from rspo_jax.training.metrics import rate_change
from rspo_jax.training.restore import restore_params
from rspo_jax.training.state import fresh_state
from rspo_jax.training.trainer import Setup, Stopped, train
from rspo_jax.types import Judgement, ModelOutput, RouterReading

PARTS = {f"seconds_{stage}" for stage in STAGES}
OF_ANY_ROW = {"compile_seconds", "overlapped_seconds", "peak_memory_gib"} | PARTS
TIMINGS = {"step_seconds", "tokens_per_second"} | OF_ANY_ROW
DIGITS, LETTERS = "01234", "abcde"


class Characters:
    """One id a digit, and one a letter."""

    pad_id, eos_id, stop_ids = 0, 1, (1,)
    vocabulary_size = 2 + len(DIGITS + LETTERS)

    def encode(self, text):
        return [2 + (DIGITS + LETTERS).index(character) for character in text]

    def decode(self, ids):
        return "".join((DIGITS + LETTERS)[token - 2] for token in ids if token >= 2)


class TranslationTask:
    """ "3" is to be answered "d". It counts the prompts that it is asked for, so that a run can be stopped anywhere."""

    tokenizer = Characters()

    def __init__(self, signal_at=None, number=signal.SIGTERM):
        self.prompts, self.signal_at, self.number = 0, signal_at, number
        self.seen = []

    def problems(self, split):
        return {"train": DIGITS * 2, "validation": DIGITS * 4, "test": DIGITS[::-1] * 3 + "0"}[split]

    def prompt(self, problem):
        self.prompts += 1
        self.seen.append(problem)
        if self.prompts == self.signal_at:
            os.kill(os.getpid(), self.number)
        return problem

    def solution(self, problem):
        return LETTERS[DIGITS.index(problem)]

    def judge(self, problems, responses):
        correct = [response == self.solution(problem) for problem, response in zip(problems, responses, strict=True)]
        return [Judgement(self.reward(*pair), pair[1]) for pair in zip(problems, correct, strict=True)]

    def reward(self, problem, correct):
        return float(correct)


def read_layer(reader, router_logits):
    """What a reader sees of a single layer, [1, B, T, E], that activates one expert."""
    if reader is None:
        return None
    read, layer_logits = jax.tree.map(lambda leaf: leaf[0], (reader.read, router_logits))
    carry, reading = read(reader.carry, layer_logits, jax.lax.top_k(layer_logits, 1)[1])
    return RouterReading(carry, jax.tree.map(lambda leaf: leaf[None], reading))


class TwoExperts:
    """A mixture of two tables of next-token logits, [E, V, V], with a router [1, V, E]; it compiles quickly."""

    router_score = "softmax"

    def apply(self, variables, tokens, positions=None, segment_ids=None, cache=None, router_reader=None):
        params = variables["params"]
        router_logits = params["router"][:, tokens]
        weights = jax.nn.softmax(router_logits[0], axis=-1)
        logits = jnp.einsum("bte,ebtv->btv", weights, params["experts"][:, tokens])
        return ModelOutput(logits, router_logits, cache, reading=read_layer(router_reader, router_logits))

    def init_cache(self, batch_size, length):
        return jnp.zeros((batch_size, length))

    def repeat_cache(self, cache, repeats):
        return jnp.repeat(cache, repeats, axis=0)

    def cast_params(self, params):
        return params

    def router_params(self):
        return {"experts": False, "router": True}

    def param_axes(self):
        return {"experts": (None, None, None), "router": (None, None, None)}


POLICY = TwoExperts()


def init_params(key, experts=2):
    keys, size = jax.random.split(key), Characters.vocabulary_size
    return {
        "experts": 0.1 * jax.random.normal(keys[0], (experts, size, size)),
        "router": jax.random.normal(keys[1], (1, size, experts)),
    }


# One shape for rollouts and evaluations, so that little is compiled: 8 × 4 responses in 2 chunks, and 16 problems.
LEARNER = LearnerConfig()
PEAK = 0.3
OPTIMIZER = OptimizerConfig(learning_rate=PEAK, warmup_updates=2)
CONFIG = TrainerConfig(
    steps=4,
    prompts=8,
    group_size=4,
    mini_batches=2,
    epochs=1,
    rollout_chunks=2,
    seed=5,
    sampler=SamplerConfig(max_new_tokens=3),
    optimizer=OPTIMIZER,
    warm_start=WarmStartConfig(steps=5, batch_size=6, optimizer=OPTIMIZER),
    evaluation=EvaluationConfig(every=2, problems=16),
    checkpoint=CheckpointConfig(every=3, keep=20),
)


@pytest.fixture(autouse=True)
def promotion_as_optax_needs_it():
    """Optax multiplies Python floats with int32 counts, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def run(run_dir, config=CONFIG, task=None, learner=LEARNER, resume=False, init=init_params):
    """The final parameters on the host, and the rows without timings."""
    problems = load_problems(task or TranslationTask(), config.max_prompt_tokens)
    params, seconds = train(Setup(POLICY, init, problems, learner, config), run_dir, resume)
    assert seconds > 0
    return bits(params), rows_of(run_dir)


def rows_of(run_dir):
    return [{name: row[name] for name in row if name not in TIMINGS} for row in read_metrics(run_dir)]


def bits(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def checkpoints_in(run_dir):
    return sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir() if path.name.isdigit())


def change(config, **changes):
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An uninterrupted run: its folder, final parameters and rows."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    with jax.numpy_dtype_promotion("standard"):
        return run_dir, *run(run_dir)


# --- what a run leaves behind ---


def test_rows_come_in_the_order_of_the_run(straight):
    _, _, rows = straight
    expected = [("warm_start", step) for step in range(1, 6)] + [("rl", step) for step in range(5)]
    assert [(row["phase"], row["step"]) for row in rows] == expected


def test_what_the_rows_hold(straight):
    run_dir, _, _ = straight
    rows = read_metrics(run_dir)
    warm_start = {"phase", "step", "loss", "grad_norm", "skipped_updates", "learned_updates", "learning_rate"} | TIMINGS
    warm_start |= {"padding_fraction", "response_tokens"}
    assert all(set(row) == warm_start for row in rows[:5])
    evaluation = {f"eval_{mode}{bound}" for mode in ("greedy", "sampled") for bound in ("", "_low", "_high")}
    test = {name.replace("eval", "test") for name in evaluation}
    assert set(rows[5]) == {"phase", "step"} | evaluation | test | OF_ANY_ROW
    of_a_step = {"reward", "solve_rate", "loss", "grad_norm", "gamma_mean", "clip_fraction", "entropy", "sampler_kl"}
    of_a_step |= {"informative_groups", "response_length", "truncated_fraction", "unjudged", "approx_kl"} | warm_start
    for row in rows[6:]:
        assert of_a_step <= set(row)
        assert bool(evaluation & set(row)) == (row["step"] in (2, 4))
        assert bool(test & set(row)) == (row["step"] == 4)
        assert all(math.isfinite(value) for name, value in row.items() if name != "phase")
        assert row["response_tokens"] == pytest.approx(row["response_length"] * 32)
        assert 0 < row["step_seconds"] == pytest.approx(sum(row[part] for part in PARTS))
        assert row["tokens_per_second"] == pytest.approx(row["response_tokens"] / row["step_seconds"])
        assert 1 <= row["response_length"] <= 3
        assert 0 <= row["reward"] <= 1
        assert 0 <= row["entropy"] <= math.log(Characters.vocabulary_size)
        assert 0 < row["gamma_mean"] <= 1
        assert 0 <= row["padding_fraction"] < 1
        # The sampler and the scoring pass are the same policy.
        assert row["sampler_kl"] == pytest.approx(0, abs=1e-6)
    for row in (rows[5], rows[9]):
        for name in ("eval_greedy", "eval_sampled", "test_greedy", "test_sampled"):
            assert 0 <= row[f"{name}_low"] <= row[name] <= row[f"{name}_high"] <= 1
            assert row[name] * 16 == round(row[name] * 16)


def test_compiling_is_told_before_the_first_step(tmp_path, capsys):
    problems = load_problems(TranslationTask(), None)
    fresh = Setup(TwoExperts(), init_params, problems, LEARNER, change(CONFIG, steps=1))
    train(fresh, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"compiling the warm-start update … [\d.]+ s", lines[0]) and lines[1].startswith(
        "warm start 1/5"
    )
    told = {re.sub(r" \(variant \d\)", "", line.split(" … ")[0]) for line in lines if line.startswith("compiling")}
    assert told == {f"compiling {words}" for words in trainer.PROGRAMS.values()}
    rows = read_metrics(tmp_path)
    assert 0 < rows[0]["compile_seconds"] <= rows[0]["step_seconds"]
    assert rows[2]["compile_seconds"] == 0  # compiled once


def test_learning_rates_are_those_that_the_updates_used(straight):
    _, _, rows = straight
    cosine = [PEAK * (1 + math.cos(math.pi * step / 3)) / 2 for step in range(3)]  # decays over the phase's 5 updates
    assert [row["learning_rate"] for row in rows[:5]] == pytest.approx([0, PEAK / 2, *cosine], abs=1e-7)
    # Two updates a step: the first of each is reported.
    assert [row["learning_rate"] for row in rows[6:]] == pytest.approx([0, PEAK, PEAK, PEAK], abs=1e-7)


def test_learning_rates_that_decay_over_the_whole_run(tmp_path):
    config = change(CONFIG, decay_learning_rate=True)
    assert config.decaying_optimizer.decay_updates == 8
    assert change(config, epochs=3).decaying_optimizer.decay_updates == 24
    _, rows = run(tmp_path, config)
    cosine = [PEAK * (1 + math.cos(math.pi * update / 6)) / 2 for update in (0, 2, 4)]
    assert [row["learning_rate"] for row in rows[6:]] == pytest.approx([0, *cosine], abs=1e-7)
    given = OptimizerConfig(decay_updates=100)
    assert change(config, optimizer=given).decaying_optimizer == given
    assert change(config, optimizer=given, decay_learning_rate=False).decaying_optimizer == given


def test_checkpoints_are_where_they_were_asked_for(straight):
    run_dir, params, _ = straight
    # Every third step of either phase, and the end of each: 3, 5 of the warm start, then 5 + 3 and 5 + 4.
    assert checkpoints_in(run_dir) == [3, 5, 8, 9]
    assert list((run_dir / "tensorboard").rglob("events.out.tfevents.*"))
    restored, step, _ = restore_params(POLICY, init_params, CONFIG, run_dir)
    assert (bits(restored), step) == (params, 4)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run(tmp_path, change(CONFIG, checkpoint=CheckpointConfig(every=1, keep=2)))
    assert checkpoints_in(tmp_path) == [8, 9]


def test_there_is_nothing_to_restore_from_a_folder_without_checkpoints(tmp_path):
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        restore_params(POLICY, init_params, CONFIG, tmp_path)


def test_a_folder_with_a_run_is_not_overwritten(straight):
    run_dir, _, rows = straight
    with pytest.raises(FileExistsError, match="already holds a run"):
        run(run_dir)
    assert rows_of(run_dir) == rows


# --- where the time goes ---


class Time:
    """A clock that stands still but for what the stand-ins below take."""

    now = 0.0

    def __call__(self):
        return self.now

    def slow(self, monkeypatch, name, seconds):
        """Let a function of the training loop take so long."""
        function = getattr(trainer, name)

        def slowed(*args, **options):
            self.now += seconds
            return function(*args, **options)

        monkeypatch.setattr(trainer, name, slowed)


def test_each_second_counts_for_the_stage_that_took_it(tmp_path, monkeypatch):
    """Powers of 2, so that a second in a wrong place shows; all that is not slowed takes no time."""
    time = Time()
    monkeypatch.setattr(trainer, "Stopwatch", functools.partial(Stopwatch, clock=time))
    of_functions = {"draw": 1, "score_mini_batches": 2, "update": 4, "evaluate": 1024}
    of_functions |= {"with_advantages": 32, "supervised_update": 64, "encode_solutions": 128}
    for name, seconds in of_functions.items():
        time.slow(monkeypatch, name, seconds)

    class SlowCharacters(Characters):
        def decode(self, ids):
            time.now += 8
            return super().decode(ids)

    class SlowlyJudged(TranslationTask):
        tokenizer = SlowCharacters()

    class SlowCheckpoints(trainer.Checkpoints):
        def save(self, *args):
            time.now += 4096
            super().save(*args)

    monkeypatch.setattr(trainer, "Checkpoints", SlowCheckpoints)
    monkeypatch.setattr(trainer, "probe_gradients", lambda *_: {})
    time.slow(monkeypatch, "probe_gradients", 512)
    config = change(CONFIG, warm_start=WarmStartConfig(steps=2, batch_size=6, optimizer=OPTIMIZER), probe_every=3)
    run(tmp_path, change(config, evaluation=EvaluationConfig(every=4, problems=16)), SlowlyJudged())
    rows = read_metrics(tmp_path)
    times = [{part.removeprefix("seconds_"): row[part] for part in PARTS if row[part]} for row in rows]
    for row, spent in zip(rows, times, strict=True):
        assert row.get("step_seconds", sum(spent.values())) == sum(spent.values())
        assert row["compile_seconds"] >= 0
    # An evaluation judges 4 · 16 responses, which is its own time.
    evaluation = 1024 + 4 * 16 * 8
    assert times[:2] == [{"other": 128, "update": 64}] * 2
    assert times[2] == {"evaluate": evaluation}
    step = {"judge": 32 * 8, "score": 2, "update": 2 * 4, "other": 32}
    # A row has what came after the one before: the next rollout is begun before a row is written, unless the row waits
    # for samples, a probe, an evaluation or a checkpoint; the checkpoint itself comes after it.
    # Samples are decoded whole and token by token, which counts as writing.
    for samples in (times[3].pop("write"), times[6].pop("write") - 4096):
        assert samples > 0 and samples % 8 == 0
    assert times[3] == step | {"draw": 1}
    assert times[4] == step | {"draw": 2}
    assert times[5] == step | {"probe": 512}
    assert times[6] == step | {"draw": 1, "evaluate": evaluation}


# --- learning ---


def test_it_learns_to_translate(tmp_path):
    """By rewards: the few supervised steps leave most responses wrong."""
    config = change(CONFIG, steps=30, evaluation=EvaluationConfig(every=30, problems=16))
    _, rows = run(tmp_path, change(config, checkpoint=CheckpointConfig(every=30)))
    rewards = [row["reward"] for row in rows[6:]]
    assert len(rewards) == 30
    assert 0 < np.mean(rewards[:3]) < 0.1
    assert np.mean(rewards[-3:]) > 0.9
    assert rows[5]["test_sampled_high"] < rows[-1]["test_sampled_low"]


def test_the_warm_start_imitates_the_solutions(tmp_path):
    config = change(CONFIG, steps=1, warm_start=WarmStartConfig(steps=60, batch_size=6, optimizer=OPTIMIZER))
    _, rows = run(tmp_path, config)
    losses = [row["loss"] for row in rows[:60]]
    assert losses[0] > 1.5
    assert losses[-1] < 0.1
    assert rows[60]["test_greedy"] == 1


@pytest.fixture(scope="module")
def start():
    """Parameters to start from."""
    return init_params(jax.random.key(9))


def copies_of(params):
    return lambda _: jax.tree.map(jnp.copy, params)


RL_ONLY = change(CONFIG, seed=6, steps=2, warm_start=WarmStartConfig(steps=0))


def test_rewards_that_are_all_alike_teach_nothing(tmp_path, start):
    class Hopeless(TranslationTask):
        def reward(self, problem, correct):
            return 0.0

    params, rows = run(tmp_path, change(RL_ONLY, steps=3), Hopeless(), init=copies_of(start))
    assert params == bits(start)
    for row in rows[1:]:
        assert row["informative_groups"] == row["loss"] == row["grad_norm"] == row["skipped_updates"] == 0
        assert row["learned_updates"] == 0


def test_rewards_count_relative_to_their_group(tmp_path, start):
    """What a right answer to a problem is worth makes no difference, unless scaling is switched off."""

    class Inflation(TranslationTask):
        def reward(self, problem, correct):
            return (1.0 + correct) * 4.0 ** DIGITS.index(problem)

    class Level(TranslationTask):
        def reward(self, problem, correct):
            return 1.0 + correct

    def first_step(name, task, scale):
        advantages = "group" if scale else "group_centred"
        _, rows = run(tmp_path / name, change(RL_ONLY, advantages=advantages), task, init=copies_of(start))
        return rows[1]

    level, inflated = first_step("level", Level(), True), first_step("inflated", Inflation(), True)
    assert level["grad_norm"] > 0.01
    assert inflated["reward"] > 2 * level["reward"]
    assert inflated["grad_norm"] == pytest.approx(level["grad_norm"], rel=1e-4)
    assert first_step("unscaled", Inflation(), False)["grad_norm"] > 2 * inflated["grad_norm"]


def test_learned_groups_are_those_with_a_gradient(tmp_path, start):
    """Responses that are cut off earn nothing, so that the groups of rewarded problems differ, and no others."""

    class SomeProblems(TranslationTask):
        def reward(self, problem, correct):
            return float(problem in self.rewarded)

    for number, rewarded in enumerate(["3", DIGITS]):
        task = SomeProblems()
        task.rewarded = rewarded
        config = change(RL_ONLY, steps=4, learned_groups=4, mini_batches=1)
        _, rows = run(tmp_path / str(number), config, task, init=copies_of(start))
        informative = [round(row["informative_groups"] * 8) for row in rows[1:]]
        assert sum(informative) > 0
        for row, count in zip(rows[1:], informative, strict=True):
            assert row["unlearned_informative_groups"] * 8 == max(0, count - 4)
            assert (row["grad_norm"] > 0) == (count > 0)  # the informative groups were not left out
    assert max(informative) > 4


class TwoProblems(TranslationTask):
    """Responses to two problems of five are rewarded, unless they are cut off."""

    def reward(self, problem, correct):
        return float(problem in "34")


def test_dynamic_sampling_draws_again_and_drops_groups_that_do_not_differ(tmp_path, start):
    config = change(RL_ONLY, steps=1, learned_groups=4, mini_batches=1)
    more = change(config, dynamic_sampling=True, max_rollouts=3)
    _, (_, plain) = run(tmp_path / "plain", config, TwoProblems(), init=copies_of(start))
    _, (_, once) = run(tmp_path / "once", change(more, max_rollouts=1), TwoProblems(), init=copies_of(start))
    _, (_, thrice) = run(tmp_path / "thrice", more, TwoProblems(), init=copies_of(start))
    informative = round(8 * plain["informative_groups"])
    assert 0 < informative < 4
    # The same gradient, but the mean is over the responses of groups that differ.
    assert once["dropped_groups"] == 4 - informative and once["rollouts"] == 1
    assert once["grad_norm"] == pytest.approx(plain["grad_norm"] * 4 / informative, rel=1e-4)
    assert 1 < thrice["rollouts"] <= 3 and thrice["dropped_groups"] < once["dropped_groups"]
    assert thrice["response_tokens"] > once["response_tokens"]


def test_responses_that_are_cut_off_may_be_left_out_of_the_loss(tmp_path, start):
    """Their rewards, 0, still count: the mean of a group is over all of its responses."""

    class Stopped(TranslationTask):
        def reward(self, problem, correct):
            return 1.0

    config = change(RL_ONLY, steps=1, mini_batches=1, advantages="group_centred")
    learner = LearnerConfig("grpo", diagnostics=False)
    _, (_, plain) = run(tmp_path / "plain", config, Stopped(), learner, init=copies_of(start))
    masked = change(config, mask_truncated=True)
    _, (_, row) = run(tmp_path / "masked", masked, Stopped(), learner, init=copies_of(start))
    cut = round(32 * row["truncated_fraction"])
    assert 0 < row["masked_truncated"] == cut < 32 and "masked_truncated" not in plain
    for name in ("reward", "solve_rate", "response_length", "truncated_fraction", "informative_groups"):
        assert row[name] == plain[name]
    # On-policy the loss is −mean A. Centred advantages add up to 0; those of the stopped ones to Σ (1 − share stopped).
    assert plain["loss"] == pytest.approx(0, abs=1e-6)
    assert row["loss"] < -0.01 and row["learned_updates"] == 1

    class Endless(TwoExperts):
        """A policy that never stops."""

        def apply(self, *arguments, **options):
            output = super().apply(*arguments, **options)
            return output._replace(logits=output.logits.at[..., Characters.eos_id].add(-1e9))

    problems = load_problems(Stopped())
    train(Setup(Endless(), copies_of(start), problems, learner, masked), tmp_path / "endless")
    row = read_metrics(tmp_path / "endless")[-1]
    assert (row["masked_truncated"], row["learned_updates"], row["skipped_updates"]) == (32, 0, 0)


def test_responses_that_no_reward_applies_to_count_for_nothing(tmp_path, start):
    """Whatever reward they are given; and named rewards take the place of solve rates."""

    class Rewarded(TranslationTask):
        reward_names, tells_correct, judges_truncated = ("right", "short"), False, True

        def __init__(self, spoilt):
            super().__init__()
            self.spoilt, self.calls = spoilt, []

        def judge(self, problems, responses):
            judged = []
            for problem, text in zip(problems, responses, strict=True):
                parts = (float(text == self.solution(problem)), math.nan if problem == "2" else -float(len(text)))
                absent = text[:1] in ("a", "b")
                reward = self.spoilt if absent else np.nansum(parts).item()
                judged.append(Judgement(reward, False, left_out=absent, parts=parts))
            self.calls.append(judged)
            return judged

    config = change(RL_ONLY, steps=1, mini_batches=1, advantages="group")
    learner = LearnerConfig("grpo", diagnostics=False)
    runs = {}
    for spoilt in (0.0, 1e9):
        task = Rewarded(spoilt)
        runs[spoilt] = run(tmp_path / str(spoilt), config, task, learner, init=copies_of(start))
    (params, (before, row)), (others, rows) = runs.values()
    assert params == others and [before, row] == rows
    assert not {"solve_rate", "eval_sampled", "test_greedy"} & {*before, *row} and 0 < row["left_out"] < 32
    for name in ("eval_greedy", "eval_sampled", "test_greedy", "test_sampled"):
        low, value, high = (row[f"{name}_reward{bound}"] for bound in ("_low", "", "_high"))
        assert math.isnan(low) or low <= value <= high
    # The judge was called four times for the evaluation before the step, then once for each chunk of the rollout.
    judged = [*task.calls[4], *task.calls[5]]
    right, short = np.array([one.parts for one in judged]).T
    assert len(judged) == 32 and row["truncated_fraction"] > 0  # what was cut off is judged as well
    assert row["left_out"] == sum(one.left_out for one in judged)
    assert row["rewards/right/mean"] == pytest.approx(right.mean())
    assert row["rewards/short/mean"] == pytest.approx(np.nanmean(short))
    assert row["rewards/short/std"] == pytest.approx(np.nanstd(short))
    assert (row["rewards/right/none"], row["rewards/short/none"]) == (0, pytest.approx(np.isnan(short).mean()))


def test_a_task_is_told_the_step_and_has_metrics_of_its_own(tmp_path, start):
    class Stepping(TranslationTask):
        def __init__(self):
            super().__init__()
            self.steps = []

        def begin_step(self, step, steps):
            self.steps.append((step, steps))

        def step_metrics(self):
            return {"task/step": float(len(self.steps)), "reward": -9.0}

    task = Stepping()
    _, rows = run(tmp_path, RL_ONLY, task, init=copies_of(start))
    assert task.steps == [(1, 2), (2, 2)]
    assert [row.get("task/step") for row in rows] == [None, 1.0, 2.0]
    assert all(row["reward"] >= 0 for row in rows[1:])  # the trainer's own metrics stay


def test_long_responses_lose_reward(tmp_path, start):
    class Nothing(TranslationTask):
        def reward(self, problem, correct):
            return 0.0

    config = change(RL_ONLY, steps=1)
    _, (_, without) = run(tmp_path / "without", config, Nothing(), init=copies_of(start))
    _, (_, row) = run(tmp_path / "with", change(config, overlong_buffer=2), Nothing(), init=copies_of(start))
    assert without["grad_norm"] == 0 and "overlong_penalty" not in without
    assert row["grad_norm"] > 0 and -1 < row["overlong_penalty"] < 0
    assert row["reward"] == 0  # what the task gave


def test_a_penalty_holds_on_to_the_parameters_that_learning_began_with(tmp_path):
    config = change(CONFIG, steps=3, checkpoint=CheckpointConfig(every=1, keep=20))
    learner = LearnerConfig(regularizers=RegularizerConfig(kl_coefficient=0.5))
    params, rows = run(tmp_path / "penalty", config, learner=learner)
    _, free = run(tmp_path / "free", config)
    first, *later = [row["reference_kl"] for row in rows if "reference_kl" in row]
    assert 0 <= first < min(later)
    assert rows[6]["reward"] == free[6]["reward"] and rows[7]["grad_norm"] != free[7]["grad_norm"]
    shutil.copytree(tmp_path / "penalty", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / str(checkpoints_in(tmp_path / "again")[-1]))
    assert run(tmp_path / "again", config, learner=learner, resume=True) == (params, rows)
    restored = restore_params(POLICY, init_params, config, tmp_path / "penalty", with_reference=True)
    assert bits(restored.params) == params


def test_a_frozen_router_stays(tmp_path, start):
    config = change(RL_ONLY, optimizer=dataclasses.replace(OPTIMIZER, weight_decay=0.1))
    params, rows = run(tmp_path, config, learner=LearnerConfig(routing="frozen"), init=copies_of(start))
    assert params["['router']"] == bits(start)["['router']"]
    assert params["['experts']"] != bits(start)["['experts']"]
    assert all(row["gamma_mean"] == 1 for row in rows[1:])


@pytest.mark.parametrize("rule", ["quantile", "sample_size"])
def test_a_router_shift_sets_its_own_scale(tmp_path, start, rule):
    config = change(RL_ONLY, steps=4, checkpoint=CheckpointConfig(every=1, keep=20))
    learner = LearnerConfig(adaptive_shift=AdaptiveShiftConfig(rule, sample_size=0.99))
    params, rows = run(tmp_path / "straight", config, learner=learner, init=copies_of(start))
    scales = [row["shift_scale"] for row in rows[1:]]
    assert scales[0] == 1 and len(set(scales)) >= 3  # the first step's only off-policy update has learning rate 0
    _, fixed = run(tmp_path / "fixed", config, init=copies_of(start))
    assert "shift_scale" not in fixed[1] and fixed[1]["grad_norm"] == rows[1]["grad_norm"]
    assert fixed[4]["gamma_mean"] != rows[4]["gamma_mean"]
    shutil.copytree(tmp_path / "straight", tmp_path / "again")
    for index in checkpoints_in(tmp_path / "again")[1:]:
        shutil.rmtree(tmp_path / "again" / "checkpoints" / str(index))
    again = run(tmp_path / "again", config, learner=learner, init=copies_of(start), resume=True)
    assert again == (params, rows)


def test_arrays_of_a_step_are_written_unless_they_are_switched_off(straight, tmp_path, start):
    run_dir, _, _ = straight
    rows = read_diagnostics(run_dir)
    assert [(row["phase"], row["step"]) for row in rows] == [("rl", step) for step in range(1, 5)]
    assert rows[0]["layer_drift"].shape == (1,) and rows[0]["expert_load"].shape == (1, 2)
    tokens = rows[0]["mismatch_histogram"].sum()
    assert tokens == rows[0]["log_ratio_histogram"].sum() > 0
    run(tmp_path, RL_ONLY, learner=LearnerConfig(diagnostics=False), init=copies_of(start))
    assert read_diagnostics(tmp_path) == []


def test_probes_of_gradients_change_nothing_else_and_are_the_same_in_a_resumed_run(straight, tmp_path):
    _, params, rows = straight
    config, task = change(CONFIG, probe_every=2, samples=SamplesConfig(every=0)), TranslationTask()
    probed_params, probed_rows = run(tmp_path / "probed", config, task)
    assert probed_params == params
    assert [{name: row[name] for name in row if not name.startswith("probe_")} for row in probed_rows] == rows
    assert [row["step"] for row in probed_rows[6:] if "probe_cosine_rspo" in row] == [2, 4]
    assert all(row["probe_variance_rspo"] > 0 for row in (probed_rows[7], probed_rows[9]))
    # The prompts are those of the step, and drawn for again at its end.
    step = prompts_before_step(2) - 8  # without the samples of the first step
    assert task.seen[step : step + 8] == task.seen[step + 8 : step + 16]
    shutil.copytree(tmp_path / "probed", tmp_path / "again")
    for checkpoint in (8, 9):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / str(checkpoint))
    again_params, again_rows = run(tmp_path / "again", config, resume=True)
    assert again_params == params
    assert str(again_rows) == str(probed_rows)  # by text, because NaN is not equal to itself


# --- samples ---


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def log_prob_of(params, before, token):
    """The log-probability of a token after another one."""
    weights = np.exp(log_softmax(params["router"][0, before]))
    return log_softmax(weights @ np.asarray(params["experts"], np.float64)[:, before])[token]


def assert_verdict(sample):
    ended = sample.token_ids[-1] == Characters.eos_id
    assert sample.response == Characters().decode(sample.token_ids)
    assert sample.correct == sample.reward == (ended and sample.response == LETTERS[DIGITS.index(sample.prompt)])
    assert sample.truncated == (not ended)


def assert_sample(sample, old, new):
    """Everything about a sample, from its text and the parameters before and after the step."""
    assert_verdict(sample)
    tokens = [*Characters().encode(sample.prompt), *sample.token_ids]
    for at, (before, token) in enumerate(itertools.pairwise(tokens)):
        was, now = (log_softmax(params["router"][0, before]) for params in (old, new))
        gamma = np.exp(-abs(now - was)[np.argmax(was)])
        assert sample.gamma[at] == pytest.approx(gamma, abs=1e-3)  # the grid of the old route
        assert sample.old_log_probs[at] == pytest.approx(log_prob_of(old, before, token), abs=1e-4)
        assert sample.log_probs[at] == pytest.approx(log_prob_of(new, before, token), abs=1e-4)


def test_samples_are_those_of_the_step_with_the_shift_over_all_its_updates(straight, tmp_path):
    run_dir, _, rows = straight
    shutil.copytree(run_dir, tmp_path / "before")
    shutil.rmtree(tmp_path / "before" / "checkpoints" / "9")
    (old, before, _), (new, after, _) = (
        restore_params(POLICY, init_params, CONFIG, folder) for folder in (tmp_path / "before", run_dir)
    )
    samples = read_samples(run_dir)
    assert (before, after, list(samples)) == (3, 4, [1, 2, 4])
    assert all(len(of_step) == CONFIG.samples.count for of_step in samples.values())
    for sample in samples[4]:
        assert_sample(sample, old, new)
    # The best and the worst of a group first, and the advantages of both have their signs.
    first, second = samples[4][:2]
    assert first.prompt == second.prompt and first.advantage > 0 > second.advantage
    assert min(gamma for sample in samples[4] for gamma in sample.gamma) < 0.99
    assert rows[-1]["gamma_mean"] > 0


def test_samples_follow_the_choice_of_responses_and_change_nothing(tmp_path, start):
    chosen = change(RL_ONLY, steps=1, learned_groups=4)
    moved = {"learner": LearnerConfig(route_on_host=True, micro_batches=2), "init": copies_of(start)}
    with_samples = run(tmp_path / "chosen", chosen, **moved)
    assert with_samples == run(tmp_path / "without", change(chosen, samples=SamplesConfig(every=0)), **moved)
    assert not (tmp_path / "without" / "samples.jsonl").exists()
    masked = change(RL_ONLY, steps=1, dynamic_sampling=True, mask_truncated=True, samples=SamplesConfig(1, count=3))
    run(tmp_path / "masked", masked, init=copies_of(start))
    for name, count in (("chosen", 8), ("masked", 3)):
        (samples,) = read_samples(tmp_path / name).values()
        assert len(samples) == count
        for sample in samples:
            # The first step has drawn with the parameters that the run began with.
            tokens = [*Characters().encode(sample.prompt), *sample.token_ids]
            expected = [log_prob_of(start, *pair) for pair in itertools.pairwise(tokens)]
            assert sample.old_log_probs == pytest.approx(expected, abs=1e-4)
            assert_verdict(sample)


def test_updates_that_are_skipped_show_in_the_rows(tmp_path, start):
    class Poison(TranslationTask):
        """Rewards that are finite, but too large for gradients to be."""

        def judge(self, problems, responses):
            return [Judgement(1e37 * (number % 2), False) for number in range(len(problems))]

    params, rows = run(tmp_path, change(RL_ONLY, advantages="group_centred"), Poison(), init=copies_of(start))
    assert params == bits(start)
    assert [row["skipped_updates"] for row in rows[1:]] == [2, 2]


def test_problems_with_long_prompts_are_left_out_of_the_run(tmp_path, capsys):
    class LongNames(TranslationTask):
        """The prompt of "4" has three tokens, and all others one."""

        def prompt(self, problem):
            return super().prompt(problem) * (3 if problem == "4" else 1)

    task = LongNames()
    _, rows = run(tmp_path, change(RL_ONLY, max_prompt_tokens=2), task)
    assert set(task.seen[ENCODED_FIRST:]) == set("0123")
    said = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert said == [
        f"{split}: {dropped} of {count} problems are left out, because their prompts have more than 2 tokens "
        "(max_prompt_tokens)"
        for split, dropped, count in (("train", 2, 10), ("validation", 4, 20), ("test", 3, 16))
    ]
    dropped = {"dropped_train_problems": 2, "dropped_validation_problems": 4, "dropped_test_problems": 3}
    for row in (rows[0], rows[2]):
        assert {name: row[name] for name in row if name.startswith("dropped")} == dropped
    assert rows[0]["test_greedy"] * 13 == pytest.approx(round(rows[0]["test_greedy"] * 13))
    task.problems = lambda split: "444"
    with pytest.raises(ValueError, match=r"none of 3 problems has a prompt .* raise it to 3 or more"):
        run(tmp_path / "none", change(RL_ONLY, max_prompt_tokens=2), task)
    assert not (tmp_path / "none").exists()


# --- a function of its seed ---


def test_the_same_seed_gives_the_same_run_bit_for_bit(straight, tmp_path):
    _, params, rows = straight
    again_params, again_rows = run(tmp_path / "again")
    assert again_rows == rows
    assert again_params == params
    other_params, other_rows = run(tmp_path / "other", change(CONFIG, seed=4))
    assert other_params != params
    assert all(other != row for other, row in zip(other_rows[:5] + other_rows[6:], rows[:5] + rows[6:], strict=True))


def test_a_route_held_on_the_host_changes_nothing(straight, tmp_path):
    _, params, rows = straight
    assert run(tmp_path, learner=LearnerConfig(route_on_host=True)) == (params, rows)


def test_the_length_of_rows_changes_nothing_but_padding(straight, tmp_path):
    _, _, rows = straight
    _, other_rows = run(tmp_path, learner=LearnerConfig(row_length=9))
    for other, row in zip(other_rows[:7], rows[:7], strict=True):
        assert set(other) == set(row)
        for name in set(row) - {"phase", "padding_fraction"}:
            assert other[name] == pytest.approx(row[name], rel=1e-4, abs=1e-6), name
    padding, other_padding = ([row["padding_fraction"] for row in run if "loss" in row] for run in (rows, other_rows))
    assert padding != other_padding


# --- stopped and resumed ---

ENCODED_FIRST = 10 + 20 + 16  # every prompt of every split, to find the longest
EVALUATED_FIRST = 2 * (16 + 16)  # validation and test, greedy and sampled


def prompts_before_warm_start_step(step):
    return ENCODED_FIRST + (step - 1) * 6


def prompts_before_step(step):
    evaluated, sampled = (step - 1) // 2 * 2 * 16, 8 * sum(map(CONFIG.leaves_samples, range(1, step)))
    return ENCODED_FIRST + 5 * 6 + EVALUATED_FIRST + (step - 1) * 8 + evaluated + sampled


STOPS = {
    "in the first step": (prompts_before_warm_start_step(1) + 1, 1),
    "in the warm start": (prompts_before_warm_start_step(4) + 3, 4),
    "in a step that is saved anyway": (prompts_before_warm_start_step(3) + 1, 3),
    "in the last step of the warm start": (prompts_before_warm_start_step(5) + 6, 5),
    "in the first evaluation": (prompts_before_step(1) - 1, 6),
    "in the first step of RL": (prompts_before_step(1) + 1, 6),
    "in a step with an evaluation": (prompts_before_step(2) + 1, 7),
    "in an evaluation": (prompts_before_step(3) - 1, 7),  # at its end, not a step later
    "in the last step but one": (prompts_before_step(3) + 2, 8),
}


def stopped_run(run_dir, signal_at, index, config=CONFIG, number=signal.SIGTERM):
    """Runs until the task sends itself a signal; the checkpoint says that it stopped where it was meant to."""
    with pytest.raises(Stopped, match=number.name):
        run(run_dir, config, TranslationTask(signal_at, number))
    assert checkpoints_in(run_dir)[-1] == index


def test_each_phase_goes_through_all_problems_in_epochs(tmp_path):
    """The training split has each digit twice, so that ten prompts in a row are a permutation of it."""
    task = TranslationTask()
    without = {"evaluation": EvaluationConfig(every=9, problems=16), "samples": SamplesConfig(every=0)}
    run(tmp_path, change(CONFIG, **without), task)
    warm_start = task.seen[ENCODED_FIRST : ENCODED_FIRST + 30]
    reinforcement = task.seen[prompts_before_step(1) : prompts_before_step(1) + 30]
    epochs = [phase[start : start + 10] for phase in (warm_start, reinforcement) for start in (0, 10, 20)]
    assert all(sorted(epoch) == sorted(DIGITS * 2) for epoch in epochs)
    assert len({"".join(epoch) for epoch in epochs}) == 6


@pytest.mark.parametrize("stop", STOPS)
def test_a_stopped_run_ends_like_one_that_was_not(straight, tmp_path, stop):
    _, params, rows = straight
    signal_at, index = STOPS[stop]
    number = signal.SIGINT if index % 2 else signal.SIGTERM
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stopped_run(tmp_path, signal_at, index, number=number)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    # Row 0 of RL comes in between, so rows[: index + 1] is what is there in RL.
    assert rows_of(tmp_path) == (rows[:index] if index <= 5 else rows[: index + 1])
    resumed_params, resumed_rows = run(tmp_path, resume=True)
    assert resumed_rows == rows
    assert resumed_params == params
    assert (tmp_path / "samples.jsonl").read_bytes() == (straight[0] / "samples.jsonl").read_bytes()


class EndlessDigits(TranslationTask):
    """Problem p of a stream is the digit (seed + phase + p) mod 5, of which 3 is held out; digits are even or odd."""

    def problems(self, split):
        return self if split == "train" else super().problems(split)

    def draw(self, seed, positions):
        digits = [str((sum(seed) + position) % 5) for position in positions]
        return [None if digit == "3" else digit for digit in digits]

    def kind(self, problem):
        return "even" if problem in "024" else "odd"


def test_an_endless_stream_is_used_up_in_order_and_a_resumed_run_goes_on_in_it(tmp_path):
    config = change(CONFIG, max_prompt_tokens=1)
    straight = run(tmp_path / "straight", config, EndlessDigits())
    task = EndlessDigits(signal_at=100)
    with pytest.raises(Stopped):
        run(tmp_path / "stopped", config, task)
    assert run(tmp_path / "stopped", config, EndlessDigits(), resume=True) == straight
    warm_start = [row for row in straight[1] if row["phase"] == "warm_start"]
    learning = [row for row in straight[1] if row["phase"] == "rl" and row["step"]]
    # 5 steps of 6 and 4 steps of 8 problems; a 3 in every five places, first at the fourth and at the third.
    assert [row["skipped_problems"] for row in warm_start] == [1, 2, 1, 2, 1]
    assert [row["skipped_problems"] for row in learning] == [2, 2, 2, 2]
    for row in learning:
        assert row["kinds/even/solve_rate"] == pytest.approx(row["kinds/even/reward"])
        assert min(row["kinds/even/solve_rate"], row["kinds/odd/solve_rate"]) <= row["solve_rate"]
        assert max(row["kinds/even/solve_rate"], row["kinds/odd/solve_rate"]) >= row["solve_rate"]
    last = straight[1][-1]
    # The first 16 validation problems are the digits in turn: 10 even ones and 6 odd ones.
    assert 10 * last["kinds/even/eval_greedy"] + 6 * last["kinds/odd/eval_greedy"] == pytest.approx(
        16 * last["eval_greedy"]
    )
    assert "dropped_test_problems" in last and "dropped_train_problems" not in last


@pytest.mark.parametrize("signal_at", [prompts_before_step(4) + 2, prompts_before_step(4) + 30])
def test_a_signal_in_the_last_step_lets_the_run_finish(straight, tmp_path, signal_at):
    _, params, rows = straight
    assert run(tmp_path, task=TranslationTask(signal_at)) == (params, rows)
    assert checkpoints_in(tmp_path) == [3, 5, 8, 9]


def test_a_run_stopped_again_and_again(straight, tmp_path):
    """Every process makes only one step, the last one too."""
    _, params, rows = straight
    for _ in range(8):
        # Beyond the prompts of all splits, the first prompt is one of a step or of the first evaluation.
        with pytest.raises(Stopped):
            run(tmp_path, task=TranslationTask(ENCODED_FIRST + 1), resume=True)
    assert checkpoints_in(tmp_path) == list(range(1, 9))
    resumed_params, resumed_rows = run(tmp_path, resume=True)
    assert resumed_rows == rows
    assert resumed_params == params


def test_resuming_says_where_it_goes_on(tmp_path, capsys):
    stopped_run(tmp_path, *STOPS["in a step with an evaluation"])
    capsys.readouterr()
    run(tmp_path, resume=True)
    assert "going on after 5 warm-start steps and 2 steps" in capsys.readouterr().out


def test_resuming_before_the_first_checkpoint_starts_anew(straight, tmp_path):
    _, params, rows = straight
    (tmp_path / "metrics.jsonl").write_text('{"phase": "warm_start", "step": 1, "loss": 7.0}\n{"phase": "warm_st')
    assert run(tmp_path, resume=True) == (params, rows)


def test_rows_and_checkpoints_of_a_killed_process_make_no_difference(straight, tmp_path):
    """Rows later than the newest checkpoint are written again, as after a kill."""
    _, params, rows = straight
    stopped_run(tmp_path, *STOPS["in the warm start"])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"phase": "warm_start", "step": 5, "loss": 7.0}\n{"phase": "rl", "step": 0}\n{"phase": "rl", "st')
    assert run(tmp_path, resume=True) == (params, rows)


def test_resuming_a_finished_run_does_nothing_more(tmp_path):
    params, rows = run(tmp_path)
    files = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    task = TranslationTask()
    assert run(tmp_path, task=task, resume=True) == (params, rows)
    assert task.prompts == ENCODED_FIRST
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()} == files


def test_resuming_with_more_steps_goes_on(straight, tmp_path):
    _, _, rows = straight
    longer_params, longer_rows = run(tmp_path / "longer", change(CONFIG, steps=6))
    run(tmp_path / "extended")
    extended_params, extended_rows = run(tmp_path / "extended", change(CONFIG, steps=6), resume=True)
    assert extended_params == longer_params
    assert [row["step"] for row in extended_rows[5:]] == list(range(7))
    assert extended_rows[:10] == rows  # with an evaluation on the test split at step 4, which was the last then
    assert extended_rows[10:] == longer_rows[10:]
    assert "test_sampled" in extended_rows[-1]


def test_a_learning_rate_that_leaves_its_course_is_said(tmp_path, capsys):
    config = change(CONFIG, decay_learning_rate=True)
    run(tmp_path, config)
    said = []
    for changed in (config, change(config, steps=6), change(config, steps=6)):
        capsys.readouterr()
        run(tmp_path, changed, resume=True)
        said.append([line for line in capsys.readouterr().out.splitlines() if "learning rate" in line])
    # 4 steps of 2 updates decayed over 8; after 8 of 12 updates, 2 of them warmup, a cosine is at 0.6.
    before, after = (PEAK * (1 + math.cos(math.pi * share)) / 2 for share in (4 / 6, 6 / 10))
    assert said == [
        [],
        [
            f"the learning rate was {before:.3g} in the last step and is {after:.3g} in the next one: its schedule has "
            "changed and now decays over 12 updates"
        ],
        [],
    ]


@pytest.mark.parametrize("phase", ["warm_start", "rl"])
def test_the_course_of_a_learning_rate(phase):
    """Steps, rates and lengths may change; a schedule that agrees with the last row is not mentioned."""
    optimizer = OptimizerConfig(learning_rate=1.0, warmup_updates=0)
    config = change(CONFIG, steps=10, decay_learning_rate=True, optimizer=optimizer)
    config = change(config, warm_start=WarmStartConfig(steps=10, optimizer=optimizer))
    done = 5
    first = done - 1 if phase == "warm_start" else 2 * (done - 1) - 1  # one update has been skipped
    length = 10 if phase == "warm_start" else 20
    rate = (1 + math.cos(math.pi * first / length)) / 2
    rows = [{"phase": phase, "step": done, "learning_rate": rate, "skipped_updates": 0.0}]
    made = done if phase == "warm_start" else 2 * done - 1
    state = jax.eval_shape(lambda: fresh_state(init_params, config))
    at = {"warm_start_step": done} if phase == "warm_start" else {"warm_start_step": 10, "step": done}
    state = state._replace(train=state.train._replace(updates=made), **({"step": 0} | at))
    assert rate_change(rows, config, state) == ""
    assert rate_change([], config, state) == ""
    slower = change(optimizer, learning_rate=0.5)
    changes = {"steps": 20, "optimizer": slower} if phase == "rl" else {"warm_start": WarmStartConfig(20, 8, slower)}
    found = rate_change(rows, change(config, **changes), state)
    after = (1 + math.cos(math.pi * made / (2 * length))) / 4
    assert f"was {rate:.3g} in the last step and is {after:.3g} in the next one" in found
    constant = change(config, decay_learning_rate=False)
    if phase == "rl":
        assert "and now is constant" in rate_change(rows, constant, state)
    finished = {"steps": 5} if phase == "rl" else {"warm_start": WarmStartConfig(5, 8, slower)}
    assert rate_change(rows, change(config, **finished), state) == ""


def test_resuming_with_fewer_steps_than_were_made_does_nothing_more(tmp_path):
    params, rows = run(tmp_path)
    assert run(tmp_path, change(CONFIG, steps=2), resume=True) == (params, rows)
    assert checkpoints_in(tmp_path) == [3, 5, 8, 9]


def test_resuming_with_another_model_is_refused(tmp_path):
    stopped_run(tmp_path, *STOPS["in a step with an evaluation"])
    with pytest.raises(CheckpointMismatch, match="does not fit this run"):
        run(tmp_path, resume=True, init=lambda key: init_params(key, experts=3))
    assert checkpoints_in(tmp_path) == [3, 5, 7]


def test_the_time_of_a_stopped_process_counts(tmp_path):
    stopped_run(tmp_path, *STOPS["in the last step but one"])
    before = sum(row["step_seconds"] for row in read_metrics(tmp_path) if "step_seconds" in row)
    problems = load_problems(TranslationTask())
    _, seconds = train(Setup(POLICY, init_params, problems, LEARNER, CONFIG), tmp_path, resume=True)
    assert seconds > before


# --- runs without one of the phases ---


def test_a_run_without_a_warm_start(tmp_path):
    config = RL_ONLY
    params, rows = run(tmp_path / "straight", config)
    assert [(row["phase"], row["step"]) for row in rows] == [("rl", 0), ("rl", 1), ("rl", 2)]
    first_step = ENCODED_FIRST + EVALUATED_FIRST + 1
    stopped_run(tmp_path / "stopped", first_step, 1, config)
    assert run(tmp_path / "stopped", config, resume=True) == (params, rows)


def test_a_run_of_a_warm_start_alone(tmp_path):
    config = change(CONFIG, steps=0)
    _, rows = run(tmp_path, config)
    assert [(row["phase"], row["step"]) for row in rows[:5]] == [("warm_start", step) for step in range(1, 6)]
    assert [(row["phase"], row["step"]) for row in rows[5:]] == [("rl", 0)]
    assert "test_sampled" in rows[5]
    assert checkpoints_in(tmp_path)[-1] == 5


def test_several_epochs_make_more_updates(tmp_path):
    config = change(RL_ONLY, epochs=2)
    params, rows = run(tmp_path / "two", config)
    once_params, once_rows = run(tmp_path / "one", change(config, epochs=1))
    assert params != once_params
    # The optimizer's warmup takes two updates: at one epoch they are the first step.
    assert [row["learning_rate"] for row in rows[1:]] == pytest.approx([0, PEAK])
    assert rows[1]["reward"] == once_rows[1]["reward"]
    assert rows[2]["grad_norm"] != once_rows[2]["grad_norm"]


# --- configs ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": 0}, "prompts must be at least 1, got 0"),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"mini_batches": 0}, "mini_batches must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"rollout_chunks": 0}, "rollout_chunks must be at least 1, got 0"),
        ({"steps": -1}, "steps must be 0 or more, got -1"),
        ({"max_rollouts": 0}, "max_rollouts must be at least 1, got 0"),
        ({"advantages": "mean"}, "unknown advantages 'mean'; choose one of group, group_centred"),
        ({"overlong_buffer": -1}, "overlong_buffer must lie between 0 and sampler.max_new_tokens"),
        ({"mini_batches": 3}, "32 responses to learn from do not divide into 3 mini_batches"),
        ({"rollout_chunks": 3}, "a rollout of 32 responses does not divide into 3 rollout_chunks"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens must be at least 1, got 0; leave it out to use all problems"),
        ({"learned_groups": 0}, "learned_groups must lie between 1 and prompts, 8; got 0"),
        ({"learned_groups": 9}, "learned_groups must lie between 1 and prompts, 8; got 9"),
        ({"learned_groups": 1, "mini_batches": 8}, "4 responses to learn from do not divide into 8 mini_batches"),
        ({"sampler": SamplerConfig(temperature=0.0)}, "temperature must be positive to train"),
    ],
)
def test_trainer_configs_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        change(CONFIG, **changes)


def test_a_group_of_one_is_allowed_where_no_group_is_looked_at():
    alone = change(CONFIG, group_size=1)
    with pytest.raises(ValueError, match=r"group advantages.*or choose advantages batch"):
        check_learner(alone, LEARNER)
    check_learner(change(alone, advantages="batch"), LEARNER)
    check_learner(alone, dataclasses.replace(LEARNER, objective="reinforce_pp"))


@pytest.mark.parametrize(
    ("config_type", "arguments", "message"),
    [
        (WarmStartConfig, {"steps": -1}, "a warm start needs 0 or more steps of 1 or more solutions, got -1, 256"),
        (WarmStartConfig, {"batch_size": 0}, "0 or more steps of 1 or more solutions, got 300, 0"),
        (EvaluationConfig, {"every": 0}, "evaluation needs every ≥ 1 and problems ≥ 1, got 0 and 500"),
        (EvaluationConfig, {"problems": 0}, "evaluation needs every ≥ 1 and problems ≥ 1, got 25 and 0"),
        (CheckpointConfig, {"every": 0}, "checkpoints need every ≥ 1 and keep ≥ 1, got 0 and 3"),
        (CheckpointConfig, {"keep": 0}, "checkpoints need every ≥ 1 and keep ≥ 1, got 25 and 0"),
    ],
)
def test_parts_of_a_config_that_are_refused(config_type, arguments, message):
    with pytest.raises(ValueError, match=message):
        config_type(**arguments)


@pytest.mark.parametrize(
    ("learner", "message"),
    [
        ({"micro_batches": 3}, "a mini-batch of 16 responses does not divide into 3 micro_batches"),
        ({"micro_batches": 32}, "a mini-batch of 16 responses does not divide into 32 micro_batches"),
        ({"temperature": 0.5}, "scores at temperature 0.5, but the sampler draws at 1.0: give both the same"),
    ],
)
def test_learners_that_do_not_fit_the_trainer(tmp_path, learner, message):
    learner = dataclasses.replace(LEARNER, **learner)
    with pytest.raises(ValueError, match=message):
        check_learner(CONFIG, learner)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", learner=learner)
    assert not (tmp_path / "run").exists()


def test_only_what_is_learned_from_has_to_divide():
    check_learner(change(CONFIG, learned_groups=3, mini_batches=2), dataclasses.replace(LEARNER, micro_batches=6))


def test_solutions_that_do_not_fit_a_response_are_refused(tmp_path):
    config = change(CONFIG, sampler=SamplerConfig(max_new_tokens=1))
    with pytest.raises(ValueError, match=r"has 2 tokens, but sampler\.max_new_tokens is 1: raise it to 2 or more"):
        run(tmp_path, config)


def test_the_decay_of_a_warm_start():
    plain = WarmStartConfig(steps=7, optimizer=OptimizerConfig(warmup_updates=3))
    assert plain.decaying_optimizer.decay_updates == 7
    given = WarmStartConfig(steps=7, optimizer=OptimizerConfig(warmup_updates=3, decay_updates=5))
    assert given.decaying_optimizer.decay_updates == 5
    # A warmup that takes the whole phase leaves nothing to decay over.
    short = WarmStartConfig(steps=3, optimizer=OptimizerConfig(warmup_updates=3))
    assert short.decaying_optimizer.decay_updates is None


# --- slots ---


def test_slots_change_how_responses_are_drawn_and_nothing_else(tmp_path):
    """They are refilled from the rollout on that follows one with a long tail, in a resumed run too."""
    config = change(CONFIG, warm_start=WarmStartConfig(steps=0), sampler=SamplerConfig(max_new_tokens=12))
    in_slots = change(config, sampler=SamplerConfig(max_new_tokens=12, slots=4))
    params, rows = run(tmp_path / "at once", config)
    slots_params, slots_rows = run(tmp_path / "slots", in_slots)
    assert [row["refilled"] for row in rows[1:]] == [0, 0, 0, 0]
    assert slots_rows[1]["refilled"] == 0
    for before, row in itertools.pairwise(slots_rows[1:]):
        assert row["refilled"] == float(1 + before["response_length"] < before["longest_response"])
    assert 1 in [row["refilled"] for row in slots_rows[2:]]
    assert [row | {"refilled": 0} for row in slots_rows[1:]] == rows[1:]
    assert slots_params == params
    signal_at = ENCODED_FIRST + EVALUATED_FIRST + 2 * 8 + 2 * 16 + 1
    with pytest.raises(Stopped):
        run(tmp_path / "resumed", in_slots, TranslationTask(signal_at))
    assert run(tmp_path / "resumed", in_slots, resume=True) == (slots_params, slots_rows)


def test_slots_that_do_not_divide_a_rollout():
    with pytest.raises(ValueError, match="a rollout of 32 responses does not divide into batches of 5 slots"):
        change(CONFIG, sampler=SamplerConfig(slots=5))


@pytest.mark.parametrize(
    ("sizes", "changes", "learner", "message"),
    [
        (
            {"fsdp": 3},
            {},
            LearnerConfig(),
            r"a rollout chunk .* is \d+ rows, which the 3 parts of the mesh .* multiple of 3",
        ),
        (
            {"data": 2, "expert": 2},
            {"rollout_chunks": 1, "sampler": SamplerConfig(3, slots=2)},
            LearnerConfig(),
            r"sampler\.slots is 2 rows, which the 4 parts",
        ),
        (
            {"fsdp": 2},
            {"rollout_chunks": 1, "warm_start": WarmStartConfig(steps=1, batch_size=3)},
            LearnerConfig(),
            r"warm_start\.batch_size is 3 rows, which the 2 parts",
        ),
        (
            {"context": 4},
            {},
            LearnerConfig(),
            r"rows of 6 tokens cannot be split into 4 equal parts by mesh\.context: set row_length to 8",
        ),
        ({"context": 4}, {}, LearnerConfig(row_length=7), "rows of 7 tokens cannot .* set row_length to 8"),
    ],
)
def test_a_mesh_that_does_not_divide_a_step_is_refused(sizes, changes, learner, message):
    mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)
    config = TrainerConfig(prompts=8, group_size=2, mini_batches=2, rollout_chunks=2)
    with pytest.raises(ValueError, match=message):
        check_mesh(dataclasses.replace(config, **changes), learner, mesh, longest=6)
    check_mesh(config, LearnerConfig(row_length=8), AbstractMesh((1, 2, 2, 1, 4), MESH_AXES), longest=6)
