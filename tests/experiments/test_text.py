"""Tokenizers of Hugging Face folders, with a byte-level BPE that is trained here: round trips, chats letter for letter,
tokens that end a response, folders that are refused, and prompts through padding, sampling and judging."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.policies import StatelessPolicy
from support.tasks import ExactTask
from tokenizers import Tokenizer, decoders, processors, trainers
from tokenizers import models as token_models
from tokenizers.pre_tokenizers import ByteLevel

from experiments.text import ChatConfig, HuggingFaceTokenizer
from rspo_jax.rollouts import SamplerConfig, encode_prompts, judge, sample_in_chunks, usable_problems
from rspo_jax.types import ModelOutput, Samples

BEGIN, PAD, START, END = "<|begin|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
CORPUS = [
    "How many apples are left of twelve apples if three apples are eaten?",
    "Nine apples are left, because twelve minus three is nine.",
    "A train has twelve cars, and every car has many seats. How many seats has the train?",
] * 3
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def write_folder(folder, template=TEMPLATE, **settings):
    """Write a folder like Qwen's checkpoints, with a tokenizer of 320 ids: four special, 256 bytes, 60 merges."""
    tokenizer = Tokenizer(token_models.BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [BEGIN, PAD, START, END]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # Training jobs leave these settings behind in the file; they must not affect a prompt.
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=16, pad_token=PAD, pad_id=1)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": BEGIN, "eos_token": END, "pad_token": PAD}
    write_json(folder / "tokenizer_config.json", config | {"chat_template": template} | settings)
    return folder


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return HuggingFaceTokenizer(folder)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


# --- text and ids ---


@pytest.mark.parametrize(
    "text",
    [
        "How many seats has the train?",
        "",
        " two  spaces ,and a space before a comma , don't tidy that up .",
        "\ttabs\r\nand\n\n\nlines\n",
        "naïve Ünïcode: 日本語, ½ ≤ √2, \U0001d538, \U0001f468\u200d\U0001f469\u200d\U0001f467, e\u0301, \u200f, \x00",
    ],
)
def test_text_there_and_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert type(ids) is list and all(type(token) is int and 4 <= token < 320 for token in ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(np.array(ids, np.int32)) == text


def test_nothing_is_added_cut_or_filled_up(tokenizer):
    text = " ".join(CORPUS)
    ids = tokenizer.encode(text)
    # The folder's tokenizer.json alone would cut to eight tokens, and begin with a mark.
    assert 60 < len(ids) < len(text) / 2
    assert len(tokenizer.encode("a")) == 1


def test_special_tokens_in_a_text_are_tokens_and_stand_for_no_text(tokenizer):
    ids = tokenizer.encode(f"{START}apples{END}")
    assert (ids[0], ids[-1]) == (2, 3)
    assert tokenizer.decode([0, 1, *ids, 1]) == "apples"


def test_ids_that_only_the_model_has_decode_to_nothing(tokenizer):
    assert tokenizer.vocabulary_size == 320
    assert tokenizer.decode([*tokenizer.encode("apples"), 320, 5000]) == "apples"


def test_a_model_of_another_tokenizer_is_refused(tokenizer, folder):
    tokenizer.check_model(320)
    tokenizer.check_model(384)
    with pytest.raises(ValueError, match=r"model has 320 tokens, but the model's vocabulary has only 319: use the"):
        tokenizer.check_model(319)


# --- what ends a response ---


def test_stop_ids_are_gathered_from_all_files(copy):
    write_json(copy / "config.json", {"model_type": "qwen3_moe", "eos_token_id": 7})
    assert HuggingFaceTokenizer(copy).stop_ids == (3, 7)
    write_json(copy / "generation_config.json", {"eos_token_id": [5, 3, 6]})
    tokenizer = HuggingFaceTokenizer(copy)
    assert (tokenizer.stop_ids, tokenizer.eos_id, tokenizer.pad_id) == ((3, 5, 6, 7), 3, 1)
    write_json(copy / "generation_config.json", {"eos_token_id": None})
    assert HuggingFaceTokenizer(copy).stop_ids == (3, 7)


def test_without_a_padding_token_the_end_fills_up(tmp_path):
    folder = write_folder(tmp_path / "model", pad_token=None)
    path = folder / "tokenizer.json"
    write_json(path, json.loads(path.read_text()) | {"padding": None})
    assert HuggingFaceTokenizer(folder).pad_id == 3


def test_an_end_that_only_the_generation_config_names(tmp_path):
    folder = write_folder(tmp_path / "model", eos_token=None)
    with pytest.raises(ValueError, match=r"model names no token that ends a response: name the tokenizer's eos_token"):
        HuggingFaceTokenizer(folder)
    write_json(folder / "generation_config.json", {"eos_token_id": 9})
    assert HuggingFaceTokenizer(folder).stop_ids == (9,)


@pytest.mark.parametrize("wrong", ["3", [3, None], True, -1])
def test_an_end_that_is_no_id(copy, wrong):
    write_json(copy / "generation_config.json", {"eos_token_id": wrong})
    with pytest.raises(ValueError, match=r"generation_config\.json has the eos_token_id .* must be an id or a list"):
        HuggingFaceTokenizer(copy)


def test_a_damaged_file_is_named(copy):
    (copy / "config.json").write_text('{"eos_token_id": 3')
    with pytest.raises(ValueError, match=r"model/config\.json is damaged: Expecting"):
        HuggingFaceTokenizer(copy)


def test_stops_of_the_chat_come_last_and_may_be_the_only_ones(folder, tmp_path):
    chat = ChatConfig(stop_ids=(2, 3), stop_strings=("\nUser:", "Stop"))
    tokenizer = HuggingFaceTokenizer(folder, chat)
    assert (tokenizer.stop_ids, tokenizer.eos_id, tokenizer.stop_strings) == ((3, 2), 3, ("\nUser:", "Stop"))
    nameless = write_folder(tmp_path / "model", eos_token=None)
    assert HuggingFaceTokenizer(nameless, chat).stop_ids == (2, 3)


def test_stops_that_are_refused(folder):
    for chat, message in (
        (ChatConfig(stop_ids=(3, 320)), r"chat\.stop_ids has 320, but the tokens of .*model are 0 to 319"),
        (ChatConfig(stop_ids=(-1,)), r"chat\.stop_ids has -1"),
        (
            ChatConfig(stop_strings=(f"x{END}",)),
            r"never contains the stop string 'x<\|im_end\|>', .* --chat\.stop-ids 3",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            HuggingFaceTokenizer(folder, chat)
    with pytest.raises(ValueError, match=r"a stop string of chat\.stop_strings is empty"):
        ChatConfig(stop_strings=("a", ""))


def test_a_turn_that_ends_with_no_stop_is_said(copy, caplog):
    config = copy / "tokenizer_config.json"
    write_json(config, json.loads(config.read_text()) | {"eos_token": BEGIN})
    said = r"ends a turn with <|im_end|>, which ends no response"
    HuggingFaceTokenizer(copy).chat([USER])
    assert said in caplog.text and caplog.text.count("add --chat.stop-ids 3") == 1
    caplog.clear()
    HuggingFaceTokenizer(copy, ChatConfig(stop_ids=(3,))).chat([USER])
    HuggingFaceTokenizer(copy, ChatConfig("plain")).chat([USER])
    (copy / "chat_template.jinja").write_text("{{ messages[0].content }}\n{{ messages[1].content }}\n")
    HuggingFaceTokenizer(copy).chat([USER, ASSISTANT])
    assert caplog.text == ""
    (copy / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}\n### {% endfor %}")
    HuggingFaceTokenizer(copy).chat([USER])
    assert "ends a turn with ###" in caplog.text and "add --chat.stop-strings '###'" in caplog.text
    caplog.clear()
    HuggingFaceTokenizer(copy, ChatConfig(stop_strings=("###",))).chat([USER])
    assert caplog.text == ""


# --- folders that cannot be read ---


def test_folders_without_a_tokenizer(copy, tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder: give the folder of a checkpoint"):
        HuggingFaceTokenizer(tmp_path / "nowhere")
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"the tokenizer of .*model cannot be read: "):
        HuggingFaceTokenizer(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"model has no tokenizer\.json: give the folder .* writes this one$"):
        HuggingFaceTokenizer(copy)


def test_it_is_quiet_and_needs_neither_torch_nor_a_network(folder):
    program = """
import socket, sys, warnings
sys.modules["torch"] = None  # as if it were not installed
def refuse(*_): raise AssertionError("the network")
socket.socket.connect = socket.getaddrinfo = refuse
from experiments.text import HuggingFaceTokenizer
assert "transformers" not in sys.modules
tokenizer = HuggingFaceTokenizer(sys.argv[1])
print(tokenizer.decode(tokenizer.encode(tokenizer.chat([{"role": "user", "content": "apples"}]))))
import logging
logging.getLogger("transformers").warning("heard again")
"""
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    for name in ("TRANSFORMERS_NO_ADVISORY_WARNINGS", "TRANSFORMERS_VERBOSITY", "HF_HUB_OFFLINE", "CI"):
        environment.pop(name, None)
    result = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "[transformers] heard again\n")
    assert result.stdout == "user\napples\nassistant\n\n"


# --- chats ---

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "How many?\n"}
ASSISTANT = {"role": "assistant", "content": "9"}


@pytest.mark.parametrize(
    ("config", "messages", "expected"),
    [
        (ChatConfig(), [USER], "<|im_start|>user\nHow many?\n<|im_end|>\n<|im_start|>assistant\n"),
        (
            ChatConfig(options=("enable_thinking=true",)),
            [SYSTEM, USER],
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow many?\n<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            ChatConfig(options=("enable_thinking=false",)),
            [USER],
            "<|im_start|>user\nHow many?\n<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
        (
            ChatConfig(),
            [USER, ASSISTANT, SYSTEM],
            "<|im_start|>user\nHow many?\n<|im_end|>\n<|im_start|>assistant\n9<|im_end|>\n"
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>assistant\n",
        ),
        (ChatConfig("plain"), [SYSTEM, USER], "<|begin|>Be brief.\n\nHow many?\n"),
    ],
)
def test_the_text_of_a_chat(folder, config, messages, expected):
    tokenizer = HuggingFaceTokenizer(folder, config)
    assert tokenizer.chat(messages) == expected
    assert tokenizer.encode(expected).count(2) == expected.count(START)


def test_a_plain_chat_begins_as_the_tokenizer_begins(copy):
    path = copy / "tokenizer.json"
    write_json(path, json.loads(path.read_text()) | {"post_processor": None})
    assert HuggingFaceTokenizer(copy, ChatConfig("plain")).chat([USER]) == "How many?\n"


def test_a_template_in_a_file_of_its_own(copy):
    (copy / "chat_template.jinja").write_text("{{ messages[0].content }} -> {{ effort }}")
    assert HuggingFaceTokenizer(copy, ChatConfig(options=("effort=low",))).chat([SYSTEM]) == "Be brief. -> low"


def test_a_template_without_today(copy):
    template = copy / "chat_template.jinja"
    template.write_text(
        "{% if strftime_now is defined %}{{ strftime_now( '%d %b %Y' ) }}|{{ strftime_now(\"%Y\") }}{% endif %}"
    )
    assert HuggingFaceTokenizer(copy).chat([USER]) == "01 Jan 2025|2025"
    assert HuggingFaceTokenizer(copy, ChatConfig(date="1999-12-31")).chat([USER]) == "31 Dec 1999|1999"
    template.write_text("{{ strftime_now(messages[0].content) }}")
    with pytest.raises(ValueError, match=r"in a way that cannot be fixed \(strftime_now\): write a date into"):
        HuggingFaceTokenizer(copy).chat([USER])


LLAMA_LIKE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL_LIKE = (
    "{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }}[/INST]"
    "{% elif message.role == 'assistant' %} {{ message.content }} <|im_end|>"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
WITHOUT_STOPS = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
HINT = [{"role": "user", "content": "An answer? An answer.. higher "}]


@pytest.mark.parametrize(
    ("template", "config", "expected"),
    [
        (
            TEMPLATE,
            {"options": ("enable_thinking=false",)},
            "\n<|im_start|>user\nAn answer? An answer.. higher <|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
        (
            LLAMA_LIKE,
            {},
            "<|start_header_id|>user<|end_header_id|>\n\nAn answer? An answer.. higher<|im_end|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (MISTRAL_LIKE, {}, "[INST] An answer? An answer.. higher [/INST]"),
        (WITHOUT_STOPS, {}, "\nuser: An answer? An answer.. higher \nassistant:"),
        (WITHOUT_STOPS, {"stop_strings": ("user:",)}, " An answer? An answer.. higher \nassistant:"),
        (WITHOUT_STOPS, {"stop_strings": ("\nuser:",)}, " An answer? An answer.. higher \nassistant:"),
        (TEMPLATE, {"template": "plain"}, "\n\nAn answer? An answer.. higher "),
    ],
    ids=["ChatML", "Llama-like", "Mistral-like", "no stop", "stop string", "stop string with a space", "plain"],
)
def test_the_text_between_two_turns_is_the_templates_own(folder, tmp_path, template, config, expected):
    copy = write_folder(tmp_path / "model", template)
    assert HuggingFaceTokenizer(copy, ChatConfig(**config)).continue_chat(HINT) == expected


def test_a_prompt_a_turn_and_the_text_between_are_the_chat_that_the_template_writes(folder):
    tokenizer = HuggingFaceTokenizer(folder)
    question, hints = {"role": "user", "content": "Guess"}, [{"role": "tool", "content": "12"}, HINT[0]]
    text = tokenizer.chat([question]) + "Seven" + END + tokenizer.continue_chat(hints)
    assert text == tokenizer.chat([question, {"role": "assistant", "content": "Seven"}, *hints])
    assert tokenizer.encode(text) == [
        *tokenizer.encode(tokenizer.chat([question])),
        *tokenizer.encode("Seven" + END),
        *tokenizer.encode(tokenizer.continue_chat(hints)),
    ]


def test_what_cannot_be_said_between_two_turns(folder, tmp_path):
    with pytest.raises(ValueError, match="nothing is said between two turns: give at least one message"):
        HuggingFaceTokenizer(folder).continue_chat([])
    with pytest.raises(ValueError, match=r"refuses messages of user, assistant, tool: only user and assistant"):
        HuggingFaceTokenizer(write_folder(tmp_path / "a", MISTRAL_LIKE)).continue_chat(
            [{"role": "tool", "content": ""}]
        )
    last_only = "{{ messages[-1].content }}"
    with pytest.raises(ValueError, match="leaves out what the model has said before"):
        HuggingFaceTokenizer(write_folder(tmp_path / "b", last_only)).continue_chat(HINT)


def test_a_folder_without_a_template(tmp_path):
    folder = write_folder(tmp_path / "model", template=None)
    with pytest.raises(ValueError, match=r"model has no chat template: set chat\.template to plain, or put"):
        HuggingFaceTokenizer(folder).chat([USER])
    assert HuggingFaceTokenizer(folder, ChatConfig("plain")).chat([USER]) == "<|begin|>How many?\n"


def test_what_a_template_refuses(copy):
    (copy / "chat_template.jinja").write_text("{{ raise_exception('users only') }}")
    with pytest.raises(ValueError, match=r"the chat template of .*model refuses messages of system, user: users only"):
        HuggingFaceTokenizer(copy).chat([SYSTEM, USER])


def test_options_that_the_template_does_not_have(folder):
    tokenizer = HuggingFaceTokenizer(folder, ChatConfig(options=("enable_thinkin=false",)))
    with pytest.raises(ValueError, match="has no variable enable_thinkin: leave the option out"):
        tokenizer.chat([USER])


def test_the_values_of_options():
    for text, value in {
        "false": False,
        "False": False,
        "true": True,
        "True": True,
        "null": None,
        "None": None,
        "3": 3,
        "-0.5": -0.5,
        ".5": 0.5,
        "1_000": 1000,
        '{"e": [1]}': {"e": [1]},
        "{'e': [True, None]}": {"e": [True, None]},
        "'False'": "False",
        '"3"': "3",
        "low": "low",
        "FALSE": "FALSE",
        "": "",
        "x=y": "x=y",
        "don't": "don't",
    }.items():
        found = ChatConfig(options=(f"a={text}",)).variables()["a"]
        assert (found, type(found)) == (value, type(value))


def test_a_flag_of_the_template_is_true_or_false(folder):
    expected = HuggingFaceTokenizer(folder, ChatConfig(options=("enable_thinking=false",))).chat([USER])
    assert expected.endswith("</think>\n\n")
    assert HuggingFaceTokenizer(folder, ChatConfig(options=("enable_thinking=False",))).chat([USER]) == expected
    for text, shown in {"FALSE": "'FALSE'", "off": "'off'", "": "''", "0": "0", "None": "None"}.items():
        tokenizer = HuggingFaceTokenizer(folder, ChatConfig(options=(f"enable_thinking={text}",)))
        with pytest.raises(
            ValueError, match=f"enable_thinking is {shown}, but it is a flag .* write enable_thinking=true"
        ):
            tokenizer.chat([USER])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"options": ("thinking",)}, "chat option 'thinking' is not of the form NAME=VALUE"),
        ({"options": ("no name=1",)}, "chat option 'no name=1' is not of the form NAME=VALUE"),
        (
            {"template": "plain", "options": ("a=1",)},
            "a plain chat has no template that could use a=1: leave",
        ),
        ({"date": "tomorrow"}, "chat.date is 'tomorrow': write it like 2025-01-01"),
    ],
)
def test_chat_configs_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ChatConfig(**settings)


# --- from problems to judged responses ---


class Apples(ExactTask):
    """Questions of very different lengths, asked as chats."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def prompt(self, problem):
        return self.tokenizer.chat([{"role": "user", "content": problem}])

    def solution(self, problem):
        return "nine"


class Fading(StatelessPolicy):
    """A tiny model whose state is a fading sum over all tokens so far, in their order: one more would show."""

    @staticmethod
    def params(random):
        return {
            "embedding": jnp.asarray(random.normal(size=(320, 16)), jnp.float32),
            "head": jnp.asarray(random.normal(size=(16, 320)), jnp.float32),
        }

    def apply(self, variables, tokens, positions=None, segment_ids=None, cache=None):
        params = variables["params"]

        def read(state, token):
            embedded, is_token = token
            state = jnp.where(is_token[:, None], jnp.float32(0.8) * state + embedded, state)
            return state, state @ params["head"]

        steps = jnp.swapaxes(params["embedding"][tokens], 0, 1), segment_ids.T > 0
        state, logits = jax.lax.scan(read, cache, steps)
        return ModelOutput(jnp.swapaxes(logits, 0, 1), None, state)

    def init_cache(self, batch_size, length):
        return jnp.zeros((batch_size, 16), jnp.float32)


QUESTIONS = ["apples?", CORPUS[0], CORPUS[2], "日本?"]


def test_problems_with_long_prompts_are_counted(tokenizer):
    task = Apples(tokenizer)
    # Begin and end of two messages, their roles and line breaks are the same for all.
    lengths = [len(tokenizer.encode(question)) for question in QUESTIONS]
    around = len(tokenizer.encode(task.prompt("")))
    usable = usable_problems(task, QUESTIONS, around + lengths[1])
    kept = [question for question, length in zip(QUESTIONS, lengths, strict=True) if length <= lengths[1]]
    assert 0 < len(kept) < 4
    assert usable == (kept, around + lengths[1], 4 - len(kept))


def test_stop_tokens_end_a_response_and_are_no_text(copy):
    write_json(copy / "generation_config.json", {"eos_token_id": [3, 0]})
    task = Apples(HuggingFaceTokenizer(copy))
    nine = task.tokenizer.encode("nine")
    rows = [[*nine, 3], [*nine, 0], nine, [2, *nine, 3], [3], [*nine, *nine, 3]]
    width = max(map(len, rows))
    mask = np.arange(width) < np.array([[len(row)] for row in rows])
    tokens = np.array([row + [1] * (width - len(row)) for row in rows], np.int32)
    judged = judge(task, QUESTIONS[:1] * 6, [Samples(jnp.asarray(tokens), jnp.asarray(mask), jnp.zeros(mask.shape))])
    assert judged.texts == ["nine", "nine", "nine", "nine", "", "ninenine"]
    np.testing.assert_array_equal(judged.truncated, [False, False, True, False, False, False])
    np.testing.assert_array_equal(judged.correct, [True, True, False, True, False, False])


def test_a_response_is_the_same_alone_and_beside_longer_prompts(copy):
    """A fifth of the vocabulary ends a response, so that they end at different lengths."""
    write_json(copy / "generation_config.json", {"eos_token_id": [3, *range(256, 320)]})
    task = Apples(HuggingFaceTokenizer(copy))
    policy, params = Fading(), Fading.params(np.random.default_rng(0))
    keys, sampler = jax.random.split(jax.random.key(1), len(QUESTIONS)), SamplerConfig(max_new_tokens=12)

    def draw(problems, keys):
        prompts = encode_prompts(task, problems, usable_problems(task, problems).width)
        (samples,) = sample_in_chunks(policy, params, prompts, keys, sampler, task.tokenizer, chunks=1)
        return prompts, samples

    prompts, together = draw(QUESTIONS, keys)
    for row, question in enumerate(QUESTIONS):
        ids = task.tokenizer.encode(task.prompt(question))
        np.testing.assert_array_equal(prompts.tokens[row], [1] * (prompts.tokens.shape[1] - len(ids)) + ids)
    _, alone = draw(QUESTIONS[:1], keys[:1])
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[0])
    np.testing.assert_array_equal(alone.mask[0], together.mask[0])
    np.testing.assert_allclose(alone.log_probs[0], together.log_probs[0], rtol=0, atol=1e-5)
    tokens, mask = np.asarray(together.tokens), np.asarray(together.mask)
    lengths = mask.sum(axis=1)
    assert len(set(lengths.tolist())) > 1
    is_stop = np.isin(tokens, task.tokenizer.stop_ids) & mask
    assert not np.any(is_stop & (np.arange(12) < lengths[:, None] - 1))
    np.testing.assert_array_equal(is_stop.any(axis=1) | (lengths == 12), True)
