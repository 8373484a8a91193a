"""The files that install the project: the two locks agree with pyproject.toml and with each other.

Nothing here installs anything or asks a registry; it reads the files as they stand in the checkout.
"""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
RUNTIME_LOCK, DEV_LOCK = "requirements.txt", "requirements-dev.txt"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CORE, EXTRAS = PYPROJECT["dependencies"], PYPROJECT["optional-dependencies"]


def unfold(extra: str) -> list[str]:
    """Return the requirements of an extra, with those of the extras of this project that it names."""
    found: list[str] = []
    for text in EXTRAS[extra]:
        requirement = Requirement(text)
        inner = requirement.extras if requirement.name == PYPROJECT["name"] else ()
        found += [line for name in sorted(inner) for line in unfold(name)] if inner else [text]
    return found


RUNTIME, DEV = CORE + unfold("train"), unfold("dev")


def read_pins(lock: str) -> dict[str, Requirement]:
    """Canonical package name -> pinned requirement, hashes left out, of one lock file."""
    text = (ROOT / lock).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    pins = [Requirement(line.split(" --hash=")[0]) for line in lines]
    names = [canonicalize_name(pin.name) for pin in pins]
    assert len(set(names)) == len(names), f"{lock} pins a package twice"
    return dict(zip(names, pins, strict=True))


def version_of(pin: Requirement) -> str:
    """The one version that a pin allows; fails where it is no pin."""
    specifiers = list(pin.specifier)
    assert len(specifiers) == 1 and specifiers[0].operator == "==", f"{pin} is not pinned by =="
    return specifiers[0].version


@pytest.mark.parametrize(
    ("lock", "declared"),
    [(lock, text) for lock in (RUNTIME_LOCK, DEV_LOCK) for text in RUNTIME] + [(DEV_LOCK, text) for text in DEV],
)
def test_declared_dependency_is_pinned_within_its_bounds(lock: str, declared: str) -> None:
    requirement = Requirement(declared)
    pins = read_pins(lock)
    name = canonicalize_name(requirement.name)
    assert name in pins, f"{lock} lacks {name}: run `make lock`"
    assert pins[name].marker is None, f"{lock} pins {name} for some platforms only"
    version = version_of(pins[name])
    assert version in requirement.specifier, f"{lock} pins {name} {version}: run `make lock`"


@pytest.mark.parametrize("declared", sorted({*CORE, *(line for extra in EXTRAS for line in unfold(extra))}))
def test_declared_dependency_has_a_lower_bound(declared: str) -> None:
    assert any(part.operator == ">=" for part in Requirement(declared).specifier)


def test_the_core_is_what_the_losses_need() -> None:
    assert {Requirement(text).name for text in CORE} == {"chex", "jax", "numpy"}


def test_the_lock_for_development_covers_training() -> None:
    assert set(unfold("train")) <= set(DEV)


def test_runtime_lock_is_part_of_the_dev_lock() -> None:
    runtime, dev = read_pins(RUNTIME_LOCK), read_pins(DEV_LOCK)
    assert runtime.keys() < dev.keys()
    for name, pin in runtime.items():
        assert version_of(pin) == version_of(dev[name])
        assert pin.marker == dev[name].marker


@pytest.mark.parametrize("lock", [RUNTIME_LOCK, DEV_LOCK])
def test_every_pin_has_a_hash(lock: str) -> None:
    text = (ROOT / lock).read_text(encoding="utf-8").replace("\\\n", " ")
    pins = [line for line in text.splitlines() if re.match(r"[A-Za-z0-9]", line)]
    assert pins
    assert [pin for pin in pins if not re.search(r" --hash=sha256:[0-9a-f]{64}\b", pin)] == []


@pytest.mark.parametrize("lock", [RUNTIME_LOCK, DEV_LOCK])
@pytest.mark.parametrize(
    "trace",
    ["http:", "https:", "file:", "/opt", "--index-url", "--extra-index-url", "--find-links"],
)
def test_lock_names_no_registry_and_no_machine(lock: str, trace: str) -> None:
    assert trace not in (ROOT / lock).read_text(encoding="utf-8")


def test_files_hold_no_path_of_one_machine() -> None:
    """A path that exists on one machine only breaks every other checkout."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    machine_path = re.compile(r"(?<![\w.~-])/(?:work|home|root|Users|opt|tmp/\w+)/\w")
    found = []
    for name in filter(None, listing.stdout.split("\0")):
        file = ROOT / name
        try:
            text = file.read_text(encoding="utf-8")
        except (FileNotFoundError, UnicodeDecodeError):
            continue  # Deleted but not yet staged, or binary.
        lines = enumerate(text.splitlines(), start=1)
        found += [f"{name}:{n}: {line.strip()}" for n, line in lines if machine_path.search(line)]
    assert not found, "\n".join(found)
