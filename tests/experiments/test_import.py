"""Importing the package where another one is called `models`."""

import importlib
import sys

import pytest

import experiments
from experiments.errors import MISTAKE
from rspo_jax.extras import MissingExtra


@pytest.mark.parametrize("hiding", ["models.py", "models/__init__.py"])
def test_another_package_called_models_is_named(hiding, tmp_path, monkeypatch):
    file = tmp_path / hiding
    file.parent.mkdir(exist_ok=True)
    file.touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "models", raising=False)
    with pytest.raises(ImportError, match=f"^`import models` finds {file}, which hides .*: rename it, or take"):
        importlib.reload(experiments)
    assert "models" not in sys.modules  # it was found, and not run


def test_a_folder_called_models_that_is_no_package_hides_nothing(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "models", raising=False)
    importlib.reload(experiments)


def missing(name):
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_a_command_says_which_extra_it_needs(capsys):
    with pytest.raises(SystemExit) as caught:
        experiments._say_which_extra(ModuleNotFoundError, missing("flax.linen"), None)
    assert caught.value.code == MISTAKE
    assert capsys.readouterr().err == (
        "error: this command needs flax.linen, which the extra 'train' brings: pip install 'rspo-jax[train]'\n"
    )
    sentence = "models needs flax: pip install 'rspo-jax[train]'"
    with pytest.raises(SystemExit):
        experiments._say_which_extra(MissingExtra, MissingExtra(sentence), None)
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_other_errors_keep_their_traceback(capsys):
    for error in (missing("my_module"), ImportError("cannot import name 'x'"), ValueError("wrong")):
        experiments._say_which_extra(type(error), error, None)
        assert capsys.readouterr().err.strip().endswith(f"{type(error).__name__}: {error}")
