"""`python -m experiments.export RUN FOLDER`: write the newest checkpoint of a run as a Hugging Face folder.

transformers, vLLM and SGLang can load the folder, and so can the next run.
"""

import dataclasses
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

import models
from experiments.config import FolderRun, load_config
from experiments.errors import complain
from experiments.run_config import Place
from rspo_jax.records.checkpoint import CheckpointError
from rspo_jax.sharding import MeshConfig, make_mesh
from rspo_jax.training.restore import restore_params


@dataclass(frozen=True)
class Export:
    """Write the model of a run as a Hugging Face folder."""

    run_dir: Annotated[Place, tyro.conf.Positional]
    """The folder of a run, or its address in a bucket."""
    folder: Annotated[Path, tyro.conf.Positional]
    """Folder to write, absent or empty. It appears once it is complete."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the weights. By default that of the activations for a model that came from a folder, and that of the
    parameters for any other."""
    mesh: MeshConfig = MeshConfig()
    """Arrangement of the devices that hold the parameters meanwhile."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 2 for a mistake that the user can correct."""
    try:
        export = tyro.cli(Export, args=arguments, prog="python -m experiments.export")
        with jax.set_mesh(make_mesh(export.mesh)):
            step = write(export)
    except (ValueError, OSError, CheckpointError) as error:
        return complain(error)
    print(f"{export.folder}: the model of {export.run_dir} after {step} steps")
    return 0


def write(export: Export) -> int:
    """Write the folder and return the step that the model is from.

    Raises:
      ValueError: if there is no run or no checkpoint, or the architecture belongs to no family of models.
      OSError: if the folder cannot be written, or holds something.
    """
    _, run = load_config(export.run_dir / "config.json")
    run.check()
    model, config = run.architecture(), dataclasses.replace(run.trainer, mesh=export.mesh)
    restored = restore_params(
        models.Transformer(model),
        functools.partial(models.init_params, model),
        config,
        export.run_dir,
        run.learner().regularizers.needs_reference,
    )
    source = (run.model or None) if isinstance(run, FolderRun) else None
    dtype = export.dtype or (None if source is None else model.dtype)
    models.save_hf(export.folder, model, restored.params, source, dtype)
    return restored.step


if __name__ == "__main__":
    sys.exit(main())
