"""Identity of what an evaluation rests on, by content: digests of files, of problems and of the judge.

Two evaluations share responses only if weights, tokenizer and prompts are the same to the last byte, and share verdicts
only if references and judge are. Path, size and time of a file do not tell its content, so files are read whole; a
digest is used again only while nothing of what the system says of the file has changed.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import os
import platform
import sys
import time
import types
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

import experiments.tasks
import rspo_jax.rollouts.rollout
from rspo_jax.records import is_bucket, write_json
from rspo_jax.types import Task

_SHARED_SOURCES = [*Path(experiments.tasks.__path__[0]).glob("*.py"), Path(rspo_jax.rollouts.rollout.__file__)]
# Settings of tasks that show in prompts or problems, which have digests of their own, or that change no verdict.
_NOT_OF_THE_JUDGE = {"train_path", "validation_path", "test_path", "data_dir", "prompt", "system", "workers"} | {
    *("prompt_field", "answer_field", "validation_share", "test_share", "numbers_field", "target_field", "begin")
}
_SETTLED_NS = 2 * 10**9  # more than the resolution of a file's times on any file system in use
_READERS, _PART = 4, 2**24
_JUDGING = ("judge", "answers", "respond")


class Stamp(NamedTuple):
    """Everything that the system says of a file without reading it. No program can set ctime."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


def list_files(folder: epath.Path) -> dict[str, epath.Path]:
    """Return all files under a folder by their names relative to it; links are followed."""
    found: dict[str, epath.Path] = {}
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        if entry.is_dir():
            found |= {f"{entry.name}/{name}": path for name, path in list_files(entry).items()}
        else:
            found[entry.name] = entry
    return found


def stamps_of(files: Mapping[str, epath.Path]) -> dict[str, Stamp]:
    """Return the stamps of files by their real paths, those of files in a bucket excepted, which have none."""
    local = [Path(path) for path in files.values() if not is_bucket(path)]
    return {os.path.realpath(path): _stamp(path) for path in local}


def _stamp(path: Path) -> Stamp:
    state = path.stat()
    return Stamp(state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)


class FileDigests:
    """SHA-256 of files, kept in a small file beside their stamps, so that unchanged ones are not read again."""

    def __init__(self, cache: epath.Path) -> None:
        """Read the cache; one that is missing or damaged is as good as empty. There is none in a bucket."""
        self._cache = None if is_bucket(cache) else cache
        try:
            kept = {} if self._cache is None else json.loads(self._cache.read_text())
            self._kept = {place: (Stamp(*stamp), str(digest)) for place, (stamp, digest) in kept.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            self._kept: dict[str, tuple[Stamp, str]] = {}

    def of(self, files: Mapping[str, epath.Path], seen: Mapping[str, Stamp]) -> str:
        """Return one digest of the names and contents of files that were just loaded.

        Args:
          files: the files by name. Those in a bucket are read every time.
          seen: from `stamps_of`, before the files were loaded.

        Raises:
          ValueError: if a file has changed since, so that what was loaded may be something else.
          OSError: if a file cannot be read.
        """
        known = dict(self._kept)
        with ThreadPoolExecutor(_READERS) as pool:
            digests = list(pool.map(lambda path: self._digest(path, seen), files.values()))
        if self._cache is not None and self._kept != known:
            kept = {place: entry for place, entry in sorted(self._kept.items()) if os.path.exists(place)}
            with contextlib.suppress(OSError):  # without the cache, files are read again
                self._cache.parent.mkdir(parents=True, exist_ok=True)
                write_json(self._cache, kept)
        return digest_of(dict(zip(files, digests, strict=True)))

    def _digest(self, path: epath.Path, seen: Mapping[str, Stamp]) -> str:
        if is_bucket(path):
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while part := file.read(_PART):
                    digest.update(part)
            return digest.hexdigest()
        place, started = os.path.realpath(path), time.time_ns()
        try:
            stamp = _stamp(Path(place))
            known, digest = self._kept.get(place, (None, ""))
            if known != stamp:
                with open(place, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            changed = not seen.get(place) == stamp == _stamp(Path(place))
        except FileNotFoundError:
            changed = True
        if changed:
            raise ValueError(f"{path} was changed while it was being read: start the command again")
        if stamp.ctime_ns + _SETTLED_NS < started:  # else it could change once more and keep its times
            self._kept[place] = stamp, digest
        return digest


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a value; tuples count as lists, and what JSON does not have as its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def prompts_digest(task: Task, problems: Sequence[Any]) -> str:
    """Return the digest of the prompts of problems, as text and as tokens."""
    prompts = [task.prompt(problem) for problem in problems]
    return digest_of([(prompt, list(task.tokenizer.encode(prompt))) for prompt in prompts])


def judge_identity(task: Task, problems: Sequence[Any]) -> dict[str, Any]:
    """Return what decides the verdict on a response: references and tests, the judge's source, settings and libraries.

    The source counts rather than a version number, which can be forgotten: an edit that changes no verdict costs a
    judgement of the stored responses, a forgotten number would show old verdicts as new.

    Args:
      task: the judge. Its settings are the dataclasses that it holds.
      problems: all problems of the evaluation.

    Returns:
      A dict for JSON.
    """
    settings = {
        name: {field: setting for field, setting in dataclasses.asdict(value).items() if field not in _NOT_OF_THE_JUDGE}
        for name, value in vars(task).items()
        if dataclasses.is_dataclass(value) and not isinstance(value, type)
    }
    # A setting may name a file of code.
    texts = [value for fields in settings.values() for value in fields.values() if isinstance(value, str)]
    sources = [*_sources(type(task)), *(Path(text) for text in texts if text.endswith(".py"))]
    contents = {
        f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sources
        if path.is_file()
    }
    return {
        "references": digest_of(problems),
        "source": digest_of([contents, _methods(type(task))]),
        "settings": settings,
        # Their versions count, not their files.
        "libraries": {"python": platform.python_version(), "mpmath": importlib.metadata.version("mpmath")},
    }


def _sources(task_type: type[Task]) -> list[Path]:
    """Return the files of a task's code: those of its package, and those that define its methods."""
    sources = list(_SHARED_SOURCES)
    for kind in task_type.__mro__:
        module = sys.modules[kind.__module__]
        name = getattr(module, "__file__", None)
        if name is not None and not getattr(kind, "_is_protocol", False):  # a protocol does nothing
            sources += Path(name).parent.rglob("*.py") if module.__package__ else [Path(name)]
    return sources + [Path(code.co_filename) for code in _codes(task_type).values()]


def _methods(task_type: type[Task]) -> dict[str, str]:
    """Return the places at which the judging methods are defined, which may be outside the class."""
    return {name: f"{code.co_qualname}, line {code.co_firstlineno}" for name, code in _codes(task_type).items()}


def _codes(task_type: type[Task]) -> dict[str, types.CodeType]:
    functions = {name: inspect.unwrap(getattr(task_type, name)) for name in _JUDGING if hasattr(task_type, name)}
    return {name: function.__code__ for name, function in functions.items() if inspect.isfunction(function)}
