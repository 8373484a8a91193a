"""Tokenizers and chat templates of Hugging Face folders, behind the trainer's `Tokenizer` protocol.

The folder's `tokenizer.json` alone decides how text becomes tokens, and the network is never asked. The tokens that end
a response are gathered here from all of the folder's files that may name them. PyTorch is not needed.
"""

import ast
import contextlib
import datetime
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from experiments.tasks.chats import Message, Prompt
from rspo_jax.types import Tokenizer

_logger = logging.getLogger(__name__)
_TOKENIZER_FILE = "tokenizer.json"
_ANSWER = "An answer"
_DATE_CALL = re.compile(r"""strftime_now\(\s*(["'])(?P<format>.*?)\1\s*\)""")


@runtime_checkable
class ChatTokenizer(Tokenizer, Protocol):
    """A tokenizer that also writes conversations in the format of its model."""

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the text of a conversation up to where the model answers. A message has "role" and "content"."""
        ...


def ask(tokenizer: ChatTokenizer, template: str, problem: Prompt, system: str = "") -> str:
    """Return the text of a prompt, up to where the model goes on.

    Args:
      tokenizer: writes the conversation.
      template: the user's question, with {problem} in place of the problem. Of a chat it is the user's last message.
      problem: the problem.
      system: the system message, unless it is empty; for a problem that brings none of its own.
    """
    messages = [Message("user", problem)] if isinstance(problem, str) else list(problem)
    begun = messages.pop().content if messages[-1].role == "assistant" else ""
    messages[-1] = Message("user", template.replace("{problem}", messages[-1].content))
    if system:
        messages.insert(0, Message("system", system))
    return tokenizer.chat([message._asdict() for message in messages]) + begun


@dataclass(frozen=True)
class ChatConfig:
    """Settings of the text of a prompt."""

    template: Literal["folder", "plain"] = "folder"
    """The chat template of the model's folder; or plain, for a model without one: the messages' texts, separated by
    empty lines, after the token that the tokenizer puts at the beginning of a text."""
    options: tuple[str, ...] = ()
    """Variables of the template as NAME=VALUE, such as enable_thinking=false. VALUE is JSON or a literal of Python, or
    else plain text; a flag of the template takes true or false, however it is spelled there, and nothing else."""
    date: str = "2025-01-01"
    """Today's date for templates that write it, fixed so that a run resumed tomorrow reads the same prompts."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end a response, beside those that the folder names."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a response before the first of them; what was drawn after it counts for nothing. The sampler sees
    only ids and draws on to a stop token or the limit, so an id is faster where there is one."""

    def __post_init__(self) -> None:
        try:
            datetime.date.fromisoformat(self.date)
        except ValueError as error:
            raise ValueError(f"chat.date is {self.date!r}: write it like 2025-01-01") from error
        if self.template == "plain" and self.options:
            raise ValueError(f"a plain chat has no template that could use {self.options[0]}: leave the options out")
        if not all(self.stop_strings):
            raise ValueError("a stop string of chat.stop_strings is empty, and would end every response at once")
        self.variables()

    def variables(self) -> dict[str, Any]:
        """Return the options by their names.

        Raises:
          ValueError: if one is not NAME=VALUE.
        """
        variables: dict[str, Any] = {}
        for option in self.options:
            name, equals, value = option.partition("=")
            if not equals or not name.isidentifier():
                raise ValueError(f"chat option {option!r} is not of the form NAME=VALUE, such as enable_thinking=false")
            variables[name] = _option_value(value)
        return variables


def _option_value(text: str) -> Any:
    """Read the value of an option: JSON first, then Python's spelling (True, None, 'text'), or else the text itself."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError):
            return read(text)
    return text


class HuggingFaceTokenizer:
    """An `rspo_jax.types.Tokenizer` that reads a Hugging Face folder, with its chat template.

    Attributes:
      pad_id: the folder's padding token; if it names none, the token that ends a response. Padding is masked.
      eos_id: the first of `stop_ids`.
      stop_ids: the `eos_token` of the tokenizer, those that `generation_config.json` and `config.json` name, and those
        of the chat's settings.
      stop_strings: texts that end a response.
      vocabulary_size: one more than the largest id. A model may have more ids, which decode to nothing.
    """

    def __init__(self, folder: str | os.PathLike[str], chat: ChatConfig = ChatConfig()) -> None:
        """Read the folder.

        Raises:
          ValueError: if it has no readable tokenizer, or neither it nor the chat names a token that ends a response; if
            a stop of the chat is no token, or no text that a response can contain.
        """
        self._folder, self._chat = Path(folder), chat
        tokenizer = _load(self._folder)
        self._tokenizer, self._backend = tokenizer, tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        self.stop_ids: tuple[int, ...] = _stop_ids(self._folder, tokenizer.eos_token_id, chat.stop_ids)
        self.stop_strings: tuple[str, ...] = chat.stop_strings
        self.eos_id: int = self.stop_ids[0]
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.vocabulary_size: int = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())
        self._check_stops()
        self._variables = chat.variables()
        self._template: str | None = None

    def encode(self, text: str) -> list[int]:
        """Return the ids of the text and no others. Special tokens written out in it, such as a chat's, count."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, without special tokens."""
        return self._backend.decode(list(map(int, ids)), skip_special_tokens=True)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the text that a model reads before it answers the messages; each has a "role" and a "content".

        Raises:
          ValueError: if the folder has no chat template, or the template refuses these messages or lacks an option.
        """
        if self._chat.template == "plain":
            return self.plain("\n\n".join(message["content"] for message in messages))
        return self._write(messages, add_generation_prompt=True)

    def plain(self, text: str) -> str:
        """Return a text after the mark that the tokenizer puts at the beginning of a text, if it does."""
        before, mark = self._backend.encode("", add_special_tokens=True).ids, self._tokenizer.bos_token
        return text if mark is None or before[:1] != [self._tokenizer.bos_token_id] else mark + text

    def continue_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the text between two turns of the model: what ends the one, the messages, and what begins the other.

        It is cut out of a chat that the folder's template writes, so an environment's answer
        (`rspo_jax.types.ConversationTask.respond`) reads as the model knows it. The token or text that ends a turn is
        left out, because the model has drawn it. Turns of the model stay as they were drawn, also where the template
        would take thoughts out of earlier ones.

        Args:
          messages: at least one, each with a "role", such as "user" or "tool", and a "content".

        Raises:
          ValueError: if there are no messages; as for `chat`; or if the template does not write the model's own turns.
        """
        if not messages:
            raise ValueError("nothing is said between two turns: give at least one message")
        answer = _ANSWER
        while any(answer in message["content"] for message in messages):
            answer += "."
        before = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": answer}]
        _, found, after = self.chat([*before, *messages]).partition(answer)
        if not found:
            raise ValueError(f"the chat template of {self._folder} leaves out what the model has said before")
        stops = [*map(self._backend.id_to_token, self.stop_ids), *self.stop_strings]
        for text in (after, after.lstrip()):  # a stop string may begin with a space, and a template write one before it
            if ends := [stop for stop in stops if text.startswith(stop)]:
                return text.removeprefix(max(ends, key=len))
        return after

    def _write(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        if self._template is None:
            self._template = self._checked_template()
            self._say_what_does_not_stop()
        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except TemplateError as error:
            roles = ", ".join(message.get("role", "?") for message in messages)
            raise ValueError(f"the chat template of {self._folder} refuses messages of {roles}: {error}") from error

    def _check_stops(self) -> None:
        wrong = [token for token in self._chat.stop_ids if not 0 <= token < self.vocabulary_size]
        if wrong:
            raise ValueError(
                f"chat.stop_ids has {wrong[0]}, but the tokens of {self._folder} are 0 to {self.vocabulary_size - 1}"
            )
        for text in self.stop_strings:
            ids = self.encode(text)
            if text not in self.decode(ids):
                raise ValueError(
                    f"the text of a response never contains the stop string {text!r}, because {self._folder} writes it "
                    f"with special tokens: give the id of its last token instead, --chat.stop-ids {ids[-1]}"
                )

    def _say_what_does_not_stop(self) -> None:
        """Warn if the template ends the model's turns with a token that ends no response."""
        turns = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": _ANSWER}]
        try:
            _, answered, after = self._write(turns, add_generation_prompt=False).rpartition(_ANSWER)
        except ValueError:  # a template may refuse this conversation and still write those of a task
            return
        if not answered or not after.strip() or any(after.lstrip().startswith(text) for text in self.stop_strings):
            return
        first = self.encode(after.lstrip())[0]
        if first in self.stop_ids:
            return
        if first in self._backend.get_added_tokens_decoder():
            name, way_out = self._backend.id_to_token(first), f"--chat.stop-ids {first}"
        else:
            name = after.strip().split()[0]
            way_out = f"--chat.stop-strings {name!r}"
        _logger.warning(
            "the chat template of %s ends a turn with %s, which ends no response, so that responses may run on to "
            "their limit; if the model was trained on this template, add %s",
            *(self._folder, name, way_out),
        )

    def check_model(self, vocabulary_size: int) -> None:
        """Refuse a model that was trained with another tokenizer.

        Raises:
          ValueError: if the model's vocabulary has fewer entries than there are tokens.
        """
        if self.vocabulary_size > vocabulary_size:
            raise ValueError(
                f"the tokenizer of {self._folder} has {self.vocabulary_size} tokens, but the model's vocabulary has "
                f"only {vocabulary_size}: use the tokenizer that the model was trained with"
            )

    def _checked_template(self) -> str:
        """Return the folder's template with the date fixed; raise ValueError if it lacks an option's variable."""
        if not self._tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {self._folder} has no chat template: set chat.template to plain, or put the "
                "template of its family into the folder as chat_template.jinja"
            )
        template = self._tokenizer.get_chat_template()
        if self._variables:
            self._check_options(template)
        today = datetime.date.fromisoformat(self._chat.date)
        template = _DATE_CALL.sub(lambda call: json.dumps(today.strftime(call["format"])), template)
        if "strftime_now(" in template:
            raise ValueError(
                f"the chat template of {self._folder} asks for the time in a way that cannot be fixed (strftime_now): "
                "write a date into its chat_template.jinja"
            )
        return template

    def _check_options(self, template: str) -> None:
        from jinja2 import TemplateSyntaxError

        from experiments.chat_template import TemplateVariables

        try:
            found = TemplateVariables(template)
        except TemplateSyntaxError as error:
            raise ValueError(f"the chat template of {self._folder} cannot be read: {error}") from error
        for name, value in self._variables.items():
            if name not in found.names:
                raise ValueError(f"the chat template of {self._folder} has no variable {name}: leave the option out")
            if name in found.flags and not isinstance(value, bool):
                raise ValueError(
                    f"chat option {name} is {value!r}, but it is a flag of the template of {self._folder}: write "
                    f"{name}=true or {name}=false"
                )


def _load(folder: Path) -> Any:
    """Return the tokenizer of `transformers`, which takes seconds to import."""
    if not (folder / _TOKENIZER_FILE).is_file():
        what = f"has no {_TOKENIZER_FILE}" if folder.is_dir() else "is not a folder"
        raise ValueError(
            f"{folder} {what}: give the folder of a checkpoint together with its tokenizer's files; if they are in "
            "another format, transformers' AutoTokenizer.from_pretrained(…).save_pretrained(…) writes this one"
        )
    with _without_advice():
        # This class reads tokenizer.json as it is. AutoTokenizer would rebuild some families' from the vocabulary.
        from transformers import PreTrainedTokenizerFast

        try:
            return PreTrainedTokenizerFast.from_pretrained(os.fspath(folder), local_files_only=True)
        except Exception as error:  # the Rust library raises no narrower one
            raise ValueError(f"the tokenizer of {folder} cannot be read: {error}") from error


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Silence two messages of `transformers`: that PyTorch is missing, and that it would have chosen another class."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _stop_ids(folder: Path, eos_id: int | None, more: Sequence[int]) -> tuple[int, ...]:
    """Gather all ids that end a response; raise ValueError if there are none or a file is wrong."""
    ids: list[Any] = [] if eos_id is None else [eos_id]
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            try:
                found = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            except json.JSONDecodeError as error:
                raise ValueError(f"{folder / name} is damaged: {error}") from error
            named = found if isinstance(found, list) else [] if found is None else [found]
            if not all(type(one) is int and one >= 0 for one in named):
                raise ValueError(f"{folder / name} has the eos_token_id {found!r}: it must be an id or a list of ids")
            ids += named
    ids += more
    if not ids:
        raise ValueError(
            f"{folder} names no token that ends a response: name the tokenizer's eos_token in tokenizer_config.json, "
            "or eos_token_id in generation_config.json, or give --chat.stop-ids"
        )
    return tuple(dict.fromkeys(ids))
