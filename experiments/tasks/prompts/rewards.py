"""Reward functions by name: their notation, where they come from, and the digests of their sources."""

import functools
import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

Function = Callable[..., Any]
HANDED_OVER = "python"
"""What stands in the place of a file for a function that was handed over in Python."""


class HandedOver(str):
    """The notation of a reward whose function was handed over in Python, together with the function."""

    function: Function

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str(self),)  # another process cannot be given the function


@dataclass(frozen=True)
class Reward:
    """A reward function, not loaded yet."""

    name: str
    """The name of its metrics, unique among the rewards of a run."""
    place: str
    """A file, a module, or `HANDED_OVER`."""
    attribute: str
    """The name of the function there."""
    weight: float = 1.0
    function: Function | None = None
    """The function, if it was handed over."""

    @property
    def words(self) -> str:
        """The reward in a message."""
        return f"reward {self.name}" if self.function else f"reward {self.name} of {self.place}"

    def load(self) -> Function:
        """Return the function.

        Raises:
          ValueError: if there is no such file, module or function, or importing it fails.
        """
        if self.function is not None:
            return self.function
        if self.place == HANDED_OVER:
            raise ValueError(
                f"the reward {self.name} was a function in a Python program, which cannot be found again by its name: "
                "go on from that program, or put the function into a file and name it as FILE.py:NAME"
            )
        try:
            function = functools.reduce(getattr, self.attribute.split("."), _module(self.place))
        except AttributeError as error:
            raise ValueError(f"{self.place} has no {self.attribute}: {error}") from error
        if not callable(function):
            raise ValueError(f"{self.attribute} of {self.place} is no function, but {type(function).__name__}")
        return function

    def source_digest(self) -> str | None:
        """Return the SHA-256 of the source: of the whole file, or of a function that was handed over; None if unknown.

        Raises:
          ValueError: if there is no such file or module.
        """
        try:
            if self.function is not None:
                function = inspect.unwrap(getattr(self.function, "func", self.function))
                function = function if inspect.isroutine(function) else type(function)
                source = inspect.getsource(function).encode()
            elif self.place == HANDED_OVER:
                return None
            else:
                source = _file_of(self.place).read_bytes()
        except (OSError, TypeError):  # a function typed into a prompt, or one that is not written in Python
            return None
        return hashlib.sha256(source).hexdigest()


def parse(text: str) -> Reward:
    """Read FILE.py:NAME or module:NAME, with @WEIGHT or without.

    Raises:
      ValueError: if the text is nothing of this form.
    """
    form = "write it as FILE.py:NAME or module:NAME, and a weight as in FILE.py:NAME@0.2"
    address, at, number = text.rpartition("@")
    address, number = (address, number) if at and not number.endswith(".py") else (text, "1")
    place, colon, attribute = address.rpartition(":")
    if not colon or not place or not all(part.isidentifier() for part in attribute.split(".")):
        raise ValueError(f"the reward {text!r} cannot be read: {form}")
    try:
        weight = float(number)
    except ValueError as error:
        raise ValueError(f"the weight of the reward {text!r} is no number: {form}") from error
    if not math.isfinite(weight):
        raise ValueError(f"the weight of the reward {text!r} is {weight}: give a finite number")
    if not place.endswith(".py") and not all(part.isidentifier() for part in place.split(".")):
        raise ValueError(f"the reward {text!r} names neither a Python file nor a module: {form}")
    return Reward(attribute, place, attribute, weight, getattr(text, "function", None))


def parse_all(texts: Sequence[str]) -> list[Reward]:
    """Read the notations of a run's rewards; the second of two of the same name is called NAME_2.

    Raises:
      ValueError: with all mistakes.
    """
    rewards: list[Reward] = []
    mistakes, taken = [], set[str]()
    for text in texts:
        try:
            reward = parse(text)
        except ValueError as error:
            mistakes.append(str(error))
            continue
        name, number = reward.name, 1
        while name in taken:
            number += 1
            name = f"{reward.name}_{number}"
        taken.add(name)
        rewards.append(Reward(name, reward.place, reward.attribute, reward.weight, reward.function))
    if rewards and not any(reward.weight for reward in rewards):
        mistakes.append("all rewards have the weight 0, so that there is nothing to learn: give one another weight")
    if mistakes:
        raise ValueError("; ".join(mistakes))
    return rewards


def notation(reward: Any) -> str:
    """Return the notation of what a Python program gives as a reward.

    Args:
      reward: a function; a text as on the command line; or a pair of either and a weight. A function that a module
        other than the main program holds under its name is named by this module, so that other commands find it.

    Raises:
      TypeError: if it is anything else.
    """
    weight: Any = None
    if isinstance(reward, tuple) and len(reward) == 2:
        reward, weight = reward
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise TypeError(f"the weight of a reward must be a number, got {weight!r}")
    suffix = "" if weight is None else f"@{weight}"
    if isinstance(reward, str):
        return f"{reward}{suffix}"
    if not callable(reward):
        raise TypeError(
            f"a reward is a function, a text such as 'rewards.py:correct', or a pair of one and its weight; got "
            f"{type(reward).__name__}"
        )
    function = getattr(reward, "func", reward)  # that of a functools.partial
    name = getattr(reward, "__name__", None) or getattr(function, "__name__", None) or type(reward).__name__
    name = re.sub(r"\W+", "_", name).strip("_") or "reward"
    name = name if name.isidentifier() else f"_{name}"
    module = sys.modules.get(getattr(reward, "__module__", None) or "")
    can_be_found = module is not None and module.__name__ != "__main__" and getattr(module, name, None) is reward
    text = HandedOver(f"{module.__name__ if module and can_be_found else HANDED_OVER}:{name}{suffix}")
    text.function = reward
    return text


def _module(place: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = _file_of(place)
        name = f"_rewards_{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}"
        if name in sys.modules:
            return sys.modules[name]
        # What stands beside the file can be imported, as if it were run; but it hides no package of the same name.
        if os.fspath(path.parent) not in sys.path:
            sys.path.append(os.fspath(path.parent))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module
    except (Exception, SystemExit) as error:
        if isinstance(error, ValueError) and str(error).startswith("there is no"):
            raise
        raise ValueError(f"importing {place} fails: {type(error).__name__}: {error}") from error


def _file_of(place: str) -> Path:
    """Return the file of a reward's source; raise ValueError if there is none."""
    if place.endswith(".py"):
        path = Path(place).expanduser().resolve()
        if not path.is_file():
            raise ValueError(f"there is no file {place} with a reward in it")
        return path
    try:
        spec = importlib.util.find_spec(place)
    except (ImportError, ValueError) as error:
        raise ValueError(f"there is no module {place} with a reward in it: {error}") from error
    if spec is None:
        raise ValueError(f"there is no module {place} with a reward in it")
    if spec.origin is None or not Path(spec.origin).is_file():
        raise OSError(f"{place} has no source")
    return Path(spec.origin)
