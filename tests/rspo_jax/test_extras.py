"""The sentence about a package that is missing."""

import importlib.metadata

import pytest

from rspo_jax import extras

REQUIREMENTS = [
    "jax>=0.10.2",
    "hatchling>=1; extra == 'dev'",
    "flax>=0.12; extra == 'dev'",
    'flax>=0.12; extra == "train"',
    "orbax-checkpoint>=0.12; extra == 'train'",
    "tensorboardX>=2.6; python_version >= '3.11' and extra == 'train'",
    "transformers[chat-template]>=5; extra == 'train'",
    "transformers>=5; extra == 'bench'",
    "torch; extra == 'bench'",
    "google-tunix>=0.1.5; extra == 'bench'",
    "libtpu>=0.0.52; extra == 'tpu-compiler'",
    "torch>=2; extra == 'parity'",
]


@pytest.fixture
def metadata(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: REQUIREMENTS)


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("flax", "train"),
        ("flax.linen", "train"),
        ("orbax.checkpoint", "train"),
        ("tensorboardX.event_file_writer", "train"),
        ("transformers", "train"),
        ("tunix.rl", "bench"),
        ("torch", "parity"),
        ("libtpu", "tpu-compiler"),
        ("hatchling", "dev"),
        ("jax", None),
        ("models", None),
        ("flaxen", None),
        ("", None),
    ],
)
def test_the_extra_that_brings_a_module(module, extra, metadata):
    assert extras.extra_of(module) == extra


def test_without_metadata_nothing_is_claimed(monkeypatch):
    monkeypatch.setattr(extras, "DISTRIBUTION", "no-such-distribution")
    assert extras.extra_of("flax") is None


def test_a_missing_package_of_an_extra_is_a_sentence(metadata):
    with pytest.raises(extras.MissingExtra) as caught, extras.naming_the_extra("models"):
        raise ModuleNotFoundError("No module named 'flax'", name="flax.linen")
    assert str(caught.value) == (
        "models needs flax.linen, which the extra 'train' brings: pip install 'rspo-jax[train]'"
    )
    assert caught.value.name == "flax.linen"


def test_other_errors_pass_through(metadata):
    for error in (ModuleNotFoundError("gone", name="treescope"), ImportError("cannot import name"), ValueError()):
        with pytest.raises(type(error)) as caught, extras.naming_the_extra("models"):
            raise error
        assert caught.value is error
