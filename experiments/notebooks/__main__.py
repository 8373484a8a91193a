"""`python -m experiments.notebooks`: runs the notebooks top to bottom and keeps their outputs.

A notebook is its own source: edit it, run this command, and check its outputs. They are cleaned of whatever changes
from run to run or reveals the machine, and stamped with a digest of the code that they came from, so that stale outputs
are noticed.
"""

import base64
import hashlib
import io
import re
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import nbclient
import nbformat
import tyro
from nbclient.exceptions import CellExecutionError
from PIL import Image

from experiments.errors import complain

FOLDER = Path(__file__).parent
FAILED = 1
"""Exit code: a cell raised an error, or an output is not allowed."""
STAMP = "rspo_jax"
"""The entry of a notebook's metadata with the digest of the code that its outputs came from."""
PALETTE_SIZE = 256
"""Number of colours of a picture, the most that a palette holds."""
PYPROJECT = FOLDER.parents[1] / "pyproject.toml"
SETUP = """\
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

# The address in [project.urls] of pyproject.toml, written here by `python -m experiments.notebooks`.
REPOSITORY = "{repository}"

os.environ["JAX_PLATFORMS"] = "cpu"  # everything here is small

if importlib.util.find_spec("rspo_jax") is None:
    folders = [Path.cwd(), *Path.cwd().parents]
    checkout = next((folder for folder in folders if (folder / "rspo_jax" / "__init__.py").is_file()), None)
    if "google.colab" in sys.modules and (checkout or REPOSITORY):
        source = checkout.as_uri() if checkout else f"git+{{REPOSITORY}}"
        package = f"rspo-jax[train] @ {{source}}"
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)
        importlib.invalidate_caches()  # if Colab asks for a restart now, restart and run all cells again
    elif checkout:
        sys.path.insert(0, str(checkout))
        os.environ["PYTHONPATH"] = str(checkout)  # for the processes that a study starts
    else:
        raise ModuleNotFoundError(
            "rspo_jax is not installed here: run this notebook in a checkout of the repository or in an environment "
            "with rspo-jax[train], or, on Colab, set REPOSITORY in this cell to the address of the repository"
        )"""
"""The first cell of code of every notebook, but for the address."""
_TIMEOUT = 1200  # seconds for the start, and for each cell
_MACHINE_PATH = re.compile(r"(?<![\w./:])/(?:home|root|tmp|work|Users|usr|opt|var|mnt|content)/[\w.-]+")


@dataclass(frozen=True)
class NotebookOptions:
    """Run notebooks and keep their outputs."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Files in experiments/notebooks without .ipynb; all of them by default."""
    out: Path | None = None
    """The folder to write to; by default the notebooks are overwritten."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, `FAILED` or `MISTAKE`."""
    options = tyro.cli(NotebookOptions, args=arguments, prog="python -m experiments.notebooks")
    known = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
    for name in options.names:
        if name not in known:
            return complain(f"there is no notebook {name!r}; there are {', '.join(known)}")
    for name in options.names or known:
        started = time.monotonic()
        notebook = nbformat.read(known[name], as_version=4)
        if PYPROJECT.exists():  # not where the package is installed
            next(cell for cell in notebook.cells if cell.cell_type == "code").source = setup_cell()
        try:
            # All cells run in a new process and an empty folder.
            with tempfile.TemporaryDirectory() as folder:
                nbclient.NotebookClient(
                    notebook,
                    startup_timeout=_TIMEOUT,
                    timeout=_TIMEOUT,
                    kernel_name="python3",
                    record_timing=False,
                    coalesce_streams=True,
                    resources={"metadata": {"path": folder}},
                ).execute()
            clean(notebook)
        except (CellExecutionError, ValueError) as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            return FAILED
        target = (options.out or FOLDER) / f"{name}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, target)
        print(f"{name}: {time.monotonic() - started:.0f} s, {target.stat().st_size / 1024:.0f} KiB", flush=True)
    return 0


def setup_cell() -> str:
    """Return the first cell of code, with the address of the repository that pyproject.toml gives."""
    urls = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"].get("urls", {})
    return SETUP.format(repository=urls.get("Repository", ""))


def clean(notebook: nbformat.NotebookNode) -> None:
    """Reduce an executed notebook to what a reader sees, and stamp it.

    Raises:
      ValueError: if an output holds a warning, an error, or a path of this machine.
    """
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            STAMP: {"outputs_of": digest(notebook)},
        }
    )
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
            data = output.get("data", {})
            if "image/png" in data:
                picture = compact(base64.b64decode(data["image/png"]))
                data["image/png"] = base64.b64encode(picture).decode()
    found = faults(notebook)
    if found:
        raise ValueError(found[0])


def digest(notebook: nbformat.NotebookNode) -> str:
    """Return the SHA-256 of all code, in order."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def compact(picture: bytes) -> bytes:
    """Return a PNG in few colours and without metadata, at half its size or less."""
    image = Image.open(io.BytesIO(picture)).convert("RGB").quantize(PALETTE_SIZE, dither=Image.Dither.NONE)
    small = io.BytesIO()
    image.save(small, "PNG", optimize=True)
    return small.getvalue()


def faults(notebook: nbformat.NotebookNode) -> list[str]:
    """Return a sentence for each thing in a notebook's outputs that they must not hold."""
    found = []
    if notebook.metadata.get(STAMP, {}).get("outputs_of") != digest(notebook):
        found.append("the outputs are not those of the code: run python -m experiments.notebooks")
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            data = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")}
            text = "\n".join(map(str, [output.get("text", ""), *data.values()]))
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"cell {number} has an error or a warning: {text or output.get('evalue')}")
            if path := _MACHINE_PATH.search(text):
                found.append(f"cell {number} shows a path of a machine: {path[0]}")
    return found


if __name__ == "__main__":
    sys.exit(main())
