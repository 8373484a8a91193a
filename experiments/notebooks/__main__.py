"""`python -m experiments.notebooks`: runs the notebooks top to bottom and keeps what they show.

A notebook is its own source: edit it, run this, and look at its outputs. They are cleaned of whatever changes from run
to run or tells of the machine, and stamped with the code that they came from, so that stale ones are noticed. This file
must never know what a notebook is about.
"""

import base64
import hashlib
import io
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import nbclient
import nbformat
import tyro
from nbclient.exceptions import CellExecutionError
from PIL import Image

FOLDER = Path(__file__).parent
FAILED, MISTAKE = 1, 2
"""Exit codes: a cell raised an error; the user has something to mend."""
STAMP = "rspo_jax"
"""The entry of a notebook's metadata that says which code its outputs came from."""
COLOURS = 256
"""Of a picture, the most that a palette holds."""
_SECONDS_A_CELL = 1200
_MACHINE_PATH = re.compile(r"(?<![\w./:])/(?:home|root|tmp|work|Users|usr|opt|var|mnt|content)/[\w.-]+")


@dataclass(frozen=True)
class Options:
    """Run notebooks and keep their outputs."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Files in experiments/notebooks without .ipynb; all of them when absent."""
    out: Path | None = None
    """The folder to write to; the notebooks themselves are written anew when absent."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or one of those above."""
    options = tyro.cli(Options, args=arguments, prog="python -m experiments.notebooks")
    known = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
    for name in options.names:
        if name not in known:
            print(f"error: there is no notebook {name!r}; there are {', '.join(known)}", file=sys.stderr)
            return MISTAKE
    for name in options.names or known:
        started = time.monotonic()
        notebook = nbformat.read(known[name], as_version=4)
        try:
            execute(notebook)
            clean(notebook)
        except (CellExecutionError, ValueError) as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            return FAILED
        target = (options.out or FOLDER) / f"{name}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, target)
        print(f"{name}: {time.monotonic() - started:.0f} s, {target.stat().st_size / 1024:.0f} KiB", flush=True)
    return 0


def execute(notebook: nbformat.NotebookNode) -> None:
    """Runs all cells in a new process and an empty folder, and takes over their outputs.

    Raises:
      CellExecutionError: with the cell and its error.
    """
    with tempfile.TemporaryDirectory() as folder:
        client = nbclient.NotebookClient(
            notebook,
            timeout=_SECONDS_A_CELL,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )
        client.execute()


def clean(notebook: nbformat.NotebookNode) -> None:
    """Leaves of an executed notebook what a reader sees, and stamps it.

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
    found = complaints(notebook)
    if found:
        raise ValueError(found[0])


def digest(notebook: nbformat.NotebookNode) -> str:
    """Of all code, in order."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def compact(picture: bytes) -> bytes:
    """The same PNG in few colours and without metadata, half its size or less."""
    image = Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    small = io.BytesIO()
    image.save(small, "PNG", optimize=True)
    return small.getvalue()


def complaints(notebook: nbformat.NotebookNode) -> list[str]:
    """What the outputs of a notebook must not hold, a sentence each."""
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
