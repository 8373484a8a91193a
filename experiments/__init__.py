"""Commands, configs, tasks and studies built on top of `rspo_jax` and `models`."""

import contextlib
import importlib.util
import signal
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from experiments.errors import complain

if TYPE_CHECKING:
    from experiments.config import PromptRun

__all__ = ["PromptRun"]


def _check_models() -> None:
    """Check that `models`, a common name, is the package beside this one, before imports deep inside fail obscurely.

    Raises:
      ImportError: naming what `import models` finds instead.
    """
    ours, spec = Path(__file__).resolve().parents[1] / "models", importlib.util.find_spec("models")
    if spec is None:
        return
    found = Path(spec.origin or next(iter(spec.submodule_search_locations or ["unknown"]))).resolve()
    if ours not in (found, found.parent):
        raise ImportError(
            f"`import models` finds {found}, which hides the package of this name at {ours}: rename it, or take the "
            "folder that holds it off Python's path (the current folder is on the path, and so are those of PYTHONPATH)"
        )


def _say_which_extra(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say which extra to install, in place of the traceback of a package that is missing.

    Raises:
      SystemExit: with the exit code of a mistake.
    """
    sentence = None
    if isinstance(error, ImportError):
        with contextlib.suppress(ImportError):  # without JAX, Python's own words have to do
            from rspo_jax.extras import MissingExtra, what_to_install

            if isinstance(error, MissingExtra):
                sentence = str(error)
            elif isinstance(error, ModuleNotFoundError):
                sentence = what_to_install(error, "this command")
    if sentence is None:
        sys.__excepthook__(kind, error, trace)
    else:
        sys.exit(complain(sentence))


# A command imports for seconds, and Ctrl-C then ends it at once. Python's own handler raises, and the exception is lost
# where it meets JAX's callback of the garbage collector. Commands that have something to save catch the signal.
_is_command = sys.argv[:1] == ["-m"] and threading.current_thread() is threading.main_thread()
if _is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
if _is_command:
    sys.excepthook = _say_which_extra

_check_models()


def __getattr__(name: str) -> Any:
    """Import `PromptRun` when it is asked for: commands that need none of it start faster."""
    if name == "PromptRun":
        from experiments.config import PromptRun

        return PromptRun
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
