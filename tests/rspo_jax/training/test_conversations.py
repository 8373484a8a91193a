"""Training on conversations in this process, with tables in place of a model: what the rows of a run say of turns and
tokens, that limits and options of the trainer mean what they say, and that a resumed run converses on bit for bit."""

import dataclasses
import signal

import jax
import numpy as np
import pytest
from support.policies import MixturePolicy
from support.tasks import Characters

from rspo_jax.records import read_metrics
from rspo_jax.rollouts import ConversationConfig, SamplerConfig, load_problems
from rspo_jax.sharding import make_mesh
from rspo_jax.stopwatch import STAGES
from rspo_jax.training import (
    CheckpointConfig,
    EvaluationConfig,
    LearnerConfig,
    OptimizerConfig,
    TrainerConfig,
    WarmStartConfig,
)
from rspo_jax.training.stages import Setup, draw, judge_drawing, with_advantages
from rspo_jax.training.state import fresh_state
from rspo_jax.training.trainer import Stopped, train
from rspo_jax.types import Judgement

TIMINGS = {"step_seconds", "tokens_per_second", "compile_seconds", "overlapped_seconds", "peak_memory_gib"}
TIMINGS |= {f"seconds_{stage}" for stage in STAGES}
NUMBERS = "1234"


class HigherOrLower:
    """Guess a number from 1 to 4; the environment answers "h" or "l". It counts its answers, so that a run can be
    stopped anywhere."""

    tokenizer = Characters("?hl" + NUMBERS)

    def __init__(self, signal_at=None):
        self.answers, self.signal_at = 0, signal_at

    def problems(self, split):
        return NUMBERS * 2

    def prompt(self, problem):
        return "?"

    def solution(self, problem):
        return problem

    def demonstration(self, problem):
        turns = ["2"]
        while turns[-1] != problem:
            turns += ["h", str(int(turns[-1]) + 1)] if turns[-1] < problem else ["l", str(int(turns[-1]) - 1)]
        return turns

    def respond(self, problem, conversation):
        self.answers += 1
        if self.answers == self.signal_at:
            signal.raise_signal(signal.SIGTERM)
        guess = conversation[-1]
        return None if guess == problem else "h" if guess < problem else "l"

    def judge(self, problems, responses):
        correct = [turns[-1] == problem for problem, turns in zip(problems, responses, strict=True)]
        return [Judgement(float(one), one) for one in correct]


POLICY = MixturePolicy()
OPTIMIZER = OptimizerConfig(learning_rate=0.3, warmup_updates=2)
CONFIG = TrainerConfig(
    steps=4,
    prompts=8,
    group_size=4,
    mini_batches=2,
    rollout_chunks=2,
    seed=5,
    sampler=SamplerConfig(max_new_tokens=3),
    conversation=ConversationConfig(max_turns=3, max_tokens=8),
    optimizer=OPTIMIZER,
    warm_start=WarmStartConfig(steps=3, batch_size=8, optimizer=OPTIMIZER),
    evaluation=EvaluationConfig(every=2, problems=8),
    checkpoint=CheckpointConfig(every=2, keep=20),
)
change = dataclasses.replace


@pytest.fixture(autouse=True)
def promotion_as_optax_needs_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


def init_params(key):
    return POLICY.init_params(key, HigherOrLower.tokenizer.vocabulary_size)


def setup_of(config=CONFIG, task=None, learner=LearnerConfig()):
    return Setup(POLICY, init_params, load_problems(task or HigherOrLower()), learner, config)


def run(run_dir, config=CONFIG, task=None, learner=LearnerConfig(), resume=False):
    params, _ = train(setup_of(config, task, learner), run_dir, resume)
    rows = [{name: row[name] for name in row if name not in TIMINGS} for row in read_metrics(run_dir)]
    return jax.tree.map(np.asarray, params), rows


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    with jax.numpy_dtype_promotion("standard"):
        return run(tmp_path_factory.mktemp("straight") / "run")


def test_rows_count_the_models_own_tokens_and_its_turns(straight):
    _, rows = straight
    for row in rows[4:]:
        assert row["response_tokens"] == pytest.approx(row["response_length"] * 32)
        assert 1 <= row["turns"] <= 3 and row["longest_response"] <= 8
        # Every turn but the first follows one token of the environment.
        assert row["conversation_length"] == pytest.approx(row["response_length"] + row["turns"] - 1)
        assert 0 <= row["token_limited_fraction"] <= row["truncated_fraction"] <= 1
        assert 0 <= row["turn_limited_fraction"] <= 1 - row["truncated_fraction"]
        assert row["sampler_kl"] == pytest.approx(0, abs=1e-6)
        assert row["refilled"] == 0
    assert any(row["turns"] > 1.2 for row in rows[4:])
    assert all("eval_greedy" in rows[step] for step in (3, 5, 7))


@pytest.mark.parametrize("answer", [3, 40, 90])
def test_a_resumed_run_converses_on_bit_for_bit(straight, tmp_path, answer):
    params, rows = straight
    with pytest.raises(Stopped):
        run(tmp_path, task=HigherOrLower(signal_at=answer))
    resumed_params, resumed_rows = run(tmp_path, resume=True)
    assert resumed_rows == rows
    jax.tree.map(np.testing.assert_array_equal, resumed_params, params)


def judged_of(params, config):
    """A rollout of given parameters, judged."""
    setup = setup_of(config)
    with jax.set_mesh(make_mesh(config.mesh)):
        state = fresh_state(init_params, config)
        state = state._replace(train=state.train._replace(params=params))
        return setup, judge_drawing(setup, state, draw(setup, state)[0])


@pytest.mark.parametrize("changes", [{"rollout_chunks": 1}, {"sampler": SamplerConfig(3, slots=8)}], ids=str)
def test_chunks_and_slots_change_nothing_that_is_said(straight, changes):
    (_, expected), (_, found) = (judged_of(straight[0], change(CONFIG, **each)) for each in ({}, changes))
    np.testing.assert_array_equal(found.rollout.tokens, expected.rollout.tokens)
    np.testing.assert_array_equal(found.rollout.mask, expected.rollout.mask)
    assert found.judged.turns.texts == expected.judged.turns.texts
    assert not found.refilled


def test_a_penalty_for_length_counts_all_tokens_up_to_the_limit_of_the_conversation(straight):
    _, judged = judged_of(straight[0], change(CONFIG, overlong_buffer=3))
    tokens = judged.judged.turns.tokens
    assert (tokens > 5).any()
    np.testing.assert_allclose(judged.overlong, np.minimum(0, (5 - tokens) / 3), atol=1e-6)


def test_truncated_conversations_are_masked_as_a_whole(straight):
    setup, judged = judged_of(straight[0], change(CONFIG, mask_truncated=True))
    truncated = judged.judged.truncated
    assert truncated.any() and not truncated.all()
    mask = np.asarray(with_advantages(setup, judged).mask)
    assert not mask[truncated].any()
    np.testing.assert_array_equal(mask[~truncated].sum(axis=1), judged.judged.lengths[~truncated])


def test_groups_are_chosen_and_packed_as_whole_conversations(tmp_path):
    learner = LearnerConfig(micro_batches=2, row_length=11)
    config = change(CONFIG, steps=2, learned_groups=4, dynamic_sampling=True, max_rollouts=2)
    _, rows = run(tmp_path, config, learner=learner)
    assert rows[-1]["rollouts"] in (1, 2) and rows[-1]["padding_fraction"] < 0.5
    assert rows[-1]["sampler_kl"] == pytest.approx(0, abs=1e-6)


def test_limits_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"conversation.max_tokens is 2, but one turn alone may have 3"):
        run(tmp_path / "run", change(CONFIG, conversation=ConversationConfig(max_tokens=2)))
    assert not (tmp_path / "run").exists()
