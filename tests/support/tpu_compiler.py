"""The optional TPU compiler in tests: it ends the process over a flag in XLA_FLAGS that it does not know."""

import pytest


def need_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the test if libtpu is not installed, and hide the suite's XLA_FLAGS from it and from subprocesses."""
    pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is optional and not in the development lock")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
