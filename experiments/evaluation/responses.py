"""The folder of an evaluation: its settings, one line per response as they come, and the summary at the end.

`settings.json` holds the settings, `responses.jsonl` one JSON object per response, `summary.json` the estimates. An
interrupted evaluation loses only the responses that were still being drawn.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from etils import epath

from experiments.config import flatten
from rspo_jax.records import GrowingFiles, is_bucket, replace_file, write_json

SETTINGS_FILE, RESPONSES_FILE, SUMMARY_FILE = "settings.json", "responses.jsonl", "summary.json"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Response:
    """One line of `responses.jsonl`."""

    problem: int
    """Index of the problem in its split."""
    sample: int
    """Index of the response among those to the problem."""
    reward: float
    correct: bool
    truncated: bool
    """True if the response was cut off before its stop token; it then counts as wrong, whatever it says."""
    tokens: int
    """Number of tokens, including the stop token."""
    answer: str | None
    """The answer that the response votes for; None for a task without votes, or a response without an answer."""
    text: str
    unmarked: bool = False
    """True if the response lacks the text after which responses are judged."""


class ResponseFolder:
    """A context manager that keeps responses in a folder, or at an address in a bucket."""

    def __init__(self, path: epath.Path, settings: Mapping[str, Any]) -> None:
        """Open the folder, which is made if it does not exist; if this raises, nothing in it is changed.

        Args:
          path: the folder.
          settings: everything that determines a response, in types that JSON has. The number of responses is not part
            of it: more may be asked for later.

        Raises:
          ValueError: if the folder holds an evaluation with other settings, or anything else; or if a line of its
            responses is damaged, except for a last line that was cut while being written, which is dropped.
        """
        self.path, self.settings = path, dict(settings)
        _check_settings(path, settings)
        self.responses: dict[tuple[int, int], Response] = {}
        """The responses in the folder, by problem and sample."""
        content = (path / RESPONSES_FILE).read_bytes() if (path / RESPONSES_FILE).exists() else b""
        *lines, cut = content.split(b"\n")
        for number, line in enumerate(lines, start=1):
            response = _parse(line, f"{path / RESPONSES_FILE}, line {number}")
            self.responses.setdefault((response.problem, response.sample), response)
        if not is_bucket(path):  # buckets have no folders
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
        """Write responses that are not there yet; a kill after this does not lose them."""
        for response in responses:
            place = response.problem, response.sample
            if place in self.responses:
                raise ValueError(f"response {place[1]} to problem {place[0]} is in {self.path} already")
            self.responses[place] = response
            self._file.write(json.dumps(dataclasses.asdict(response), allow_nan=False).encode() + b"\n")
        self._file.flush()
        self._files.copy_soon()

    def read_summary(self) -> dict[str, Any]:
        """Return what an earlier `write_summary` wrote; empty if there was none."""
        path = self.path / SUMMARY_FILE
        return json.loads(path.read_text()) if path.exists() else {}

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`, whole or not at all, once all responses are in the folder."""
        self._files.copy()
        write_json(self.path / SUMMARY_FILE, summary)

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        self._open_files.close()


def _check_settings(path: epath.Path, settings: Mapping[str, Any]) -> None:
    """Raise ValueError unless the folder is empty, or holds an evaluation with these settings."""
    if not (path / SETTINGS_FILE).exists():
        if path.exists() and any(not entry.name.startswith(".") for entry in path.iterdir()):
            raise ValueError(f"{path} is not empty and holds no evaluation: choose another --output")
        return
    try:
        stored = flatten(json.loads((path / SETTINGS_FILE).read_text()))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path / SETTINGS_FILE} is damaged: {error}; choose another --output") from error
    given = flatten(json.loads(json.dumps(settings)))
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


_FIELDS: dict[str, tuple[type, ...]] = {
    "problem": (int,),
    "sample": (int,),
    "reward": (float, int),
    "correct": (bool,),
    "truncated": (bool,),
    "tokens": (int,),
    "answer": (str, type(None)),
    "text": (str,),
    "unmarked": (bool,),
}


def _parse(line: bytes, where: str) -> Response:
    """Read a line; `where` names it in error messages."""
    try:
        values = {"unmarked": False} | json.loads(line)  # lines of earlier versions lack it
    except (ValueError, TypeError):
        values = None
    if (
        not isinstance(values, dict)
        or values.keys() != _FIELDS.keys()
        or not all(isinstance(values[name], types) for name, types in _FIELDS.items())
    ):
        raise ValueError(f"{where} is not a response: repair or remove the line {line[:80]!r}")
    return Response(**values)
