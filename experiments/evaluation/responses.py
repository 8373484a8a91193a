"""The folder of an evaluation: its settings, one line per response as they come, and the summary at the end.

`settings.json` holds the settings, `responses.jsonl` one JSON object per response, `summary.json` the estimates. An
interrupted evaluation loses only the responses that were still being drawn.

The settings have three parts. "contents" identifies what draws responses: where it differs, the folder's files are
moved aside and responses are drawn anew. "judge" identifies what judges them: where it differs, verdicts are made again
from the stored texts. All others are flags: a folder with other flags is refused.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from etils import epath

from experiments.config import flatten
from rspo_jax.records import GrowingFiles, is_bucket, replace_file, write_json

SETTINGS_FILE, RESPONSES_FILE, SUMMARY_FILE = "settings.json", "responses.jsonl", "summary.json"
EARLIER = "earlier-"
"""Beginning of the names of subfolders that files are moved aside to."""
_PARTS = ("contents", "judge")
_FORMERLY = ("subject", "prompts", "votes")  # settings of versions that identified a model by its path

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Response:
    """One line of `responses.jsonl`."""

    problem: int
    """Index of the problem in its split."""
    sample: int
    """Index of the response among those to the problem."""
    reward: float
    correct: bool | None
    """None for a task that does not tell."""
    truncated: bool
    """True if the response was cut off before its stop token; it then counts as wrong, whatever it says, unless the
    task judges such responses (`rspo_jax.types.TruncatedTask`)."""
    tokens: int
    """Number of tokens, including the stop token."""
    answer: str | None
    """The answer that the response votes for; None for a task without votes, or a response without an answer."""
    text: str
    unmarked: bool = False
    """True if the response lacks the text after which responses are judged."""
    left_out: bool = False
    """True if no reward applies to the response."""
    turns: tuple[str, ...] | None = None
    """The texts of a conversation's turns, of which `text` has a line each; None for a task of one turn."""


class ResponseFolder:
    """A context manager that keeps responses in a folder, or at an address in a bucket."""

    def __init__(self, path: epath.Path, settings: Mapping[str, Any], say: Callable[[str], object] = print) -> None:
        """Open the folder, which is made if it does not exist; if this raises, nothing in it is changed.

        Args:
          path: the folder.
          settings: everything that determines responses and verdicts, in types that JSON has. The number of responses
            is not part of it: more may be asked for later.
          say: called with a sentence if earlier files are moved aside.

        Raises:
          ValueError: if the folder holds an evaluation with other flags, or anything else; or if a line of its
            responses is damaged, except for a last line that was cut while being written, which is dropped.
        """
        self.path, self.settings = path, dict(settings)
        stored = _read_settings(path)
        if stored is not None:
            _check_flags(path, stored, settings)
            if changes := _changes(stored, settings, "contents"):
                say(_move_aside(path, changes))
                stored = None
        self.changes_of_judge = [] if stored is None else _changes(stored, settings, "judge")
        """Names of what has changed since the stored responses were judged: their verdicts must be made again."""
        self.throughput: dict[str, Any] | None = self.read_summary().get("throughput")
        """The speed at which the responses in the folder were drawn, if an evaluation was finished."""
        self.responses: dict[tuple[int, int], Response] = {}
        """The responses in the folder, by problem and sample."""
        content = (path / RESPONSES_FILE).read_bytes() if (path / RESPONSES_FILE).exists() else b""
        *lines, cut = content.split(b"\n")
        for number, line in enumerate(lines, start=1):
            response = _parse(line, f"{path / RESPONSES_FILE}, line {number}")
            self.responses.setdefault((response.problem, response.sample), response)
        if not is_bucket(path):  # buckets have no folders
            path.mkdir(parents=True, exist_ok=True)
        if stored is None:
            write_json(path / SETTINGS_FILE, settings)
        if cut:
            _logger.warning("%s: dropped the last line, which was cut while being written.", path / RESPONSES_FILE)
            replace_file(path / RESPONSES_FILE, b"".join(line + b"\n" for line in lines))
        self._open_files = contextlib.ExitStack()
        self._files = self._open_files.enter_context(GrowingFiles(path))
        self._local = self._files.folder / RESPONSES_FILE
        if is_bucket(path):
            self._local.write_bytes(b"".join(line + b"\n" for line in lines))
        self._file = self._open_files.enter_context(open(self._local, "ab"))  # noqa: SIM115, closed by close()

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
            self._file.write(_line(response))
        self._file.flush()
        self._files.copy_soon()

    def replace_verdicts(self, responses: Sequence[Response]) -> None:
        """Replace all responses by the same ones with verdicts of the judge in the settings.

        A kill at any moment leaves the old verdicts or the new ones, and never old ones that count as new.
        """
        if [(one.problem, one.sample) for one in responses] != list(self.responses):
            raise ValueError(f"{self.path} holds other responses than were judged again")
        write_json(self.path / SETTINGS_FILE, self.settings | {"judge": None})
        (self.path / SUMMARY_FILE).unlink(missing_ok=True)
        replace_file(self._local, b"".join(map(_line, responses)))
        self._file.close()
        self._file = self._open_files.enter_context(open(self._local, "ab"))  # noqa: SIM115, closed by close()
        self._files.copy()
        write_json(self.path / SETTINGS_FILE, self.settings)
        self.responses = {(one.problem, one.sample): one for one in responses}
        self.changes_of_judge = []

    def read_summary(self) -> dict[str, Any]:
        """Return what an earlier `write_summary` wrote; empty if there was none, or it is damaged."""
        path = self.path / SUMMARY_FILE
        try:
            summary = json.loads(path.read_text()) if path.exists() else {}
        except ValueError:
            return {}
        return summary if isinstance(summary, dict) else {}

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`, whole or not at all, once all responses are in the folder."""
        self._files.copy()
        write_json(self.path / SUMMARY_FILE, summary)

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        self._open_files.close()


def describe_others(path: epath.Path, settings: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each folder beside a new one whose responses have the same flags and other contents."""
    sentences = []
    for other in sorted(path.parent.iterdir()) if path.parent.is_dir() and not path.exists() else []:
        try:
            stored = _read_settings(other) if (other / SETTINGS_FILE).exists() else None
        except ValueError:  # damaged; not the folder that was asked for
            continue
        if stored is not None and not _differences(_flags(stored), _flags(settings)):
            changes = _changes(stored, settings, "contents")
            sentences.append(f"{_why(other, changes)}: it stays as it is, and responses are drawn again")
    return sentences


def _read_settings(path: epath.Path) -> dict[str, Any] | None:
    """Return the settings of the evaluation in a folder; None if the folder is empty.

    Raises:
      ValueError: if they are damaged, or the folder holds something else.
    """
    if not (path / SETTINGS_FILE).exists():
        names = [entry.name for entry in path.iterdir()] if path.exists() else []
        if any(not name.startswith((".", EARLIER)) for name in names):
            raise ValueError(f"{path} is not empty and holds no evaluation: choose another --output")
        return None
    try:
        stored = json.loads((path / SETTINGS_FILE).read_text())
    except ValueError as error:
        raise ValueError(f"{path / SETTINGS_FILE} is damaged: {error}; choose another --output") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{path / SETTINGS_FILE} is damaged: it holds no settings; choose another --output")
    return stored


def _flags(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in (*_PARTS, *_FORMERLY)}


def _differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Return a few words for each setting that differs, digests cut short."""
    old, new = flatten(stored), flatten(json.loads(json.dumps(given)))

    def shown(settings: Mapping[str, Any], name: str) -> str:
        text = str(settings.get(name))
        return f"{text[:8]}…" if re.fullmatch("[0-9a-f]{64}", text) else text

    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return [f"{name}: {shown(old, name)} -> {shown(new, name)}" for name in names]


def _changes(stored: Mapping[str, Any], settings: Mapping[str, Any], part: str) -> list[str]:
    """Return how one part of the settings has changed; a part that was not recorded has changed as a whole."""
    if not isinstance(stored.get(part), dict):
        return [f"{part}: not recorded"]
    return _differences({part: stored[part]}, {part: settings[part]})


def _check_flags(path: epath.Path, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise ValueError if a folder holds an evaluation with other flags."""
    if changes := _differences(_flags(stored), _flags(settings)):
        raise ValueError(
            f"{path} holds an evaluation with other settings ({shorten(changes)}): choose another --output"
        )


def _move_aside(path: epath.Path, changes: Sequence[str]) -> str:
    """Move the files of an evaluation into a subfolder that is free, settings last; return a sentence about it."""
    numbers = itertools.count(1)
    target = next(place for n in numbers if not ((place := path / f"{EARLIER}{n}") / SETTINGS_FILE).exists())
    if not is_bucket(path):
        target.mkdir(exist_ok=True)
    for name in (SUMMARY_FILE, RESPONSES_FILE, SETTINGS_FILE):
        if (path / name).exists():
            (path / name).rename(target / name)
    return f"{_why(path, changes)}: they were moved to {target}, and responses are drawn again"


def _why(path: epath.Path, changes: Sequence[str]) -> str:
    if changes == ["contents: not recorded"]:
        return f"the responses in {path} are of an earlier version, which did not record the weights' contents"
    return f"the responses in {path} were drawn with other contents ({shorten(changes)})"


def shorten(changes: Sequence[str]) -> str:
    """Join the first few of several changes."""
    return f"{'; '.join(changes[:3])}{'; …' if len(changes) > 3 else ''}"


def _line(response: Response) -> bytes:
    return json.dumps(dataclasses.asdict(response), allow_nan=False).encode() + b"\n"


_FIELDS: dict[str, tuple[type, ...]] = {
    "problem": (int,),
    "sample": (int,),
    "reward": (float, int),
    "correct": (bool, type(None)),
    "truncated": (bool,),
    "tokens": (int,),
    "answer": (str, type(None)),
    "text": (str,),
    "unmarked": (bool,),
    "left_out": (bool,),
    "turns": (list, type(None)),
}


def _parse(line: bytes, where: str) -> Response:
    """Read a line; `where` names it in error messages."""
    try:
        values = {"unmarked": False, "left_out": False, "turns": None}  # lines of earlier versions lack them
        values |= json.loads(line)
    except (ValueError, TypeError):
        values = None
    if (
        not isinstance(values, dict)
        or values.keys() != _FIELDS.keys()
        or not all(type(values[name]) in types for name, types in _FIELDS.items())
        or min(values["problem"], values["sample"]) < 0
        or not all(isinstance(turn, str) for turn in values["turns"] or ())
    ):
        raise ValueError(f"{where} is not a response: repair or remove the line {line[:80]!r}")
    turns = values.pop("turns")
    return Response(**values, turns=None if turns is None else tuple(turns))
