"""Importing the package where another one is called `models`."""

import importlib
import sys

import pytest

import experiments


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
