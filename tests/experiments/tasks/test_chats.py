"""Prompts of records: texts and chats, and a sentence for each message that is none."""

import pytest
from support.tasks import ChatCharacters

from experiments.tasks.chats import Asked, Message, check_one_kind, read_prompt, text_of
from experiments.tasks.records import Record
from experiments.text import ask


def user(content="Q"):
    return {"role": "user", "content": content}


SYSTEM, REPLY = {"role": "system", "content": "S"}, {"role": "assistant", "content": "A"}
Q, S, A = Message("user", "Q"), Message("system", "S"), Message("assistant", "A")


def test_texts_and_chats_are_read_from_the_field_that_is_named_or_found():
    parts = user([{"type": "text", "text": "one "}, {"text": "two", "image": None}])
    read = [
        ({"prompt": "Q"}, Asked("Q")),
        ({"messages": None, "prompt": " Q "}, Asked(" Q ")),
        ({"prompt": None, "messages": [user()]}, Asked((Q,))),
        ({"prompt": [SYSTEM, user()]}, Asked((S, Q))),
        ({"messages": [SYSTEM, user(), REPLY, user(), REPLY]}, Asked((S, Q, A, Q), "A")),
        ({"prompt": [user(), REPLY]}, Asked((Q, A))),
        ({"prompt": [{**user(), "name": None, "tool_calls": []}]}, Asked((Q,))),
        ({"prompt": [parts]}, Asked((Message("user", "one two"),))),
    ]
    for fields, asked in read:
        assert read_prompt(fields) == asked
    assert read_prompt({"prompt": "no", "question": "Q"}, "question") == Asked("Q")


def test_what_is_no_prompt_is_refused_with_its_place():
    wrong = {
        "'prompt' is empty": " \n",
        "'prompt' is 3: it must be a text, or a list of messages": 3,
        r"'prompt' is \[\]": [],
        r"'prompt' is \['Q'\]: it must be": ["Q"],
        "'prompt' is {'role'": user(),
        r"prompt\[0\] has 'from' and 'value', as ShareGPT": [{"from": "human", "value": "Q"}],
        r"prompt\[1\]: 'content' is missing or null; the record has 'role'": [
            SYSTEM,
            {"role": "user", "content": None},
        ],
        r"prompt\[0\] has the role 'tool'; the roles are system, user, assistant": [{"role": "tool", "content": "3"}],
        r"prompt\[0\] has the role 'developer'": [{"role": "developer", "content": "S"}],
        r"prompt\[0\] has the role \['user'\]": [{"role": ["user"], "content": "S"}],
        r"prompt\[1\] has 'tool_calls'": [user(), {**REPLY, "tool_calls": [{"name": "f"}]}],
        r"the content of prompt\[0\], a message of the user, is empty": [user(" ")],
        r"the content of prompt\[1\], a message of the user, is empty": [SYSTEM, user([])],
        r"the content of prompt\[0\] is 3": [user(3)],
        r"prompt\[0\]\.content\[1\] is of the type 'image_url', but the models here read text alone": [
            user([{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "x"}}])
        ],
        r"prompt\[0\]\.content\[0\] is of the type 'image'": [user([{"type": "image"}])],
        r"prompt\[0\]\.content\[0\] is 'Q': it must be": [user(["Q"])],
        r"prompt\[0\]\.content\[0\] is \{'type': 'text'\}": [user([{"type": "text"}])],
        "has a system message in place 1": [user(), SYSTEM],
        "has the roles system: a question of the user must come last": [SYSTEM],
        "has the roles assistant: a question": [REPLY],
        "has the roles user, assistant, assistant": [user(), REPLY, REPLY],
    }
    for reason, value in wrong.items():
        with pytest.raises(ValueError, match=reason):
            read_prompt({"prompt": value})
    with pytest.raises(ValueError, match="'messages' has the roles none"):
        read_prompt({"messages": [REPLY]})
    with pytest.raises(ValueError, match="'prompt' is missing or null; the record has 'text'"):
        read_prompt({"text": "Q"})
    with pytest.raises(ValueError, match="'problem' is missing or null; the record has 'prompt'"):
        read_prompt({"prompt": "Q"}, "problem")


def test_a_system_message_for_all_prompts_is_refused_where_a_chat_brings_its_own():
    assert read_prompt({"prompt": [user()]}, system="T") == Asked((Q,))
    with pytest.raises(ValueError, match=r"brings a system message of its own, and task\.system is set too"):
        read_prompt({"prompt": [SYSTEM, user()]}, system="T")


def test_prompts_are_written_by_the_tokenizer():
    written = {
        ("Q",): "<user>(Q)<assistant>",
        ("Q", "T"): "<system>T<user>(Q)<assistant>",
        ((S, Q, A, Q),): "<system>S<user>Q<assistant>A<user>(Q)<assistant>",
        ((Q, A), "T"): "<system>T<user>(Q)<assistant>A",
    }
    for (prompt, *system), text in written.items():
        assert ask(ChatCharacters(), "({problem})", prompt, *system) == text


def test_the_text_of_a_prompt_tells_prompts_apart():
    prompts = ["Q", (Q,), (S, Q), (Q, A), (Message("user", "Q\nA"),)]
    assert len({text_of(prompt) for prompt in prompts}) == len(prompts)


def test_texts_and_chats_in_one_data_set_are_refused_by_tasks_that_need_one_kind():
    records = [Record(f"a.jsonl, line {number}", {}) for number in (1, 2, 3)]
    check_one_kind(records, ["Q", "R", "S"])
    check_one_kind([], [])
    with pytest.raises(ValueError, match=r"line 3: the prompt is a chat, but that of a\.jsonl, line 1 is a text"):
        check_one_kind(records, ["Q", "R", (Q,)])
