"""Fields of configs: read from JSON with all mistakes found at once, compared, and flattened."""

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

Config = TypeVar("Config")


def read_fields(
    config_type: type, values: Mapping[str, Any], prefix: str, mistakes: list[str], missing: list[str]
) -> dict[str, Any]:
    """Return the fields of a config by name: values of the right types, and the fields of nested configs.

    Unknown fields and wrong types are added to `mistakes`, the names of absent fields to `missing`.
    """
    hints, fields = typing.get_type_hints(config_type), {}
    mistakes += [f"{prefix}{name} is an unknown field" for name in values if name not in hints]
    for option in dataclasses.fields(config_type):
        name, hint = f"{prefix}{option.name}", hints[option.name]
        if option.name not in values:
            missing.append(name)
            continue
        value, nested = values[option.name], _nested(hint)
        if nested is not None and isinstance(value, dict):
            fields[option.name] = read_fields(nested, value, f"{name}.", mistakes, missing)
        elif _fits(value, hint):
            fields[option.name] = tuple(value) if isinstance(value, list) else value
        else:
            text = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            mistakes.append(f"{name} is {words_of(value)}, not {text if nested is None else 'an object with fields'}")
    return fields


def make(config_type: type[Config], fields: Mapping[str, Any]) -> Config:
    """Return a config of what `read_fields` read."""
    hints = typing.get_type_hints(config_type)
    nested = {name: make(_nested(hints[name]), value) for name, value in fields.items() if isinstance(value, dict)}
    return config_type(**(dict(fields) | nested))


def _nested(hint: Any) -> Any:
    """Return the config type among the types of a field; None if it has none."""
    return next((option for option in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(option)), None)


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value from JSON is one of a field's type. A boolean is no number, and an integer is a float."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in options
    if origin is tuple:
        return isinstance(value, list) and all(_fits(one, options[0]) for one in value)
    if options:
        return any(_fits(value, option) for option in options)
    return value is None if hint is type(None) else type(value) in ((int, float) if hint is float else (hint,))


def words_of(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Return one line for each field in which two configs of a type differ: "steps: 100 -> 200"."""
    lines = []
    for option in dataclasses.fields(old):
        before, after = getattr(old, option.name), getattr(new, option.name)
        if dataclasses.is_dataclass(before) and type(before) is type(after):
            lines += differences(before, after, f"{prefix}{option.name}.")
        elif before != after:
            lines.append(f"{prefix}{option.name}: {before} -> {after}")
    return lines


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by their dotted names: {"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
