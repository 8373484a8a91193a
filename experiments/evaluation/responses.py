"""The folder of an evaluation: its settings, one line a response as they come, and the summary at the end.

`settings.json` says what was asked, `responses.jsonl` has a JSON object a response, `summary.json` what came of them.
An evaluation that is interrupted loses the responses that were still being drawn, and no others. This file must never
know how a response is drawn or judged.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from etils import epath

from rspo_jax.records import GrowingFiles, is_bucket, replace_file, write_json

SETTINGS_FILE, RESPONSES_FILE, SUMMARY_FILE = "settings.json", "responses.jsonl", "summary.json"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Response:
    """One line of `responses.jsonl`."""

    problem: int
    """Index in the split."""
    sample: int
    """Which of the responses to that problem, from 0."""
    reward: float
    correct: bool
    truncated: bool
    """Cut off before its stop token; then it is not right, whatever it says."""
    tokens: int
    """The stop token included."""
    answer: str | None
    """What it votes for; None for a task without votes, or a response without an answer."""
    text: str


class ResponseFolder:
    """Keeps responses in a folder, or at an address in a bucket, and knows those that are there. A context manager."""

    def __init__(self, path: epath.Path, settings: Mapping[str, Any]) -> None:
        """Opens the folder, which is made if there is none; nothing of it is changed where this raises.

        Args:
          path: the folder.
          settings: all that decides what a response is, as JSON has it. How many responses are wanted is none of it:
            more may be asked for later.

        Raises:
          ValueError: if the folder holds an evaluation with other settings, or anything else; or a line of its
            responses is damaged, except for a last one that was cut while being written, which is dropped.
        """
        self.path, self.settings = path, dict(settings)
        _check_settings(path, settings)
        self.responses: dict[tuple[int, int], Response] = {}
        """By problem and sample."""
        lines, cut = _read_lines(path / RESPONSES_FILE)
        for number, line in enumerate(lines, start=1):
            response = _parse(line, f"{path / RESPONSES_FILE}, line {number}")
            self.responses.setdefault((response.problem, response.sample), response)
        if not is_bucket(path):  # which has no folders
            path.mkdir(parents=True, exist_ok=True)
        if not (path / SETTINGS_FILE).exists():
            write_json(path / SETTINGS_FILE, settings)
        if cut:
            _logger.warning("%s: dropped the last line, which was cut while being written.", path / RESPONSES_FILE)
            replace_file(path / RESPONSES_FILE, b"".join(line + b"\n" for line in lines))
        self._open_files = contextlib.ExitStack()
        self._files = self._open_files.enter_context(GrowingFiles(path))
        local = self._files.folder / RESPONSES_FILE
        if is_bucket(path):
            local.write_bytes(b"".join(line + b"\n" for line in lines))
        self._file = self._open_files.enter_context(open(local, "ab"))  # noqa: SIM115, closed by close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, responses: Sequence[Response]) -> None:
        """Keeps responses that are not there yet; a kill after this does not lose them."""
        for response in responses:
            place = response.problem, response.sample
            if place in self.responses:
                raise ValueError(f"response {place[1]} to problem {place[0]} is in {self.path} already")
            self.responses[place] = response
            self._file.write(json.dumps(dataclasses.asdict(response), allow_nan=False).encode() + b"\n")
        self._file.flush()
        self._files.copy_soon()

    def read_summary(self) -> dict[str, Any]:
        """What an earlier `write_summary` wrote; empty if there was none."""
        path = self.path / SUMMARY_FILE
        return json.loads(path.read_text()) if path.exists() else {}

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes `summary.json`, whole or not at all, once all responses are where they belong."""
        self._files.copy()
        write_json(self.path / SUMMARY_FILE, summary)

    def close(self) -> None:
        """A second call does nothing."""
        self._open_files.close()


def _check_settings(path: epath.Path, settings: Mapping[str, Any]) -> None:
    if not (path / SETTINGS_FILE).exists():
        if path.exists() and any(not entry.name.startswith(".") for entry in path.iterdir()):
            raise ValueError(f"{path} is not empty and holds no evaluation: choose another --output")
        return
    try:
        stored = _flat(json.loads((path / SETTINGS_FILE).read_text()))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path / SETTINGS_FILE} is damaged: {error}; choose another --output") from error
    given = _flat(json.loads(json.dumps(settings)))
    changes = [
        f"{name}: {stored.get(name)} -> {given.get(name)}"
        for name in sorted(stored.keys() | given.keys())
        if stored.get(name) != given.get(name)
    ]
    if changes:
        raise ValueError(
            f"{path} holds an evaluation with other settings ({'; '.join(changes[:3])}"
            f"{'; …' if len(changes) > 3 else ''}): choose another --output"
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _read_lines(path: epath.Path) -> tuple[list[bytes], bool]:
    """The whole lines of a file, and whether there is a part of one after them."""
    content = path.read_bytes() if path.exists() else b""
    *lines, rest = content.split(b"\n")
    return lines, bool(rest)


_FIELDS: dict[str, tuple[type, ...]] = {
    "problem": (int,),
    "sample": (int,),
    "reward": (float, int),
    "correct": (bool,),
    "truncated": (bool,),
    "tokens": (int,),
    "answer": (str, type(None)),
    "text": (str,),
}


def _parse(line: bytes, where: str) -> Response:
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    if (
        not isinstance(values, dict)
        or values.keys() != _FIELDS.keys()
        or not all(isinstance(values[name], types) for name, types in _FIELDS.items())
    ):
        raise ValueError(f"{where} is not a response: repair or remove the line {line[:80]!r}")
    return Response(**values)
