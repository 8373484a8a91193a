"""Conversations with environments that are written down: who said what, token by token; where a conversation ends and
what it is worth; that later turns depend on the conversation alone; and that one scoring pass over whole conversations
finds the log-probabilities and routes that their turns were drawn with."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.policies import StatelessPolicy
from support.tasks import Characters

import models
from rspo_jax.rollouts import (
    ConversationConfig,
    FirstTurns,
    Packing,
    SamplerConfig,
    assemble,
    check_solutions,
    converse,
    encode_prompts,
    encode_solutions,
    generate,
    judge,
    limits_of,
    pack,
    sample_in_chunks,
    solve,
)
from rspo_jax.training import LearnerConfig, score
from rspo_jax.types import Judgement, ModelOutput, Samples

PAD, EOS = 0, 1
TOKENIZER = Characters("?hl.0123456789")


def ids(text):
    """Ids of a text in which "|" is the token that ends a turn."""
    return [EOS if character == "|" else TOKENIZER.encode(character)[0] for character in text]


class HigherOrLower:
    """Guess the number that the problem is; the environment says "h" or "l", or "." twice where a turn is no number."""

    tokenizer = TOKENIZER

    def __init__(self):
        self.asked = []

    def problems(self, split):
        return ["6", "5", "7"]

    def prompt(self, problem):
        return "??" if problem == "5" else "?"

    def solution(self, problem):
        return problem

    def respond(self, problem, conversation):
        assert type(conversation) is tuple
        self.asked.append((problem, *conversation))
        guess = conversation[-1]
        if guess == problem:
            return None
        return ".." if not guess.isdigit() else "h" if guess < problem else "l"

    def judge(self, problems, responses):
        correct = [turns[-1] == problem for problem, turns in zip(problems, responses, strict=True)]
        return [Judgement(float(one), one) for one in correct]


@dataclasses.dataclass(frozen=True)
class Recites(StatelessPolicy):
    """After each character comes the one that the recital says, and its log-probability is that of its place there."""

    follows: str

    def apply(self, variables, tokens, positions=None, segment_ids=None, cache=None):
        table = np.full((2 + len(TOKENIZER.alphabet),) * 2, -1e9, np.float32)
        table[:, EOS] = 0
        for pair in self.follows.split():
            table[ids(pair[0]), ids(pair[1])] = 1e9
        return ModelOutput(jnp.asarray(table)[tokens], None, cache)


GREEDY = SamplerConfig(max_new_tokens=3, temperature=0.0)
# 5, then 7 after "h", then 6 after "l"; every digit ends its turn.
THREE_TURNS = Recites("?5 h7 l6 5| 6| 7|")


def talk(policy, problems, config=ConversationConfig(), sampler=GREEDY, chunks=1, task=None, params=None, width=2):
    """The rollout of a conversation about each problem, and its verdicts."""
    task = task or HigherOrLower()
    prompts, keys = encode_prompts(task, problems, width), jax.random.split(jax.random.key(3), len(problems))
    record_route = sampler.top_k == 99  # a mark of this file, which draws among all tokens
    samples = sample_in_chunks(
        policy, params, prompts, keys, sampler, task.tokenizer, chunks, record_route=record_route
    )
    limits = limits_of(task, sampler, config)
    ended = list(converse(policy, params, task, problems, FirstTurns(prompts, keys, samples), sampler, limits))
    return assemble(prompts, [chunk.samples for chunk in ended]), judge(task, problems, ended)


def test_three_turns_token_by_token():
    rollout, judged = talk(THREE_TURNS, ["6", "5", "7"], ConversationConfig(max_turns=4, max_tokens=9))
    # Two columns of prompt, then nine of conversation.
    tokens = [
        [PAD, *ids("?5|h7|l6|"), PAD],
        [*ids("??5|"), *[PAD] * 7],
        [PAD, *ids("?5|h7|"), *[PAD] * 4],
    ]
    drawn = [
        [0, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0],
        [0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 1, 1, 0, 0, 0, 0],
    ]
    context = [
        [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
    ]
    np.testing.assert_array_equal(rollout.tokens, tokens)
    np.testing.assert_array_equal(rollout.segment_ids, context)
    np.testing.assert_array_equal(rollout.mask, np.array(drawn, bool)[:, 1:])  # aligned with the targets
    np.testing.assert_array_equal(judged.rewards, [1, 1, 1])
    np.testing.assert_array_equal(judged.lengths, [6, 2, 4])
    assert judged.texts == ["5\nh\n7\nl\n6", "5", "5\nh\n7"]
    np.testing.assert_array_equal(judged.turns.counts, [3, 1, 2])
    np.testing.assert_array_equal(judged.turns.tokens, [8, 2, 5])
    assert judged.turns.texts == [("5", "h", "7", "l", "6"), ("5",), ("5", "h", "7")]
    assert not judged.truncated.any() and not judged.turns.turn_limited.any() and not judged.turns.token_limited.any()


def test_places_of_a_packed_conversation():
    rollout, _ = talk(THREE_TURNS, ["6", "5", "7"], ConversationConfig(max_turns=4, max_tokens=9))
    batch, _ = pack(rollout, 9, np.arange(3), Packing(row_length=9))
    inputs, targets, segments = (np.asarray(array[0]) for array in batch.rows)
    for response, text in enumerate(["?5|h7|l6|", "??5|", "?5|h7|"]):
        prompt = text.count("?")
        mask, places = np.asarray(batch.mask[0, response]), np.asarray(batch.places[0, response])
        for column, character in enumerate(text[prompt:]):
            row, place = divmod(places[column], 9)
            # Each token, whoever wrote it, is scored where the token before it is read, within its own segment.
            assert targets[row, place] == ids(character)[0]
            assert inputs[row, place] == ids(text[prompt + column - 1])[0]
            assert segments[row, place] == segments.reshape(-1)[places[0]] != 0
            assert mask[column] == (character not in "hl")
        assert not mask[len(text) - prompt :].any()


CASES = {
    # name: (recital, problem, max_turns, max_tokens, text, reward, truncated, turn_limited, token_limited)
    "found in the last turn": ("?5 h7 l6 5| 6| 7|", "6", 3, 9, "?5|h7|l6|", 1, 0, 0, 0),
    "judged at the limit of turns": ("?5 h7 l6 5| 6| 7|", "6", 2, 9, "?5|h7|", 0, 0, 1, 0),
    "one turn": ("?5 5|", "6", 1, 9, "?5|", 0, 0, 1, 0),
    "the last turn fills the last column": ("?5 h7 l6 5| 6| 7|", "6", 4, 8, "?5|h7|l6|", 1, 0, 0, 0),
    "the last turn lacks room for its stop": ("?5 h7 l6 5| 6| 7|", "6", 4, 7, "?5|h7|l6", 0, 1, 0, 1),
    "an answer leaves no room for a turn": ("?5 h7 l6 5| 6| 7|", "6", 4, 6, "?5|h7|", 0, 1, 0, 1),
    "an answer does not fit": ("?5 h7 l6 5| 6| 7|", "6", 4, 5, "?5|h7|", 0, 1, 0, 1),
    "the first turn is cut off": ("?5 55", "6", 4, 9, "?555", 0, 1, 0, 0),
    "the first turn is cut off at both limits": ("?5 55", "6", 4, 3, "?555", 0, 1, 0, 1),
    "a later turn is cut off": ("?5 5| h7 77", "6", 4, 9, "?5|h777", 0, 1, 0, 0),
    "a later turn is cut off at the limit of tokens": ("?5 5| h7 77", "6", 4, 5, "?5|h77", 0, 1, 0, 1),
    "a turn of a stop token alone": ("?| .5 5|", "5", 4, 9, "??|..5|", 1, 0, 0, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_ends_of_conversations(name):
    recital, problem, turns, tokens, text, reward, truncated, turn_limited, token_limited = CASES[name]
    rollout, judged = talk(Recites(recital), [problem], ConversationConfig(turns, tokens))
    prompt = text.count("?")
    said = np.asarray(rollout.tokens[0])[np.asarray(rollout.segment_ids[0]) > 0].tolist()
    assert said == ids(text)
    assert judged.turns.tokens.tolist() == [len(text) - prompt]
    verdict = judged.rewards, judged.truncated, judged.turns.turn_limited, judged.turns.token_limited
    assert [value.tolist() for value in verdict] == [[reward], [truncated], [turn_limited], [token_limited]]
    own = [character for character in text[prompt:] if character not in "hl."]
    assert judged.lengths.tolist() == [len(own)] == [int(np.asarray(rollout.mask).sum())]


def test_the_environment_is_asked_after_every_turn_that_has_stopped_and_after_no_other():
    task = HigherOrLower()
    talk(THREE_TURNS, ["6"], ConversationConfig(max_turns=2), task=task)
    assert task.asked == [("6", "5"), ("6", "5", "h", "7")]
    task = HigherOrLower()
    talk(Recites("?5 5| h7 77"), ["6"], task=task)
    assert task.asked == [("6", "5")]


class StopsAtWords(Characters):
    """A turn ends at "00" too, which no single token says."""

    stop_strings = ("00",)


def test_what_was_drawn_after_a_stop_string_is_in_no_later_context():
    class Task(HigherOrLower):
        tokenizer = StopsAtWords(TOKENIZER.alphabet)

    # "5", the stop string "00", and on to the limit of the turn: the last two tokens were never said.
    policy, sampler = Recites("?5 50 00 h7 7|"), SamplerConfig(max_new_tokens=5, temperature=0.0)
    rollout, judged = talk(policy, ["7"], ConversationConfig(4, 9), sampler, task=Task())
    assert np.asarray(rollout.tokens[0]).tolist() == [PAD, *ids("?500h7|"), *[PAD] * 3]
    assert np.asarray(rollout.mask[0]).tolist() == [0, 1, 1, 1, 0, 1, 1, 0, 0, 0]
    assert judged.turns.texts == [("5", "h", "7")] and judged.rewards == [1] and judged.lengths == [5]


def test_mistakes_of_a_task_are_sentences():
    class Silent(HigherOrLower):
        def respond(self, problem, conversation):
            return 7

    with pytest.raises(ValueError, match=r"Silent.respond returned 7: return the text that the environment says, or N"):
        talk(THREE_TURNS, ["6"], task=Silent())

    class OneTurn:
        tokenizer, problems, prompt, solution, judge = TOKENIZER, *(lambda *_: None,) * 4

    class Unfinished:
        tokenizer, problems, prompt, judge, respond = TOKENIZER, *(lambda *_: None,) * 4

    with pytest.raises(ValueError, match="Unfinished answers in turns, but is no task yet: it lacks solution"):
        limits_of(Unfinished(), GREEDY, ConversationConfig())
    assert limits_of(OneTurn(), GREEDY, ConversationConfig()) == (1, 3)
    with pytest.raises(ValueError, match=r"OneTurn has no environment that answers .* leave conversation.max_turns"):
        limits_of(OneTurn(), GREEDY, ConversationConfig(max_turns=2))
    assert limits_of(HigherOrLower(), GREEDY, ConversationConfig(max_turns=4)) == (4, 12)
    with pytest.raises(ValueError, match=r"conversation.max_tokens is 2, but one turn alone may have 3"):
        limits_of(HigherOrLower(), GREEDY, ConversationConfig(max_tokens=2))
    for name in ("max_turns", "max_tokens"):
        with pytest.raises(ValueError, match=f"conversation.{name} must be at least 1, got 0"):
            ConversationConfig(**{name: 0})


class Demonstrated(HigherOrLower):
    """Worked conversations: the middle first, and one step after each hint."""

    def demonstration(self, problem):
        turns = ["5"]
        while (answer := self.respond(problem, tuple(turns))) is not None:
            turns += [answer, str(int(turns[-1]) + (1 if answer == "h" else -1))]
        return turns


def test_worked_conversations_are_encoded_with_the_model_in_the_mask_alone():
    rollout = encode_solutions(Demonstrated(), ["7", "5"], 2, 9)
    np.testing.assert_array_equal(rollout.tokens, [[PAD, *ids("?5|h6|h7|"), PAD], [*ids("??5|"), *[PAD] * 7]])
    np.testing.assert_array_equal(rollout.segment_ids, [[0] + [1] * 9 + [0], [1] * 4 + [0] * 7])
    np.testing.assert_array_equal(rollout.mask, [[0, 1, 1, 0, 1, 1, 0, 1, 1, 0], [0, 1, 1] + [0] * 7])
    # Without demonstrations a worked solution is a conversation of one turn.
    rollout = encode_solutions(HigherOrLower(), ["7"], 2, 9)
    np.testing.assert_array_equal(rollout.tokens, [[PAD, *ids("?7|"), *[PAD] * 7]])


def test_worked_conversations_that_do_not_fit_are_refused():
    task, problems = Demonstrated(), ["7", "5", "2"]
    check_solutions(task, problems, GREEDY, limits_of(task, GREEDY, ConversationConfig(4, 11)))
    short = dataclasses.replace(GREEDY, max_new_tokens=1)
    with pytest.raises(ValueError) as error:
        check_solutions(task, problems, short, limits_of(task, short, ConversationConfig(3, 10)))
    assert str(error.value) == (
        "the longest turn of a worked conversation has 2 tokens, but sampler.max_new_tokens is 1: raise it to 2 or more"
        "; the longest worked conversation has 4 turns, but conversation.max_turns is 3: raise it to 4 or more"
        "; the longest worked conversation has 11 tokens, but conversation.max_tokens is 10: raise it to 11 or more"
    )

    class Interrupted(HigherOrLower):
        def demonstration(self, problem):
            return ["5", "h"]

    with pytest.raises(ValueError, match=r"Interrupted.demonstration returned 2 turns: .* an odd number"):
        check_solutions(Interrupted(), problems, GREEDY, limits_of(task, GREEDY, ConversationConfig()))


def test_evaluation_converses_and_leaves_out_the_rows_that_fill_up_a_batch():
    task, problems = HigherOrLower(), ["6"] * 300 + ["5"] * 300
    limits = limits_of(task, GREEDY, ConversationConfig())
    judged = solve(THREE_TURNS, None, task, problems, jax.random.key(0), GREEDY, 2, limits)
    assert len(judged.rewards) == len(judged.turns.texts) == 600 and judged.rewards.all()
    np.testing.assert_array_equal(judged.turns.counts, [3] * 300 + [1] * 300)
    assert len(task.asked) == 300 * 3 + 300  # and nobody was asked about the copies


# --- a real model ---

MODEL = models.Transformer(
    models.TransformerConfig(
        vocab_size=TOKENIZER.vocabulary_size,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_token=2,
        expert_size=16,
    )
)
SAMPLED = SamplerConfig(max_new_tokens=4, top_k=99)
TALKATIVE = ConversationConfig(max_turns=4, max_tokens=15)
PROBLEMS = ["6", "5", "7", "6", "5", "7", "5", "5"]


class ManyStops(Characters):
    """High digits end a turn too, so that a model that knows nothing has turns of all lengths."""

    stop_ids = (EOS, *ids("6789"))


class Wordy(HigherOrLower):
    """Its answers are of several lengths, and none of them is a number."""

    tokenizer = ManyStops(TOKENIZER.alphabet)

    def respond(self, problem, conversation):
        return "?" + "hl."[: len(conversation[-1]) % 4] if len(conversation) < 7 else None


@functools.cache
def wordy_params():
    shapes, rng = jax.eval_shape(lambda: models.init_params(MODEL.config, jax.random.key(0))), np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32), shapes)


@functools.cache
def wordy(chunks=1):
    """Conversations of one to four turns, with the route of the sampler."""
    rollout, judged = talk(MODEL, PROBLEMS, TALKATIVE, SAMPLED, chunks, Wordy(), wordy_params())
    return jax.device_get(rollout), judged


@functools.cache
def one_forward():
    """Log-probabilities [T] and router logits [L, T, E] of each whole conversation, in one forward pass."""
    rollout, _ = wordy()

    @jax.jit
    def read(tokens, segment_ids):
        output = MODEL.apply({"params": wordy_params()}, tokens[:, :-1], segment_ids=segment_ids[:, :-1])
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(output.logits), tokens[:, 1:, None], axis=-1)[..., 0]
        return log_probs, jnp.swapaxes(output.router_logits, 0, 1)

    def without_padding(row, log_probs, router_logits):
        used = rollout.segment_ids[row, :-1] > 0
        used[np.flatnonzero(rollout.segment_ids[row])[-1] :] = False  # the last token is never read
        return np.asarray(log_probs)[used], np.asarray(router_logits)[:, used]

    log_probs, router_logits = read(rollout.tokens, rollout.segment_ids)
    found = [without_padding(row, log_probs[row], router_logits[row]) for row in range(len(PROBLEMS))]
    # And the longest one by itself, as no batch has ever seen it.
    longest = int(np.argmax(rollout.segment_ids.sum(axis=1)))
    alone = rollout.tokens[longest][rollout.segment_ids[longest] > 0][None]
    log_probs, router_logits = (array[0] for array in read(alone, np.ones_like(alone)))
    np.testing.assert_allclose(found[longest][0], log_probs, rtol=0, atol=2e-6)
    np.testing.assert_allclose(found[longest][1], router_logits, rtol=0, atol=2e-6)
    return found


def test_the_conversations_of_these_tests_are_of_many_kinds():
    rollout, judged = wordy()
    assert len(set(judged.turns.counts)) > 2 and judged.truncated.any() and not judged.truncated.all()
    assert judged.turns.token_limited.any() and (judged.turns.counts == 4).any()
    assert (rollout.segment_ids[:, 1:].sum(axis=1) > rollout.mask.sum(axis=1) + 2).any()


def test_the_samplers_log_probs_of_every_turn_are_those_of_one_forward_pass():
    rollout, _ = wordy()
    for row, (log_probs, _) in enumerate(one_forward()):
        drawn = rollout.mask[row][rollout.segment_ids[row][1:] > 0][-len(log_probs) :]
        np.testing.assert_allclose(
            rollout.sampler_log_probs[row][rollout.mask[row]], log_probs[drawn], rtol=0, atol=2e-6
        )
    assert not rollout.sampler_log_probs[~rollout.mask].any()


@pytest.mark.parametrize("row_length", [None, 30])
def test_one_scoring_pass_finds_log_probs_and_routes_of_all_turns(row_length):
    rollout, _ = wordy()
    batch, _ = pack(rollout, TALKATIVE.max_tokens, np.arange(len(PROBLEMS))[::-1], Packing(1, 2, row_length))
    scored, statistics = score(MODEL, wordy_params(), batch, LearnerConfig(micro_batches=2))
    back = np.argsort(responses_of(rollout, batch))
    old_log_probs = np.asarray(scored.old_log_probs).reshape(len(PROBLEMS), -1)[back]
    masks = np.asarray(scored.batch.mask).reshape(len(PROBLEMS), -1)[back]
    places = np.asarray(batch.places).reshape(len(PROBLEMS), -1)[back]
    parts = np.repeat(np.arange(2), len(PROBLEMS) // 2)[back]
    experts = np.asarray(scored.old_route.expert_ids)  # [parts, N, L, K, T]
    for row, (log_probs, router_logits) in enumerate(one_forward()):
        prompt = int((rollout.segment_ids[row, :2] > 0).sum())
        own = np.flatnonzero(masks[row])
        np.testing.assert_allclose(old_log_probs[row][own], log_probs[prompt - 1 + own], rtol=0, atol=2e-6)
        for column in own:
            of_row, place = divmod(places[row, column], experts.shape[-1])
            expected = np.argsort(-router_logits[:, prompt - 1 + column], axis=-1)[:, :2]
            found = experts[parts[row], of_row, :, :, place]
            np.testing.assert_array_equal(np.sort(found, axis=-1), np.sort(expected, axis=-1))
    assert float(np.sum(statistics["sampler_kl"].weight)) == rollout.mask.sum()


def responses_of(rollout, batch):
    """The response that each line of a batch holds: its sampler's log-probabilities are its own."""
    lines = np.asarray(batch.sampler_log_probs).reshape(len(PROBLEMS), -1)
    own = rollout.sampler_log_probs[:, -lines.shape[1] :]
    return np.array([np.flatnonzero((own == line).all(axis=1))[0] for line in lines])


def test_the_samplers_route_of_all_turns_is_joined():
    rollout, _ = wordy()
    for row, (_, router_logits) in enumerate(one_forward()):
        used = np.flatnonzero(rollout.segment_ids[row])[:-1]  # the last token is never read
        expected = np.argsort(-router_logits, axis=-1)[..., :2]  # [L, T, K]
        found = np.moveaxis(rollout.route[row][:, :, used], -1, 1)
        np.testing.assert_array_equal(np.sort(found, axis=-1), np.sort(expected, axis=-1))
        outside = np.delete(rollout.route[row], used, axis=-1)
        assert not outside.any()


def test_chunks_and_neighbours_change_nothing_that_is_said():
    rollout, judged = wordy()
    in_parts, judged_in_parts = wordy(4)
    np.testing.assert_array_equal(in_parts.tokens, rollout.tokens)
    np.testing.assert_array_equal(in_parts.mask, rollout.mask)
    assert judged_in_parts.turns.texts == judged.turns.texts
    np.testing.assert_allclose(in_parts.sampler_log_probs, rollout.sampler_log_probs, rtol=0, atol=2e-6)


def test_turns_of_one_conversation_are_drawn_with_different_noise():
    # The same context in every turn, were it not for the turn: a policy without a preference.
    class Even(StatelessPolicy):
        def apply(self, variables, tokens, positions=None, segment_ids=None, cache=None):
            logits = jnp.zeros((*tokens.shape, TOKENIZER.vocabulary_size)).at[..., jnp.array([PAD, EOS])].set(-1e9)
            return ModelOutput(logits.at[..., EOS].add(jnp.where(tokens >= ids("0")[0], 2e9, 0)), None, cache)

    sampler, config = SamplerConfig(max_new_tokens=12), ConversationConfig(max_turns=6, max_tokens=200)
    _, judged = talk(Even(), ["6"] * 8, config, sampler)
    firsts = [turns[0] for turns in judged.turns.texts]
    assert len(set(firsts)) > 4
    assert all(len(set(turns[::2])) > 1 for turns in judged.turns.texts if len(turns) > 5)


def test_a_response_with_a_limit_of_zero_is_not_drawn():
    prompts, mask = jnp.array([ids("?")] * 3, jnp.int32), jnp.array([[True], [False], [True]])
    keys, sampler = jax.random.split(jax.random.key(0), 3), SamplerConfig(max_new_tokens=3, temperature=0.0)
    policy = Recites("?5 55")
    samples = generate(policy, None, prompts, mask, keys, sampler, (EOS,), limits=jnp.array([2, 0, 9], jnp.int32))
    assert isinstance(samples, Samples)
    np.testing.assert_array_equal(samples.tokens, [[*ids("55"), PAD], [PAD] * 3, ids("555")])
    np.testing.assert_array_equal(samples.mask, [[1, 1, 0], [0, 0, 0], [1, 1, 1]])
    with pytest.raises(ValueError, match=r"limits need one entry and one slot a response, 3; got shape \(2,\)"):
        generate(policy, None, prompts, mask, keys, sampler, (EOS,), limits=jnp.array([2, 0], jnp.int32))
    with pytest.raises(ValueError, match="and 1 slots: leave slots out"):
        few = dataclasses.replace(sampler, slots=1)
        generate(policy, None, prompts, mask, keys, few, (EOS,), limits=jnp.array([2, 0, 1], jnp.int32))
