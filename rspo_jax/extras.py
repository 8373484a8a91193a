"""The optional parts of an installation: a package that is missing is named with the extra that brings it.

The distribution's own metadata says which extra requires which package, so that pyproject.toml is the only table.
"""

import contextlib
import importlib.metadata
import re
from collections.abc import Iterator

DISTRIBUTION = "rspo-jax"
IMPORTED_AS = {"orbax": "orbax-checkpoint", "tunix": "google-tunix", "PIL": "pillow"}
"""Name in an import -> distribution on the package index, where the two differ by more than case and dashes."""
_OF_AN_EXTRA = re.compile(r"""(?P<name>[\w.-]+).*;.*\bextra\s*==\s*["'](?P<extra>[\w-]+)["']""")


class MissingExtra(ImportError):
    """A package is missing that an extra of this distribution brings. The message is one sentence."""


def extra_of(module: str) -> str | None:
    """Return the extra that brings a module, by its dotted name: `train` if it does, or else the one with the fewest
    requirements; None if there is none."""
    top = module.partition(".")[0]
    wanted = _canonical(IMPORTED_AS.get(top, top))
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that is on the path without being installed
        return None
    packages: dict[str, set[str]] = {}
    for match in filter(None, map(_OF_AN_EXTRA.match, requirements)):
        packages.setdefault(match["extra"], set()).add(_canonical(match["name"]))
    bringing = [extra for extra, names in packages.items() if wanted in names]
    return min(bringing, key=lambda extra: (extra != "train", len(packages[extra])), default=None)


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def what_to_install(error: ModuleNotFoundError, user: str) -> str | None:
    """Return the sentence that says which extra `user` needs; None if no extra brings the missing module."""
    extra = extra_of(error.name or "")
    if extra is None:
        return None
    return f"{user} needs {error.name}, which the extra {extra!r} brings: pip install '{DISTRIBUTION}[{extra}]'"


@contextlib.contextmanager
def naming_the_extra(user: str) -> Iterator[None]:
    """Turn the error of a missing package into a sentence that says which extra `user` needs.

    Raises:
      MissingExtra: in place of ModuleNotFoundError, if an extra brings the missing module.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        sentence = what_to_install(error, user)
        if sentence is None:
            raise
        raise MissingExtra(sentence, name=error.name) from None
