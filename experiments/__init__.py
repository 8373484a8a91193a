"""Commands, configs, tasks and studies built on top of `rspo_jax` and `models`."""

import importlib.util
from pathlib import Path


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


_check_models()
