"""Prompts of records: a text, or the messages of a chat, as data sets for TRL and others have them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from experiments.tasks.records import Record, require, shorten


class Message(NamedTuple):
    """One message of a chat."""

    role: str
    """ "system", "user" or "assistant"."""
    content: str


Prompt = str | tuple[Message, ...]
"""What a problem asks: a text, or the messages of a chat. A chat that ends with an assistant's message is one in which
the model goes on with this message."""

PROMPT_FIELDS = ("prompt", "messages")
"""Fields in which a prompt is looked for where none is named."""

_ROLES = ("system", "user", "assistant")
_CALLS = ("tool_calls", "function_call")


@dataclass(frozen=True)
class Asked:
    """The prompt of a record, and the answer that its chat ends with, if it does."""

    prompt: Prompt
    reply: str | None = None
    """The assistant's last message of a field `messages`."""


def read_prompt(fields: Mapping[str, Any], field: str | None = None, system: str = "") -> Asked:
    """Return what a record asks.

    The field holds a text, or a list of messages with "role" and "content". A content is a text, or a list of parts
    {"type": "text", "text": ...}, which are joined. If the last message is the assistant's, the model goes on with it,
    as in TRL; but a field with the name `messages` is a whole conversation, whose last message is the reply.

    Args:
      fields: those of the record.
      field: the name of the prompt's field. None: "prompt", or else "messages".
      system: the system message that every prompt is to get; empty: none.

    Raises:
      ValueError: if the field is missing, empty, or of another kind; if a message is not one of the system, the user or
        the assistant, or they stand in an order that leaves nothing to answer; if the record brings a system message,
        and there is one for all.
    """
    if field is None:
        field = next((name for name in PROMPT_FIELDS if fields.get(name) is not None), None)
        if field is None:
            require(fields, PROMPT_FIELDS[0])
    assert field is not None
    require(fields, field)
    value = fields[field]
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{field!r} is empty")
        return Asked(value)
    if not isinstance(value, list) or not value or not all(isinstance(message, Mapping) for message in value):
        raise ValueError(
            f"{field!r} is {shorten(value)}: it must be a text, or a list of messages with role and content"
        )
    messages = [_message(message, f"{field}[{number}]") for number, message in enumerate(value)]
    reply = messages.pop().content if field == "messages" and messages[-1].role == "assistant" else None
    _check_order(messages, field)
    if system and messages[0].role == "system":
        raise ValueError(
            f"{field!r} brings a system message of its own, and task.system is set too: leave task.system out, or the "
            "message"
        )
    return Asked(tuple(messages), reply)


def _message(message: Mapping[str, Any], place: str) -> Message:
    if "from" in message and "value" in message and "role" not in message:
        raise ValueError(
            f"{place} has 'from' and 'value', as ShareGPT writes chats: rename them to 'role' and 'content'"
        )
    try:
        require(message, "role", "content")
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    role, content = message["role"], message["content"]
    if role not in _ROLES:
        raise ValueError(f"{place} has the role {shorten(role)}; the roles are {', '.join(_ROLES)}")
    if calls := [name for name in _CALLS if message.get(name)]:
        raise ValueError(f"{place} has {calls[0]!r}, but calls of tools cannot be part of a prompt")
    if isinstance(content, list):
        content = "".join(_text_of_part(part, f"{place}.content[{number}]") for number, part in enumerate(content))
    if not isinstance(content, str):
        raise ValueError(f"the content of {place} is {shorten(content)}: it must be a text, or a list of parts of text")
    if not content.strip():
        raise ValueError(f"the content of {place}, a message of the {role}, is empty: leave the message out")
    return Message(role, content)


def _text_of_part(part: Any, place: str) -> str:
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    if kind is not None and kind != "text":
        raise ValueError(f"{place} is of the type {shorten(kind)}, but the models here read text alone")
    if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
        raise ValueError(f'{place} is {shorten(part)}: it must be {{"type": "text", "text": ...}}')
    return part["text"]


def _check_order(messages: Sequence[Message], field: str) -> None:
    roles = [message.role for message in messages]
    if "system" in roles[1:]:
        raise ValueError(
            f"{field!r} has a system message in place {roles.index('system', 1)}, but it can only be the first"
        )
    asked = roles[:-1] if roles[-1:] == ["assistant"] else roles
    if asked[-1:] != ["user"]:
        raise ValueError(f"{field!r} has the roles {', '.join(roles) or 'none'}: a question of the user must come last")


def text_of(prompt: Prompt) -> str:
    """Return a prompt as one text, the same for the same prompt: a text as it is, and messages as JSON."""
    return prompt if isinstance(prompt, str) else json.dumps([message._asdict() for message in prompt])


def check_one_kind(records: Sequence[Record], prompts: Sequence[Prompt]) -> None:
    """Raise ValueError, naming the first record of the other kind, if some prompts are texts and others chats."""
    kinds = [isinstance(prompt, str) for prompt in prompts]
    if len(set(kinds)) > 1:
        other = records[kinds.index(not kinds[0])].place
        first, second = ("a text", "a chat") if kinds[0] else ("a chat", "a text")
        raise ValueError(f"{other}: the prompt is {second}, but that of {records[0].place} is {first}: give one kind")
