"""Markdown pages as their readers use them: their links, their programs and their commands."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHELL = ("", "bash", "sh", "shell", "console")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SETUP = re.compile(r"^<!-- setup\n(.*?)^-->$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+(?:\([^()\s]*\))?)\)")
_INLINE = re.compile(r"(?<!`)`(python -m experiments\.[^`]+)`(?!`)")


@dataclass(frozen=True)
class Page:
    """A page, and its path below the root of the repository."""

    name: str
    text: str

    @property
    def prose(self) -> str:
        """The page without its blocks of code."""
        return _BLOCK.sub("", self.text)

    def links(self) -> list[str]:
        """Return the targets of the links that lead to a place in the repository."""
        return [target for target in _LINK.findall(self.prose) if not re.match(r"[a-z]+:", target)]

    def anchors(self) -> set[str]:
        """Return the anchors of the headings, as code hosts and the site make them."""
        titles = re.findall(r"^#+ (.*)$", self.prose, re.MULTILINE)
        plain = [re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", title)).strip().lower() for title in titles]
        return {title.replace(" ", "-") for title in plain}

    def programs(self) -> list[tuple[str, str | None]]:
        """Return the Python of the page in order: its blocks, and what a comment `<!-- setup` holds for them.

        A setup makes what a reader has and a test has not, such as a data file. Beside each program is what the page
        says that it prints, if it says so right below: "It prints `this`".
        """
        found: list[tuple[int, str, str | None]] = [(one.start(), one[1], None) for one in _SETUP.finditer(self.text)]
        for block in _BLOCK.finditer(self.text):
            if block[1] == "python":
                printed = re.match(r"\n+It prints `([^`]+)`", self.text[block.end() :])
                found.append((block.start(), block[2], printed[1] if printed else None))
        return [(code, printed) for _, code, printed in sorted(found)]

    def commands(self) -> Iterator[list[str]]:
        """Yield the words of each command: the lines of shell blocks, and calls of this project in the prose."""
        blocks = [match[2] for match in _BLOCK.finditer(self.text) if match[1] in SHELL]
        calls = [" ".join(call.split()) for call in _INLINE.findall(self.prose)]
        for line in "\n".join([*blocks, *calls]).replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line.removeprefix("$ "), comments=True)
            except ValueError:  # the output of a program, with an apostrophe, say
                continue
            ends = [number for number, word in enumerate(words) if word in ("|", "&&", ";", ">")]
            words = words[: ends[0]] if ends else words
            while words and re.match(r"(export$|[A-Z_]+=)", words[0]):
                words = words[1:]
            if words:
                yield words


def read_pages() -> dict[str, Page]:
    """Return the pages of the repository by name."""
    names = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
    names += [
        path.relative_to(ROOT).as_posix()
        for folder in ("docs", "experiments")
        for path in (ROOT / folder).rglob("*.md")
    ]
    return {name: Page(name, (ROOT / name).read_text(encoding="utf-8")) for name in sorted(names)}
