"""Records of a data set, from the files in which data sets come: JSON lines, a JSON array, Parquet, Arrow.

Parquet and Arrow are read by pyarrow, which is imported only for them.
"""

import bisect
import json
import math
import os
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any, NamedTuple, TypeVar

from etils import epath

Made = TypeVar("Made")

MOST_MISTAKES = 10
"""Largest number of mistakes in the records of one file that an error lists."""
FORMATS = (
    "a file with one JSON object per line (.jsonl), with a JSON array of objects, of Parquet (.parquet), or a folder "
    "that datasets.save_to_disk wrote"
)

_DIGITS_OF_INT = 4300
_DICT_FILE, _STATE_FILE = "dataset_dict.json", "state.json"
_SPACE = re.compile(r"[ \t\r\n]*")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"PK": "zip", b"\x28\xb5\x2f\xfd": "Zstandard", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


class Record(NamedTuple):
    """One record of a data set."""

    place: str
    """The file and the line or row, for messages: "train.jsonl, line 3"."""
    fields: dict[str, Any]
    """The record's fields by name, as Python values."""


def read_records(path: str, split: str | None = None) -> list[Record]:
    """Read all records of a file or a folder, in their order.

    The format follows from the contents: JSON objects, one per line (empty lines are skipped); one JSON array of
    objects; Parquet; an Arrow file; or a folder that `save_to_disk` of the library datasets wrote.

    Args:
      path: a file or folder, local or at an address that starts with gs://.
      split: the part to read of a folder with several, as a `DatasetDict` writes it. Other data has no parts, and is
        read whole.

    Raises:
      ValueError: if there is nothing to read at the path, if it is of none of these formats or damaged, naming all
        lines that are (up to `MOST_MISTAKES`), if a folder of parts has no such split, or if pyarrow is missing.
    """
    place = _existing(path)
    if place.is_dir():
        place = _part_of(place, split)
        records = _numbered(place, _arrow(place).rows_of_arrow(_arrow_files(place)))
    else:
        with place.open("rb") as file:
            start = file.read(8)
        if start[:4] == b"PAR1":
            records = _numbered(place, _arrow(place).rows_of_parquet(place))
        elif start[:6] == b"ARROW1" or start[:4] == b"\xff\xff\xff\xff":
            records = _numbered(place, _arrow(place).rows_of_arrow([place]))
        else:
            records = _from_json(path, place.read_bytes())
    if not records:
        raise ValueError(f"{path} holds no record: it is empty")
    return records


def splits_of(path: str) -> tuple[str, ...]:
    """Return the names of the parts of a folder that a `DatasetDict` wrote; none for any other file or folder.

    Raises:
      ValueError: if there is nothing at the path, or the list of the parts is damaged.
    """
    place = _existing(path)
    if not place.is_dir() or not (place / _DICT_FILE).is_file():
        return ()
    listed = _json_file(place / _DICT_FILE).get("splits")
    if not isinstance(listed, list) or not listed or not all(isinstance(name, str) for name in listed):
        raise ValueError(f"{place / _DICT_FILE} is damaged: it lists no splits")
    return tuple(listed)


def make_all(records: Iterable[Record], make: Callable[[Mapping[str, Any]], Made], hint: str = "") -> list[Made]:
    """Return what a function makes of the fields of each record.

    Args:
      records: from `read_records`.
      make: raises ValueError with the reason if it cannot make anything of the fields.
      hint: a sentence for the end of an error, which may tell how to name other fields.

    Raises:
      ValueError: with a sentence for each record that it cannot, up to `MOST_MISTAKES`, which names file and line.
    """
    made, mistakes = [], Mistakes()
    for record in records:
        try:
            made.append(make(record.fields))
        except (ValueError, RecursionError) as error:
            mistakes.add(record.place, error)
    mistakes.complain(hint)
    return made


def require(fields: Mapping[str, Any], *names: str) -> None:
    """Raise ValueError, naming the fields that a record has, if it lacks others or they are null."""
    missing = [name for name in dict.fromkeys(names) if fields.get(name) is None]
    if missing:
        present = ", ".join(repr(name) for name, value in fields.items() if value is not None)
        verb = "is" if len(missing) == 1 else "are"
        raise ValueError(
            f"{', '.join(map(repr, missing))} {verb} missing or null; the record has {present or 'nothing'}"
        )


def decode_json(text: str) -> Any:
    """Return the value of a JSON text that a field holds, with integers of any length.

    Raises:
      ValueError: if it is not JSON, or has what records must not have: NaN, a repeated key, too large a number.
    """
    try:
        value, end = _Reader().value(text.strip())
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if end < len(text.strip()):
        raise ValueError(f"something follows after it: {shorten(text.strip()[end:])}")
    return value


class Mistakes:
    """The mistakes found in one data set, told all at once."""

    def __init__(self) -> None:
        self._sentences: list[str] = []
        self._more = 0

    def add(self, place: str, error: Exception | str) -> None:
        """Note a mistake and where it is."""
        if len(self._sentences) < MOST_MISTAKES:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
            self._sentences.append(f"{place}: {reason}")
        else:
            self._more += 1

    def __bool__(self) -> bool:
        return bool(self._sentences)

    def complain(self, hint: str = "") -> None:
        """Raise ValueError with a line for each mistake, and one for the hint, if there are any mistakes."""
        if self._sentences:
            more = [f"and {self._more} more"] if self._more else []
            raise ValueError("\n".join([*self._sentences, *more, *([hint] if hint else [])]))


def _existing(path: str) -> epath.Path:
    if re.match(r"\w\w+://", path) and not path.startswith("gs://"):
        raise ValueError(f"{path} is neither a path nor an address under gs://: download it first, and name the file")
    try:
        place = epath.Path(path)
        found = place.exists()
    except ImportError as error:
        raise ValueError(f"{path} is in a bucket, which needs another package: pip install 'rspo-jax[gcs]'") from error
    if not found:
        raise ValueError(f"there is no file or folder {path}: give {FORMATS}")
    return place


# Folders and tables


def _part_of(folder: epath.Path, split: str | None) -> epath.Path:
    """Return the folder of a split, or the folder itself if it has no parts."""
    splits = splits_of(os.fspath(folder))
    if not splits:
        return folder
    if split is None or split not in splits:
        wanted = "name one of them, as in" if split is None else f"but no {split!r}: name one of them, as in"
        raise ValueError(f"{folder} has the splits {', '.join(splits)}, {wanted} {folder / splits[0]}")
    return folder / split


def _arrow_files(folder: epath.Path) -> list[epath.Path]:
    state = folder / _STATE_FILE
    if not state.is_file():
        raise ValueError(
            f"{folder} is no data set: it has no {_STATE_FILE}, as a folder of save_to_disk has; give {FORMATS}"
        )
    try:
        names = [str(entry["filename"]) for entry in _json_file(state)["_data_files"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{state} is damaged: it lists no data files") from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder} is not complete: {', '.join(missing)} of {_STATE_FILE} is not there")
    return [folder / name for name in names]


def _json_file(path: epath.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: {_kind(value)}, not an object")
    return value


def _arrow(place: epath.Path) -> types.ModuleType:
    try:
        from experiments.tasks import arrow  # which needs pyarrow
    except ImportError as error:
        raise ValueError(
            f"{place} is read with pyarrow, which is not installed: pip install 'rspo-jax[data]'"
        ) from error
    return arrow


def _numbered(place: epath.Path, rows: list[dict[str, Any]]) -> list[Record]:
    return [Record(f"{place}, row {number} (from 0)", row) for number, row in enumerate(rows)]


# JSON


class _Reader:
    """A reader of JSON that can go on behind an object with a value that is refused, such as NaN or a repeated key."""

    def __init__(self) -> None:
        self._refused: list[str] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float, parse_int=_integer
        )

    def read(self, text: str, start: int = 0) -> tuple[dict[str, Any] | str, int]:
        """Return the object that begins at a position, or else the reason why it is no record; and where it ends.

        Raises:
          json.JSONDecodeError: if it is not JSON.
          RecursionError: if it is nested too deeply.
        """
        self._refused.clear()
        value, end = self._decoder.raw_decode(text, start)
        if self._refused:
            field = next(_paths_of_unreal(value), None)
            return self._refused[0] if field is None else f"{field!r} is {self._refused[0]}", end
        return value if isinstance(value, dict) else f"{_kind(value)}, not an object with fields", end

    def value(self, text: str) -> tuple[Any, int]:
        """Return the value that a text begins with, of any kind, and where it ends; raise ValueError as `read`."""
        value, end = self._decoder.raw_decode(text)
        if self._refused:
            raise ValueError(f"{self._refused[0]}")
        return value, end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self._refused.append(f"the key {twice!r} stands twice in one object")
        return fields

    def _constant(self, name: str) -> float:
        self._refused.append(f"{name}, which JSON does not have")
        return math.nan

    def _float(self, text: str) -> float:
        number = float(text)
        if math.isinf(number):
            self._refused.append(f"{text[:60]}, which is beyond the largest float")
        return number


def _integer(text: str) -> int:
    # Python's own conversion refuses more digits, because its time grows with their square.
    return int(text) if len(text) <= _DIGITS_OF_INT else int(Decimal(text))


def _paths_of_unreal(value: Any, path: str = "") -> Iterator[str]:
    """Yield the places of numbers that are not finite: "tests[0].result"."""
    if isinstance(value, float) and not math.isfinite(value):
        yield path or "the value"
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _paths_of_unreal(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _paths_of_unreal(inner, f"{path}[{index}]")


def _from_json(path: str, content: bytes) -> list[Record]:
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path} is text in UTF-16: save it as UTF-8")
    if kind := next((kind for start, kind in _COMPRESSED.items() if content.startswith(start)), None):
        raise ValueError(f"{path} is compressed ({kind}): unpack it first")
    content = content.removeprefix(b"\xef\xbb\xbf")
    return _from_array(path, content) if content.lstrip()[:1] == b"[" else _from_lines(path, content)


def _from_lines(path: str, content: bytes) -> list[Record]:
    records, mistakes, reader = [], Mistakes(), _Reader()
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            text = line.decode().strip()
            fields, end = reader.read(text)
            if isinstance(fields, str):
                mistakes.add(place, fields)
            elif end < len(text):
                mistakes.add(place, f"something follows after the object: {shorten(text[end:])}")
            else:
                records.append(Record(place, fields))
        except json.JSONDecodeError as error:
            if not records and not mistakes and _is_object(content):
                raise ValueError(
                    f"{path} holds one object that goes over several lines: give {FORMATS}. If the records are a list "
                    "in one of its fields, write that list into a file of its own"
                ) from error
            mistakes.add(place, f"it is not JSON: {error.msg} at column {error.colno}")
        except UnicodeDecodeError as error:
            mistakes.add(place, f"byte {error.start} is no text in UTF-8: save the file as UTF-8")
        except RecursionError as error:
            mistakes.add(place, error)
    mistakes.complain()
    return records


def _is_object(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content), dict)
    except (ValueError, RecursionError):
        return False


def _from_array(path: str, content: bytes) -> list[Record]:
    """Read the records of a JSON array one by one, so that a mistake has the line on which its record begins."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: it is no text in UTF-8: save the file as UTF-8") from error
    breaks = [match.start() for match in re.finditer("\n", text)]
    records, mistakes, reader = [], Mistakes(), _Reader()
    position = _after_space(text, text.index("[") + 1)
    while text[position : position + 1] != "]":
        place = f"{path}, line {bisect.bisect(breaks, position) + 1}"
        try:
            fields, position = reader.read(text, position)
        except json.JSONDecodeError as error:  # no telling where the next record begins
            mistakes.add(f"{path}, line {error.lineno}", f"it is not JSON: {error.msg} at column {error.colno}")
            mistakes.complain()
        except RecursionError as error:
            mistakes.add(place, error)
            mistakes.complain()
        else:
            if isinstance(fields, str):
                mistakes.add(place, fields)
            else:
                records.append(Record(place, fields))
        position = _after_space(text, position)
        if text[position : position + 1] == ",":
            position = _after_space(text, position + 1)
        elif text[position : position + 1] != "]":
            line = bisect.bisect(breaks, position) + 1
            mistakes.add(f"{path}, line {line}", "neither a comma nor the end of the array follows a record")
            break
    else:
        if rest := text[position + 1 :].strip():
            mistakes.add(path, f"something follows after the array: {shorten(rest)}")
    mistakes.complain()
    return records


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return position if match is None else match.end()


def _kind(value: Any) -> str:
    """Return what a value is, in a word or two."""
    if value is None or isinstance(value, bool):
        return f"it is {json.dumps(value)}"
    return {list: "it is a list", str: "it is a text", dict: "it is an object"}.get(type(value), "it is a number")


def shorten(value: Any) -> str:
    """Return a value for a message, cut after 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
