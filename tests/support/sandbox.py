"""Tests that need the sandbox for untrusted code, on machines where some protection does not hold."""

from collections.abc import Callable

import pytest

from experiments.tasks.code.protections import missing_protections
from experiments.tasks.code.sandbox import SandboxError


def skip_unless_it_holds(refused: Callable[[], object]) -> None:
    """Skip the test where a protection is missing, after `refused`, which needs them all, has raised SandboxError."""
    try:
        missing = missing_protections()
    except SandboxError as error:
        missing = (str(error),)
    if missing:
        with pytest.raises(SandboxError):
            refused()
        pytest.skip(f"does not hold here, and the sandbox was refused: {', '.join(missing)}")
