"""Prompts from files, split into train, validation and test."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.tasks.chats import Message, Prompt, check_one_kind, read_prompt
from experiments.tasks.prompts.calling import OWN_NAMES
from experiments.tasks.prompts.config import PromptsConfig
from experiments.tasks.records import Mistakes, Record, read_records, splits_of
from experiments.tasks.splits import SPLITS, Overlaps, rank_of
from rspo_jax.hosts import say

NO_COLUMNS = ("prompt", "completion", *OWN_NAMES)
"""Fields that are not handed to the rewards as columns, as in TRL."""


@dataclass(frozen=True)
class Problem:
    """A prompt and its columns."""

    prompt: Prompt
    """A text that the model reads as it is, or the messages of a chat."""
    columns: dict[str, Any]
    """All other fields of the record; None where this record lacks one that others have."""
    place: str
    """The file and the line, for messages."""
    reply: str | None = None
    """The assistant's last message, where the record has a whole conversation."""


def load_splits(config: PromptsConfig) -> dict[str, list[Problem]]:
    """Read the problems of every split.

    A split comes from its own file, or from the part of its name of a folder with parts. Otherwise a share of the
    prompts in `config.data` is taken by a hash of each and the seed, so that equal prompts are in one split.

    Raises:
      ValueError: naming file, line and field, if something cannot be read; or if there are too few prompts to split.
    """
    assert config.data is not None
    parts = splits_of(config.data)
    own_path = {"validation": config.validation_path, "test": config.test_path}
    if parts and "train" not in parts:
        raise ValueError(
            f"{config.data} has the parts {', '.join(parts)}, but no train: name one, as {config.data}/{parts[0]}"
        )
    records = {"train": read_records(config.data, "train")}
    for split, path in own_path.items():
        if path is not None:
            records[split] = read_records(path, split)
        elif split in parts:
            records[split] = read_records(config.data, split)
    problems = _problems_of(records, config)
    missing = [split for split in SPLITS if split not in problems]
    problems |= _split(problems["train"], missing, config) if missing else {}
    overlaps = Overlaps()
    for split in SPLITS:
        for sentence in overlaps.note(split, [problem.prompt for problem in problems[split]]):
            say(sentence)
    return problems


def column_names(problems: Sequence[Problem]) -> list[str]:
    """Return the names of the columns, which all problems of a data set share."""
    return list(problems[0].columns)


def _problems_of(records: dict[str, list[Record]], config: PromptsConfig) -> dict[str, list[Problem]]:
    found: dict[str, list[Problem]] = {}
    mistakes, everything = Mistakes(), [record for of_split in records.values() for record in of_split]
    names = dict.fromkeys(name for record in everything for name in record.fields)
    for split, of_split in records.items():
        found[split] = []
        for record in of_split:
            try:
                asked = read_prompt(record.fields, config.prompt_field, config.system)
            except (ValueError, RecursionError) as error:
                mistakes.add(record.place, error)
                continue
            prompt, own = (
                asked.prompt,
                config.prompt_field or ("messages" if record.fields.get("prompt") is None else "prompt"),
            )
            if config.system:
                prompt = _with_system(prompt, config.system)
            columns = {name: record.fields.get(name) for name in names if name not in (own, *NO_COLUMNS)}
            found[split].append(Problem(prompt, columns, record.place, asked.reply))
    mistakes.complain()
    check_one_kind(everything, [problem.prompt for problems in found.values() for problem in problems])
    return found


def _with_system(prompt: Prompt, system: str) -> Prompt:
    before = Message("system", system)
    return (before, Message("user", prompt)) if isinstance(prompt, str) else (before, *prompt)


def _split(problems: list[Problem], missing: list[str], config: PromptsConfig) -> dict[str, list[Problem]]:
    """Return the problems without those of the missing splits, and those."""
    ranks = [rank_of(problem.prompt, config.seed) for problem in problems]
    ordered = sorted(set(ranks))
    if len(ordered) <= len(missing):
        flags = ", ".join(f"--task.{split}-path" for split in missing)
        raise ValueError(
            f"{config.data} has {len(ordered)} different prompts, too few to set some apart for "
            f"{' and '.join(missing)}: give more, or files of their own ({flags})"
        )
    split_of: dict[bytes, str] = {}
    # From both ends, so that one share can be changed without moving the other split.
    for split, at_the_end in (("test", False), ("validation", True)):
        if split in missing:
            count = max(1, round(getattr(config, f"{split}_share") * len(ordered)))
            split_of |= dict.fromkeys(ordered[-count:] if at_the_end else ordered[:count], split)
    parts: dict[str, list[Problem]] = {split: [] for split in ("train", *missing)}
    for problem, rank in zip(problems, ranks, strict=True):
        parts[split_of.get(rank, "train")].append(problem)
    if not parts["train"]:
        raise ValueError("validation_share and test_share leave nothing to train on: lower them")
    return parts
