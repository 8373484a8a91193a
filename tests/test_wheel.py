"""The wheel in an environment of its own, without extras: what a trainer that only wants the loss installs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.pages import read_pages

from experiments.errors import MISTAKE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
MEGABYTE = 10**6
COMMANDS = [
    f"experiments.{path.stem}"
    for path in sorted((ROOT / "experiments").glob("*.py"))
    if "__main__" in path.read_text(encoding="utf-8")
] + ["experiments.notebooks"]
WITHOUT_EXTRA = re.compile(r"(?P<user>[\w. ]+) needs [\w.]+, which the extra '(train|dev)' brings: pip install .*")
SIZES = """
import importlib.metadata as metadata, json
files = {d.name: [f.locate() for f in d.files or ()] for d in metadata.distributions()}
print(json.dumps({name: sum(p.stat().st_size for p in paths if p.is_file()) for name, paths in files.items()}))
"""


def uv(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "uv", *map(str, arguments)], cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """A function that runs the Python of an empty environment with the wheel in it, outside the checkout."""
    folder = tmp_path_factory.mktemp("core")
    uv("build", "--quiet", "--wheel", "--no-build-isolation", "--out-dir", folder)
    uv("venv", "--quiet", "--python", sys.executable, folder / "venv")
    (wheel,) = folder.glob("*.whl")
    python = folder / "venv/bin/python"
    # The versions of the lock, which `make setup` has put into uv's cache.
    uv("pip", "install", "--quiet", "--python", python, "--constraints", "requirements-dev.txt", wheel)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}

    def run(*arguments):
        command = [str(python), *arguments]
        settings = environment | {"JAX_PLATFORMS": "cpu"}
        return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True)

    return run


def test_the_first_snippet_of_the_readme_runs(core):
    code, printed = next(
        (code, printed) for code, printed in read_pages()["README.md"].programs() if "rspo_jax.rspo_loss(" in code
    )
    done = core("-W", "error", "-c", code)
    assert done.returncode == 0, done.stderr
    assert printed is not None and done.stdout.strip() == printed


def test_the_core_is_small(core):
    done = core("-c", SIZES)
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout)
    assert {"jax", "jaxlib", "rspo-jax"} <= sizes.keys()
    beyond = {name: size / MEGABYTE for name, size in sizes.items() if name not in ("jax", "jaxlib")}
    print({name: f"{size:.1f} MB" for name, size in beyond.items()}, f"in all {sum(beyond.values()):.0f} MB beyond JAX")
    assert sum(beyond.values()) < 200


@pytest.mark.parametrize("package", ["models", "rspo_jax.training", "rspo_jax.records", "rspo_jax.records.checkpoint"])
def test_a_package_that_needs_more_says_which_extra(package, core):
    done = core("-c", f"import {package}")
    kind, _, sentence = done.stderr.strip().splitlines()[-1].partition(": ")
    assert kind == "rspo_jax.extras.MissingExtra"
    match = WITHOUT_EXTRA.fullmatch(sentence)
    assert match and package.startswith(match["user"])


def test_rollouts_need_no_extra(core):
    done = core("-c", "import rspo_jax.rollouts, rspo_jax.hosts, rspo_jax.sharding")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_which_extra_it_needs(command, core):
    done = core("-m", command, "--help")
    assert done.returncode == MISTAKE
    assert WITHOUT_EXTRA.fullmatch(done.stderr.strip().removeprefix("error: "))


def test_the_launcher_needs_no_extra(core):
    done = core("-m", "experiments.launch.jobset", "countdown")
    assert done.returncode == MISTAKE
    assert "NAME" in done.stderr and "extra" not in done.stderr
