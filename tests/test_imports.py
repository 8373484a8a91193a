"""The directions of imports: which folder may use which other one.

The rules are read off the source with `ast`, without importing anything, so they also cover imports inside functions
and under `TYPE_CHECKING`.
"""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("rspo_jax", "models", "experiments")

GROUND = ("types", "sharding", "statistics", "stopwatch")
ARROWS = {
    "extras": (),
    "types": (),
    "sharding": ("types",),
    "statistics": ("types",),
    "stopwatch": ("types",),
    "hosts": (),
    "records": ("hosts", "types", "extras"),
    "objectives": GROUND,
    "routing": GROUND,
    "log_probs": GROUND,
    "rollouts": ("routing", *GROUND),
    "training": ("rollouts", "log_probs", "routing", "objectives", "records", "hosts", "extras", *GROUND),
    "tunix": ("rollouts", "log_probs", "routing", "objectives", "training", *GROUND),
}
"""Room of rspo_jax -> the rooms that it may use. None of them imports the package as a whole."""

FORBIDDEN_IN = {
    "rspo_jax": ("models", "experiments", "flax", "tensorflow_datasets"),
    "models": ("experiments",),
    "experiments": ("flax",),
}
RIVALS = ("torch", "tunix")
"""What is only compared with. They are optional, so nothing else may need them."""
ONLY_IN = {"transformers": ("experiments/text.py",)}
"""Packages that take seconds to import -> the files that may use them, beside comparisons."""
FORBIDDEN_ANYWHERE = (
    "tensorflow",
    "jax.experimental.pjit",
    "jax.experimental.shard_map",
)
MODELS_MAY_KNOW = ("rspo_jax.types", "rspo_jax.sharding", "rspo_jax.extras")


def module_name(path: str) -> str:
    """Dotted name of a file: `a/b.py` is `a.b`, and `a/__init__.py` is `a`."""
    parts = path.removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Whether the dotted `name` is one of `modules` or something inside one of them."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def used_names(path: str, source: str) -> set[str]:
    """Dotted names that a file imports or, for `jax.…`, reaches by attribute.

    `from a import b` counts as `a.b`, a relative import is made absolute, and a call of
    `import_module` or `__import__` with a constant counts as that import.
    """
    package = module_name(path).split(".")
    if not path.endswith("/__init__.py"):
        package = package[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(source, path)):
        match node:
            case ast.Import():
                names.update(alias.name for alias in node.names)
            case ast.ImportFrom():
                base = package[: len(package) - node.level + 1] if node.level else []
                base += node.module.split(".") if node.module else []
                names.update(".".join([*base, alias.name]) for alias in node.names)
            case ast.Call(args=[ast.Constant(value=str(name)), *_]):
                called = ast.unparse(node.func).split(".")[-1]
                names.update([name] if called in ("import_module", "__import__") else [])
            case ast.Attribute():
                name = ast.unparse(node)
                names.update([name] if name.startswith("jax.") else [])
    return names


def may_use(package: str, name: str) -> bool:
    """Whether files of the top-level `package` may use the dotted `name`."""
    if is_inside(name, (*FORBIDDEN_ANYWHERE, *FORBIDDEN_IN.get(package, ()))):
        return False
    restricted = package == "models" and is_inside(name, ["rspo_jax"])
    return not restricted or is_inside(name, MODELS_MAY_KNOW)


def violations(path: str, source: str) -> list[str]:
    """What one file uses against the rules; a sentence each."""
    package = path.split("/")[0]
    names = sorted(used_names(path, source))
    kept = [name for name, paths in ONLY_IN.items() if path not in paths]
    others = () if is_comparison(path) else (*RIVALS, *kept)
    return [f"{path} must not use {name}" for name in names if not may_use(package, name) or is_inside(name, others)]


def is_comparison(path: str) -> bool:
    """Whether a file is of a benchmark, the test of one, or a test against what others compute."""
    is_benchmark = path.startswith(("experiments/bench/", "experiments/bench_", "tests/experiments/test_bench_"))
    return is_benchmark or (path.startswith("tests/") and path.endswith("_live.py"))


def room_of(name: str) -> str | None:
    """The room of rspo_jax that a dotted name lies in; None for the package itself and for other packages."""
    parts = name.split(".")
    return parts[1] if parts[0] == "rspo_jax" and len(parts) > 1 else None


def wrong_turns(path: str, source: str) -> list[str]:
    """Uses of rooms that the arrows do not allow, by one file of rspo_jax; a sentence each."""
    room = room_of(module_name(path))
    if room is None:
        return []
    found = []
    for name in sorted(used_names(path, source)):
        other = room_of(name)
        if name == "rspo_jax" or (other is not None and other not in (room, *ARROWS.get(room, ()))):
            found.append(f"{path} must not use {name}")
    return found


def read_sources(folder: str) -> dict[str, str]:
    """Path below the root -> source, of every Python file in `folder`."""
    return {
        file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8")
        for file in sorted((ROOT / folder).rglob("*.py"))
    }


@pytest.mark.parametrize("folder", [*PACKAGES, "tests"])
def test_files_respect_the_directions(folder: str) -> None:
    sources = read_sources(folder)
    assert sources, f"no Python file in {folder}: has it moved?"
    found = [line for path, source in sources.items() for line in violations(path, source)]
    assert not found, "\n".join(found)


def test_rooms_respect_the_arrows() -> None:
    found = [line for path, source in read_sources("rspo_jax").items() for line in wrong_turns(path, source)]
    assert not found, "\n".join(found)


def test_every_room_has_its_arrows_and_they_make_no_circle() -> None:
    rooms = {room for path in read_sources("rspo_jax") if (room := room_of(module_name(path)))}
    assert rooms <= set(ARROWS)
    seen: set[str] = set()
    for room, others in ARROWS.items():  # every room is listed after those that it uses
        assert set(others) <= seen | set(GROUND), room
        seen.add(room)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("rspo_jax/router.py", "import models"),
        ("rspo_jax/router.py", "from models.transformer import Transformer"),
        ("rspo_jax/router.py", "from experiments import train"),
        ("rspo_jax/__init__.py", "import flax.linen as nn"),
        ("rspo_jax/trainer.py", "def f():\n    import tensorflow_datasets as tfds"),
        ("rspo_jax/trainer.py", "from ..models import Transformer"),
        ("rspo_jax/trainer.py", "from importlib import import_module\nimport_module('flax.linen')"),
        ("rspo_jax/types.py", "if TYPE_CHECKING:\n    from flax import struct"),
        ("models/attention.py", "import rspo_jax"),
        ("models/attention.py", "from rspo_jax import ModelOutput"),
        ("models/attention.py", "from rspo_jax import *"),
        ("models/attention.py", "from rspo_jax.routing.shift import trace_router"),
        ("models/attention.py", "import rspo_jax.sharding_rules"),
        ("models/attention.py", "from experiments.tasks import countdown"),
        ("experiments/train.py", "from flax import linen"),
        ("experiments/train.py", "import torch"),
        ("experiments/evaluate.py", "from transformers import AutoModel"),
        ("experiments/text.py", "import torch"),
        ("models/hugging_face/reading.py", "def f():\n    import transformers"),
        ("models/config_live.py", "import torch"),
        ("tests/models/test_lively.py", "import torch"),
        ("experiments/benchmark.py", "import tunix.rl"),
        ("experiments/train.py", "__import__('tensorflow')"),
        ("tests/models/test_attention.py", "import torch.nn as nn"),
        ("rspo_jax/sharding.py", "from jax.experimental.shard_map import shard_map"),
        ("rspo_jax/sharding.py", "from jax.experimental import pjit"),
        ("rspo_jax/sharding.py", "import jax.experimental.pjit as p"),
        ("rspo_jax/sharding.py", "import jax\nf = jax.experimental.shard_map.shard_map(f)"),
    ],
)
def test_a_broken_rule_is_found(path: str, source: str) -> None:
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("rspo_jax/statistics.py", "import jax\nfrom . import types\nfrom .types import RouterTrace"),
        ("rspo_jax/router.py", "import modelscope, flaxen, torchlike"),
        ("rspo_jax/sharding.py", "import jax\nf = jax.shard_map(f)\ng = jax.experimental.layout"),
        ("experiments/bench_loss.py", "import torch, tunix"),
        ("experiments/text.py", "def f():\n    from transformers import AutoTokenizer"),
        ("tests/models/test_rope_live.py", "import torch, transformers"),
        ("experiments/bench/torch_losses.py", "import torch"),
        ("models/attention.py", "import flax.linen as nn\nfrom rspo_jax import sharding, types"),
        ("models/attention.py", "from rspo_jax.types import ModelOutput\nimport rspo_jax.sharding"),
        ("experiments/train.py", "import rspo_jax, models, tensorflow_datasets as tfds"),
        ("tests/models/test_attention.py", "import flax, models, rspo_jax"),
        ("tests/test_text.py", "text = 'import torch'  # import tensorflow"),
    ],
)
def test_a_kept_rule_is_left_alone(path: str, source: str) -> None:
    assert violations(path, source) == []


@pytest.mark.parametrize(
    ("path", "source", "allowed"),
    [
        ("rspo_jax/objectives/rspo.py", "from rspo_jax.rollouts import generate", False),
        ("rspo_jax/objectives/rspo.py", "from rspo_jax.training.trainer import train", False),
        ("rspo_jax/objectives/rspo.py", "from rspo_jax import rspo_loss", False),
        ("rspo_jax/routing/shift.py", "import rspo_jax", False),
        ("rspo_jax/routing/shift.py", "from ..training import update", False),
        ("rspo_jax/hosts/cluster.py", "from rspo_jax.records.files import as_path", False),
        ("rspo_jax/types.py", "from rspo_jax.statistics import Mean", False),
        ("rspo_jax/training/loss.py", "def f():\n    import rspo_jax.tunix", False),
        ("rspo_jax/training/loss.py", "from rspo_jax.objectives import OBJECTIVES", True),
        ("rspo_jax/objectives/table.py", "from rspo_jax.objectives.rspo import rspo\nimport rspo_jax.types", True),
        ("rspo_jax/rollouts/packing.py", "from . import prompts\nfrom rspo_jax.routing import ROUTE_AXES", True),
        ("rspo_jax/__init__.py", "from rspo_jax.objectives import rspo_loss", True),
    ],
)
def test_arrows(path: str, source: str, allowed: bool) -> None:
    assert (wrong_turns(path, source) == []) == allowed


def test_importing_the_library_is_light() -> None:
    """Losses must be usable from any trainer without paying for what only the commands need."""
    program = "import json, sys, rspo_jax;print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    loaded = set(json.loads(result.stdout))
    assert {"jax", "rspo_jax"} <= loaded
    heavy = {
        "flax",
        "matplotlib",
        "optax",
        "orbax",
        "rich",
        "tensorflow",
        "tensorflow_datasets",
        "torch",
        "transformers",
    }
    assert not loaded & heavy
