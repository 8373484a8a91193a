"""The flags of `python -m experiments.train TASK`: help by group, and the nearest flag for a mistyped one.

There are more than a hundred flags. `--help` shows those that most runs set, then one line for each group.
"""

import contextlib
import difflib
import io
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import rich.console
import rich.padding
import rich.table
import rich.text
import tyro

from experiments.errors import UserError

HELP = ("-h", "--help")
EVERYTHING = "all"
"""Word after `--help` that asks for every flag."""
FIRST = (
    "--model",
    "--task.train-path",
    "--task.test-path",
    "--task.data",
    "--task.rewards",
    "--task.datasets",
    "--task.difficulty",
    "--objective",
    "--gamma-min",
    "--steps",
    "--prompts",
    "--group-size",
    "--mini-batches",
    "--optimizer.learning-rate",
    "--sampler.max-new-tokens",
    "--evaluation.every",
    "--seed",
    "--run-dir",
    "--resume",
    "--trackers",
    "--mesh.fsdp",
)
"""The flags that most runs set, of all tasks, in the order of the help."""
ABOUT = {
    "run": "What the run starts from.",
    "objective": "The objective, changes to its defaults, and the shape of an update.",
    "trainer": "Steps, rollouts and advantages.",
    "folder": "The place of the run, and going on with it.",
}
"""The groups of flags without a prefix. The others are described by the class of their config."""
NEAR = 0.6
"""Likeness, from 0 to 1, from which a flag is offered in place of a mistyped one."""


@dataclass(frozen=True)
class Flag:
    """A flag, as tyro makes it of a field of a config."""

    names: tuple[str, ...]
    """With dashes; a switch has its negation too."""
    group: str
    about: str
    """What tyro says about the group."""
    values: str
    """Kind of its values, or the choices in braces; empty for a switch."""
    text: str
    """The field's documentation, with the default."""


def flags_of(command: Callable[..., Any]) -> list[Flag]:
    """Return the flags of a command, in the order of its fields."""
    with warnings.catch_warnings():  # tyro has no other public way to ask for them
        warnings.simplefilter("ignore", DeprecationWarning)
        parser = tyro.extras.get_parser(command)
    flags = []
    for section in parser._action_groups:
        for action in section._group_actions:
            if not action.option_strings or action.dest == "help":
                continue
            (name, *_), (part, *inner) = action.option_strings, action.dest.split(".")
            prefix, dot, _ = name.removeprefix("--").partition(".")
            # The parts of a run whose flags have no prefix are fields of the run, or the folder beside it.
            group = prefix if dot else inner[0] if len(inner) > 1 and part == "run" else part
            values = "" if action.nargs == 0 else str(action.metavar or "")
            flags.append(
                Flag(tuple(action.option_strings), group, section.description or "", values, action.help or "")
            )
    return flags


def answer_help(prog: str, command: Callable[..., Any], arguments: Sequence[str]) -> None:
    """Print the help that the arguments of a command ask for, and end; return if they ask for none.

    Raises:
      SystemExit: with code 0, after the help.
      UserError: if the word after `--help` names nothing.
    """
    asked = [number for number, argument in enumerate(arguments) if argument in HELP]
    if asked:
        word = next(iter(arguments[asked[0] + 1 :]), None)
        about, *_ = (command.__doc__ or "").strip().split("\n\n")
        print_help(prog, about, flags_of(command), word)
        sys.exit(0)


@contextlib.contextmanager
def naming_mistyped_flags(commands: Mapping[str, Callable[..., Any]], arguments: Sequence[str]) -> Iterator[None]:
    """Name the nearest flag, or the nearest command, in place of tyro's message where one does not exist.

    Raises:
      UserError: if the parser inside refuses the arguments for that.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as stop:
        name = arguments[0]
        if stop.code and name not in commands and not name.startswith("-"):
            near = difflib.get_close_matches(name, commands, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"there is no task {name!r}{hint}; the tasks are {', '.join(commands)}") from None
        if stop.code and name in commands and (sentence := mistyped(flags_of(commands[name]), arguments)):
            raise UserError(sentence) from None
        print(said.getvalue(), end="", file=sys.stderr)
        raise


def print_help(prog: str, about: str, flags: Sequence[Flag], word: str | None) -> None:
    """Print the help of a command.

    Args:
      prog: how the command is called.
      about: what it does, in a sentence.
      flags: its flags.
      word: what follows `--help`: a group, a part of flags' names or `EVERYTHING`; None for the short help.

    Raises:
      UserError: if no group and no flag is called so.
    """
    console = rich.console.Console(highlight=False)
    groups = {flag.group: [other for other in flags if other.group == flag.group] for flag in flags}
    if word is None:
        known = {flag.names[0]: flag for flag in flags}
        console.print(f"usage: {prog} [FLAG ...]\n\n{about}\n", markup=False)
        _print_flags(console, "Set in most runs", [known[name] for name in FIRST if name in known], short=True)
        table = _table()
        for group, members in groups.items():
            table.add_row(rich.text.Text(group, "bold"), str(len(members)), _about(members[0]))
        console.print(rich.text.Text(f"All {len(flags)} flags, by group", "bold underline"))
        console.print(rich.padding.Padding(table, (0, 0, 1, 2)))
        console.print(f"{prog} --help GROUP shows a group, --help {EVERYTHING} shows all of them.", markup=False)
        return
    name = word.lstrip("-").replace("_", "-")
    if name == EVERYTHING:
        console.print(f"usage: {prog} [FLAG ...]\n\n{about}\n", markup=False)
        for members in groups.values():
            _print_flags(console, f"{members[0].group}: {_about(members[0])}", members)
    elif name in groups:
        _print_flags(console, f"{name}: {_about(groups[name][0])}", groups[name])
    elif matching := [flag for flag in flags if any(name in spelling for spelling in flag.names)]:
        _print_flags(console, f"flags with {name!r} in their names", matching)
    else:
        raise UserError(f"no group and no flag is called {word!r}; the groups are {', '.join(groups)}")


def _print_flags(console: rich.console.Console, title: str, flags: Sequence[Flag], short: bool = False) -> None:
    table = _table()
    for flag in flags:
        table.add_row(*_row(flag, short))
    console.print(rich.text.Text(title, "bold underline"))
    console.print(rich.padding.Padding(table, (0, 0, 1, 2)))


def _table() -> rich.table.Table:
    table = rich.table.Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, overflow="fold")  # no name is cut short
    return table


def _row(flag: Flag, short: bool) -> tuple[rich.text.Text, rich.text.Text]:
    """Return a flag with its kind of values, and its text with the choices, which may be many, and the default."""
    values = flag.values.replace("{None}|", "").replace("{None,", "{")
    choices = values[1:-1].split(",") if re.fullmatch(r"\{[^{}]+\}", values) else []
    name, *negation = flag.names
    name = name.replace("--", "--[no-]", 1) if negation else name
    text, _, default = " ".join(flag.text.split()).partition("(default: ")
    default = default.removesuffix(")").strip("'\"")
    text = _first_sentence(text) if short else text.strip()
    parts = [text] if text else []
    parts += [f"One of {', '.join(choices)}."] if choices else []
    parts += [f"[{default}]"] if default not in ("", "None") else []
    return rich.text.Text.assemble((name, "bold"), " ", "" if choices else values), rich.text.Text(" ".join(parts))


def _about(flag: Flag) -> str:
    return ABOUT.get(flag.group) or _first_sentence(flag.about)


def _first_sentence(text: str) -> str:
    first, *_ = re.split(r"(?<=[.])\s+(?=[A-Z])|\n\n", text.strip(), maxsplit=1)
    return first


def mistyped(flags: Sequence[Flag], arguments: Sequence[str]) -> str | None:
    """Return a sentence about the arguments that look like flags and are none; None if there are none."""
    known = [name for flag in flags for name in flag.names]
    given = [argument.partition("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--")]
    sentences = []
    for name in dict.fromkeys(given):
        if name not in known and name not in HELP:
            near = nearest(name, known)
            sentences.append(f"there is no flag {name}" + (f" (did you mean {near}?)" if near else ""))
    return "; ".join(sentences) or None


def nearest(name: str, known: Sequence[str]) -> str | None:
    """Return the flag that is most like a mistyped one, by its whole name or by the part after the last dot."""

    def likeness(flag: str) -> float:
        last = flag.removeprefix("--").rpartition(".")[2]
        pairs = [(name, flag, 1.0), (name.removeprefix("--"), last, 1.0), (name.rpartition(".")[2], last, 0.9)]
        return max(weight * difflib.SequenceMatcher(None, mine, other).ratio() for mine, other, weight in pairs)

    best = min(known, key=lambda flag: (-likeness(flag), len(flag)))
    return best if likeness(best) >= NEAR else None
